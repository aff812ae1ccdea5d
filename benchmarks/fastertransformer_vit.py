"""FasterTransformer's ViT tables, then and now: ViT-B/16 and L/16 at 384 and 224, batch 1 to 32, fp32, tf32, fp16.

    python benchmarks/fastertransformer_vit.py --quick --model vit-b16-384     # fp16, batch 1, 8, 32
    python benchmarks/fastertransformer_vit.py --model vit-b16-384             # all of one model: minutes
    python benchmarks/fastertransformer_vit.py --device cpu --tiny --target eager

Writes benchmarks/results/<machine>/fastertransformer_vit_<model>.json, one a model: each has all its candidates in one
run. `--peers eager,graph,compile,accelkit` leaves the others out, `+autotune` adds max-autotune (minutes more).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import vision_language_vit
from gpu_run import Experiment, main

EXPERIMENTS = [
    Experiment(
        f"fastertransformer_vit_{letter.lower()}16_{size}", f"FasterTransformer's table: ViT-{letter}/16-{size}",
        f"vit-{letter.lower()}16-{size}", batches=(1, 8, 16, 32), quick=(1, 8, 32),
        also=tuple(e for e in vision_language_vit.EXPERIMENTS if e.model == f"vit-{letter.lower()}16-{size}"),
    )
    for letter in "BL" for size in (384, 224)
]  # fmt: skip


def run(arguments: Sequence[str] | None = None) -> int:
    return main(EXPERIMENTS, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(run())
