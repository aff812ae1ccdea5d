"""`python -m accelkit.tuning.compile_worker`: compiles kernels for a GPU that it does not need to see.

stdin: one line of JSON, {"workers", "target", "jobs": [{"number", "module", "name", "data"}]}
stdout: {"number", "error"} for each, as they finish; the kernels are in Triton's cache on disk

A process of its own, so that forking is safe: neither threads nor a GPU's context are in it. Each kernel is compiled in a
fork, so that a compiler that crashes takes one kernel with it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

_KERNELS = "accelkit.kernels."


def main() -> int:
    """Read the order, carry it out."""
    import triton.compiler  # for the forks to inherit
    import triton.experimental.gluon  # noqa: F401

    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    running: dict[int, int] = {}
    try:
        for job in order["jobs"]:
            if len(running) >= order["workers"]:
                _reap(running)
            _import(job["module"])
            pid = os.fork()
            if pid == 0:
                _compile_and_leave(job, order["target"])
            running[pid] = job["number"]
        while running:
            _reap(running)
    except BrokenPipeError:  # nobody reads any more
        return 1
    return 0


def _reap(running: dict[int, int]) -> None:
    pid, status = os.wait()
    number = running.pop(pid)
    _report(number, None if status == 0 else f"the compiler ended with status {status}")


def _report(number: int, error: str | None) -> None:
    os.write(1, (json.dumps({"number": number, "error": error}) + "\n").encode())


def _compile_and_leave(job: dict[str, Any], target: list[Any]) -> None:
    code = 1
    try:
        compile_job(job, target)
        code = 0
    finally:
        os._exit(code)


def _import(module: str) -> Any:
    if not module.startswith(_KERNELS):
        raise ValueError(f"{module} is none of accelkit's kernels")
    return importlib.import_module(module)


def compile_job(job: dict[str, Any], target: list[Any]) -> Any:
    """Compile one kernel as `triton.JITFunction` would, under the same name in the cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = getattr(_import(job["module"]), job["name"])
    data = json.loads(job["data"])
    constants = {
        tuple(key): _constant(value) for key, value in zip(data["constant_keys"], data["constant_vals"], strict=True)
    }
    attributes = {tuple(key): value for key, value in zip(data["attrs_keys"], data["attrs_vals"], strict=True)}
    signature = {name: _as_tuple(value) for name, value in data["signature"].items()}
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in data["options"].items()}
    source = GluonASTSource if function.is_gluon() else ASTSource
    return triton.compile(
        source(function, signature, constants, attributes), target=GPUTarget(*target), options=options
    )


def _constant(value: Any) -> Any:
    import triton.language as tl

    if isinstance(value, str) and tl.dtype.is_dtype(value):
        return tl.dtype(value)
    if isinstance(value, dict) and "constexpr" in value:
        return tl.constexpr(value["constexpr"])
    return _as_tuple(value)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
