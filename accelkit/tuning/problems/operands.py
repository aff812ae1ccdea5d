"""Fresh random operands, and how often a launch is repeated to be measured."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FLOPS, _BYTES_S, _LAUNCH_S = (
    5e14,
    3e12,
    2e-6,
)  # of a fast GPU: the order of tasks and their repetitions follow, no more
_GROUP_S = 3e-4  # what is timed as one: long beside an event's resolution
_CACHE_BYTES = 128 * 2**20  # more than a GPU's second-level cache holds


class Numbers:
    """Fresh random numbers on a device, from a generator of our own: the caller's keeps its state."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device)
        self.generator.manual_seed(int.from_bytes(os.urandom(6), "little"))

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normally distributed, with this standard deviation."""
        return torch.randn(size, dtype=dtype, device=self.device, generator=self.generator) * scale

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Evenly distributed from `low` to `high` - 1."""
        return torch.randint(low, high, size, device=self.device, generator=self.generator)

    def copies(self, one: Tensor) -> list[Tensor]:
        """As many of a weight as no cache holds: a model's other layers come between two reads of it."""
        count = max(1, min(64, math.ceil(_CACHE_BYTES / max(1, one.nbytes)))) if one.is_cuda else 1
        return [one, *(one.clone() for _ in range(count - 1))]


def launches(seconds: float) -> int:
    """How many launches of about this length are timed as one."""
    return max(2, min(64, round(_GROUP_S / max(seconds, _LAUNCH_S))))


def least_seconds(operations: float, size_bytes: float) -> float:
    """A lower bound of a kernel's time on a fast GPU."""
    return max(operations / _FLOPS, size_bytes / _BYTES_S, _LAUNCH_S)


def widened(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Any]:
    """Floating-point operands in `dtype`, where one is given."""
    return [t if t is None or dtype is None or not t.is_floating_point() else t.to(dtype) for t in tensors]


def known(*sizes: object) -> bool:
    """Whether all sizes are numbers, and none is 0."""
    return all(isinstance(size, int) and size > 0 for size in sizes)


def named(dtype: torch.dtype, extras: Sequence[str] = ()) -> str:
    """`float16, gelu, residual`."""
    return ", ".join([str(dtype).removeprefix("torch."), *extras])
