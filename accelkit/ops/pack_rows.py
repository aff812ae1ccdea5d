"""[batch, length, ...] with padding  ->  [batch * length, ...], the rows that are kept first

The first step of removing padding; `accelkit.packed_layout` says which rows are kept, `accelkit.unpack_rows` is the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.ops.operator import Operator, define, differ, without_triton

SCHEMA = "pack_rows(Tensor x, Tensor sources, Tensor rows) -> Tensor"


def meaning(x: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    """Gather rows.

    Args:
        x: [batch, length, ...], of any dtype.
        sources: int32 [batch * length], the row of x (its first two dimensions flattened) that each result row is.
        rows: int32 [1]; only so many rows of the result matter, the others hold anything.

    Returns:
        [batch * length, ...], in x's dtype.

    Raises:
        ValueError: sizes that do not go together.
    """
    check(x, sources)
    return x.flatten(0, 1).index_select(0, sources)


def check(x: Tensor, sources: Tensor) -> None:
    """Raise ValueError for what no kernel may be given; symbolic sizes are taken on trust."""
    if x.dim() < 2 or sources.dim() != 1 or sources.dtype is not torch.int32:
        raise ValueError(
            f"pack_rows takes [batch, length, ...] and int32 [batch * length], not {list(x.shape)} and {sources.dtype} "
            f"{list(sources.shape)}"
        )
    if differ(x.shape[0] * x.shape[1], sources.shape[0]):
        raise ValueError(f"{list(x.shape)} has {x.shape[0] * x.shape[1]} rows, and there are {len(sources)} sources")


def fake(x: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    check(x, sources)
    return x.new_empty((sources.shape[0], *x.shape[2:]))


def refusal(x: Tensor, sources: Tensor, rows: Tensor) -> str | None:
    return without_triton() or why_not_copied(x)


def why_not_copied(x: Tensor) -> str | None:
    """Why the kernels cannot copy rows of this dtype, or None."""
    return "the kernel copies real numbers, not complex ones" if x.is_complex() else None


def kernel(x: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    from accelkit.kernels import rows as kernels

    check(x, sources)
    return kernels.pack_rows(x, sources, rows)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
