"""The comparison of vision-language-examples/acceleration, then and now: ViT-B/16-224 at batch 1 to 32.

    python benchmarks/vision_language_vit.py --quick          # fp16, batch 1, 8, 32
    python benchmarks/vision_language_vit.py                  # fp32 (as there), tf32 and fp16
    python benchmarks/vision_language_vit.py --device cpu --tiny --target eager

Writes benchmarks/results/<machine>/vision_language_vit.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gpu_run import Experiment, main

EXPERIMENTS = [
    Experiment(
        "vision_language_vit", "vision-language-examples' table: ViT-B/16-224", "vit-b16-224",
        batches=(1, 4, 8, 16, 32), quick=(1, 8, 32),
    ),
]  # fmt: skip


def run(arguments: Sequence[str] | None = None) -> int:
    return main(EXPERIMENTS, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(run())
