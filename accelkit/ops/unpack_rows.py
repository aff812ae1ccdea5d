"""packed rows  ->  [batch, length, ...], zeros where the token was not kept

The way back from `accelkit.pack_rows`, in the places that `accelkit.packed_layout` gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.ops.operator import Operator, define, without_triton
from accelkit.ops.pack_rows import why_not_copied

SCHEMA = "unpack_rows(Tensor packed, Tensor positions) -> Tensor"


def meaning(packed: Tensor, positions: Tensor) -> Tensor:
    """Put rows in their places.

    Args:
        packed: [rows, ...], of any dtype.
        positions: int32 [batch, length], the row of `packed` that each token is, -1 for none.

    Returns:
        [batch, length, ...], in packed's dtype; zeros where the position is -1.

    Raises:
        ValueError: positions that are not int32 [batch, length].
    """
    check(packed, positions)
    shape = (*positions.shape, *packed.shape[1:])
    found = packed.index_select(0, positions.reshape(-1).clamp_min(0)).reshape(shape)
    absent = (positions < 0).reshape(*positions.shape, *(1 for _ in packed.shape[1:]))
    return found.masked_fill(absent, 0)


def check(packed: Tensor, positions: Tensor) -> None:
    """Raise ValueError for what no kernel may be given; symbolic sizes are taken on trust."""
    if packed.dim() < 1 or positions.dim() != 2 or positions.dtype is not torch.int32:
        raise ValueError(
            f"unpack_rows takes [rows, ...] and int32 [batch, length], not {list(packed.shape)} and {positions.dtype} "
            f"{list(positions.shape)}"
        )


def fake(packed: Tensor, positions: Tensor) -> Tensor:
    check(packed, positions)
    return packed.new_empty((*positions.shape, *packed.shape[1:]))


def refusal(packed: Tensor, positions: Tensor) -> str | None:
    return without_triton() or why_not_copied(packed)


def kernel(packed: Tensor, positions: Tensor) -> Tensor:
    from accelkit.kernels import rows

    check(packed, positions)
    return rows.unpack_rows(packed, positions)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
