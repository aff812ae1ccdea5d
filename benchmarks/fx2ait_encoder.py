"""The encoder block of FX2AIT's example 01_transformer_model: 768 wide, 12 heads, 3072 inside, ReLU, length 196.

    python benchmarks/fx2ait_encoder.py                  # batch 1 to 512, fp16, every peer
    python benchmarks/fx2ait_encoder.py --quick          # batch 1, 8, 64, 512
    python benchmarks/fx2ait_encoder.py --device cpu --tiny --target eager

Writes benchmarks/results/<machine>/fx2ait_encoder.json; the accuracy of each candidate is verified against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpu_run import Experiment, main

EXPERIMENTS = [
    Experiment(
        "fx2ait_encoder", "FX2AIT's encoder block", "encoder-block",
        batches=(1, 8, 16, 32, 64, 128, 256, 512), quick=(1, 8, 64, 512), precisions=("fp16",),
    ),
]  # fmt: skip


def run(arguments: Sequence[str] | None = None) -> int:
    return main(EXPERIMENTS, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(run())
