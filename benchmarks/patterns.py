"""Sparse attention over an image's patches: who attends to whom, boolean [tokens, tokens], tokens = 1 + side * side.

    seed_pattern(14)       the union that xFormers' vision-transformer notebook takes: about 80 % of the pairs left out

Token 0 is the class token: it attends to all patches and all attend to it.
"""

from __future__ import annotations

import torch

from accelkit.models import SEED


def distances(side: int) -> torch.Tensor:
    """Euclidean distance between patches, [side * side, side * side], in patches."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).reshape(-1, 2).float()
    return torch.cdist(at, at)


def axial(side: int) -> torch.Tensor:
    """Patches of the same row or column."""
    index = torch.arange(side * side)
    row, column = index // side, index % side
    return (row.unsqueeze(1) == row) | (column.unsqueeze(1) == column)


def local(side: int, distance: float) -> torch.Tensor:
    """Patches at most so far away."""
    return distances(side) <= distance


def scattered(side: int, share: float, generator: torch.Generator, sigma: float | None = None) -> torch.Tensor:
    """So large a share of the pairs, drawn at random: evenly, or nearer ones more often (a Gaussian of `sigma` patches)."""
    patches = side * side
    weight = torch.ones(patches, patches) if sigma is None else (-(distances(side) ** 2) / (2 * sigma**2)).exp()
    count = int(patches * patches * share)
    # The `count` smallest of exponential times over the weights: a draw without replacement (Efraimidis and Spirakis).
    times = torch.empty(patches, patches).exponential_(generator=generator) / weight.clamp_min(1e-30)
    chosen = torch.zeros(patches * patches, dtype=torch.bool)
    chosen[times.flatten().topk(count, largest=False).indices] = True
    return chosen.view(patches, patches)


def seed_pattern(side: int) -> torch.Tensor:
    """Axial, local to distance 2, 1 % at random, 3 % at random near by; and the class token."""
    generator = torch.Generator().manual_seed(SEED)
    union = axial(side) | local(side, 2.0)
    union |= scattered(side, 0.01, generator) | scattered(side, 0.03, generator, sigma=5.0)
    with_class = torch.ones(side * side + 1, side * side + 1, dtype=torch.bool)
    with_class[1:, 1:] = union
    return with_class
