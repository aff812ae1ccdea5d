"""`import accelkit` touches torch and numpy only."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, torch
before = set(sys.modules)
import accelkit
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(" ".join(sorted(new)))
"""
HEAVY = {
    "onnx",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "rich",
    "platformdirs",
    "sympy",
    "matplotlib",
    "accelkit_passes",
    "triton",
    "onnxoptimizer",
    "onnx_graphsurgeon",
    "onnx_ir",
    "google",
}


def test_nothing_heavy_is_imported() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    new = set(run.stdout.split())
    assert "accelkit" in new
    assert not new & HEAVY


def test_the_public_names() -> None:
    import accelkit

    names = {
        "optimize",
        "load",
        "CompiledModel",
        "Dim",
        "Precision",
        "Backend",
        "Engine",
        "GraphPass",
        "RewritePass",
        "OnnxPass",
    }
    assert all(hasattr(accelkit, name) for name in names)
    errors = [
        v
        for v in vars(accelkit).values()
        if isinstance(v, type) and issubclass(v, Exception) and not issubclass(v, Warning)
    ]
    assert len(errors) >= 9
    assert all(issubclass(error, accelkit.AccelkitError) for error in errors)
    assert issubclass(accelkit.InputError, ValueError)
