"""ONNX Runtime on a CPU with fused operators in its own dialect, in standard ONNX, and without the fusions at all.

python benchmarks/onnx_dialects.py            BERT-base 128, ViT-B/16-224 and MiniLM, batch 1, float32; interleaved rounds
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from by_hand import flat_call, float64_outputs, onnxruntime_session, quiet, worst_error

import accelkit
from accelkit.backends.onnxruntime import OnnxRuntime
from accelkit.measure import interleaved, write_results
from accelkit.models import load_model
from accelkit_passes import default_passes

RESULTS = Path(__file__).resolve().parent / "results"
FUSIONS = ("recognise_attention", "reorder_rows", "merge_qkv")
"""And all whose names begin with fuse_ but the two folds into convolutions and linear layers, which are older."""
OLDER = ("fuse_conv_batch_norm", "fuse_linear_batch_norm")


def without_fusions() -> tuple[Any, ...]:
    passes = default_passes()
    return tuple(p for p in passes if p.name not in FUSIONS and (not p.name.startswith("fuse_") or p.name in OLDER))


def candidates(model: torch.nn.Module, inputs: Any) -> dict[str, Any]:
    def optimized(target: OnnxRuntime, passes: Any = None) -> Any:
        fast = accelkit.optimize(model, inputs, target=target, passes=passes, cache=False, progress=False)
        return flat_call(fast, inputs)

    with quiet():
        return {
            "by hand": onnxruntime_session(model, inputs),
            "without fusions": optimized(OnnxRuntime(), without_fusions()),
            "standard": optimized(OnnxRuntime(dialect="standard")),
            "com.microsoft": optimized(OnnxRuntime(dialect="com.microsoft")),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=["bert-base-128", "vit-b16-224", "minilm"])
    parser.add_argument("--seconds", type=float, default=60.0, help="timed rounds of a model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in options.model:
        model, inputs = load_model(name)
        calls = candidates(model, inputs)
        truth = float64_outputs(model, inputs)
        errors = {candidate: worst_error(call, truth) for candidate, call in calls.items()}
        with torch.no_grad():
            timings = interleaved(calls, seconds=options.seconds, warmup=2)
        rows += [
            {
                "model": name,
                "candidate": candidate,
                "error": errors[candidate],
                "timing": timing.to_json(),
                "ms": str(timing),
            }
            for candidate, timing in timings.items()
        ]
        print(name, {candidate: str(timing) for candidate, timing in timings.items()}, flush=True)
    table = {
        "columns": ["model", "candidate", "ms", "error"],
        "rows": [[r["model"], r["candidate"], r["ms"], f"{r['error']:.1e}"] for r in rows],
    }
    packages = ("onnx", "onnxruntime", "transformers")
    title = "ONNX Runtime on a CPU: fused operators in two dialects, and without"
    print(write_results("onnx_dialects", rows, options.output, title=title, table=table, packages=packages))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
