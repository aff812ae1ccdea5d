"""which tokens are kept  ->  where each of them lies once the rows of all sequences are packed to the front

    mask          sources           positions     offsets    rows
    x x .         0 1 4 | 2 3 5     0  1 -1       0 2 3      3
    . x .                          -1  2 -1

The shapes are those of the unpacked batch whatever the mask, so that nothing waits for the values: a CUDA graph holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, without_triton

SCHEMA = "packed_layout(Tensor mask) -> (Tensor, Tensor, Tensor, Tensor)"


def meaning(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where rows go when padding is removed (FasterTransformer's "effective transformer").

    Args:
        mask: boolean [batch, length], True for the tokens that are kept, wherever in their sequence.

    Returns:
        All int32.
        sources [batch * length]: the row that each packed row comes from; those that are not kept come last, in order.
        positions [batch, length]: the packed row of each token, -1 where it is not kept.
        offsets [batch + 1]: the packed row that each sequence begins at, and where the last one ends.
        rows [1]: how many are kept, offsets' last.

    Raises:
        ValueError: a mask that is not boolean [batch, length].
    """
    check(mask)
    flat = mask.reshape(-1)
    ends = flat.cumsum(0, dtype=torch.int32)  # kept tokens up to this one
    positions = torch.where(flat, ends - 1, -1).reshape(mask.shape)
    offsets = F.pad(mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    numbers = torch.arange(flat.shape[0], dtype=torch.int32, device=mask.device)
    places = torch.where(flat, ends - 1, ends[-1:] + numbers - ends)
    sources = torch.zeros_like(numbers).scatter(0, places.long(), numbers)
    return sources, positions, offsets, offsets[-1:].clone()


def check(mask: Tensor) -> None:
    """Raise ValueError for what is no mask of tokens."""
    if mask.dim() != 2 or mask.dtype is not torch.bool:
        raise ValueError(f"the mask has to be boolean [batch, length], not {mask.dtype} {list(mask.shape)}")


def fake(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(mask)
    batch, length = mask.shape
    empty = (mask.new_empty(shape, dtype=torch.int32) for shape in ((batch * length,), mask.shape, (batch + 1,), (1,)))
    return tuple(empty)  # type: ignore[return-value]


def refusal(mask: Tensor) -> str | None:
    return without_triton()


def kernel(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from accelkit.kernels import rows

    check(mask)
    return rows.packed_layout(mask)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
