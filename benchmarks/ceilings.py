"""What this machine's matrix units give at most, and so how fast BERT-base and ViT-B/16 could be here.

    floor = operations / measured rate of one large matrix product

    python benchmarks/ceilings.py                # a few seconds; writes benchmarks/results/<machine>/ceilings.json

A speed-up over PyTorch cannot be larger than PyTorch's own distance from the floor.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from accelkit.measure import interleaved, write_results

RESULTS = Path(__file__).resolve().parent / "results"
SIZE = 2048
BLOCK = {"bert-base-128": (128, 0), "vit-b16-224": (197, 2 * 196 * 768 * 768)}
"""model -> (tokens, operations outside of the layers): 12 layers of width 768, of 12 x 64 heads and 3072 inside."""


def operations(model: str) -> int:
    """Multiplications and additions of one forward at batch 1: 24 * n * width^2 + 4 * n^2 * width a layer."""
    tokens, outside = BLOCK[model]
    return 12 * (24 * tokens * 768**2 + 4 * tokens**2 * 768) + outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    candidates: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
        candidates[name] = lambda a=a, b=b: a @ b
    timings = interleaved(candidates, seconds=8)
    rows = []
    for name, timing in timings.items():
        rate = 2 * SIZE**3 / timing.median_ms / 1e6
        floors = {model: round(operations(model) / rate / 1e6, 1) for model in BLOCK}
        rows.append({"precision": name, "gflops": round(rate, 1), "timing": timing.to_json(), "floor_ms": floors})
    columns = ["precision", f"GFLOP/s of a {SIZE} x {SIZE} x {SIZE} product", *(f"floor of {m}, ms" for m in BLOCK)]
    table = {
        "columns": columns,
        "rows": [[r["precision"], str(r["gflops"]), *(str(f) for f in r["floor_ms"].values())] for r in rows],
    }
    path = write_results("ceilings", rows, options.output, title="What the machine gives at most", table=table)
    print(path.read_text())


if __name__ == "__main__":
    main()
