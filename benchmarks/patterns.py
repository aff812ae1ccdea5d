"""Sparse attention over an image's patches: who attends to whom, boolean [tokens, tokens], tokens = 1 + side * side.

    seed_pattern(14)       the union that xFormers' vision-transformer notebook takes: about 80 % of the pairs left out

Token 0 is the class token: it attends to all patches and all attend to it.
"""

from __future__ import annotations

import torch

from accelkit.attention_patterns import Axial2D, Local2D, Pattern, Random, RandomNear2D
from accelkit.models import SEED


def seed_pattern(side: int) -> torch.Tensor:
    """Axial, local (closer than 2 patches), 1 % at random, 3 % at random near by; and the class token."""
    nearby = RandomNear2D(side, side, sigma=5.0, sparsity=0.97, seed=SEED, prefix=1)
    union: Pattern = Axial2D(side, side, prefix=1) | Local2D(side, side, distance=2.0, prefix=1)
    return (union | Random(0.99, seed=SEED) | nearby).mask(1 + side * side)
