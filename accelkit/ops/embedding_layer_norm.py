"""layer_norm(table_0[indices_0] + table_1[indices_1] + ..., weight, bias)

How BERT begins: words, positions and token types, each row read once and the sum never written.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, differ, without_triton
from accelkit.ops.residual_layer_norm import layer_norm

SCHEMA = (
    "embedding_layer_norm(Tensor[] indices, Tensor[] tables, Tensor? weight, Tensor? bias, float eps=1e-05) -> Tensor"
)


def meaning(
    indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation of a sum of looked-up rows; added in the order given.

    Args:
        indices: integer tensors whose shapes broadcast to [batch, length] (or any leading shape).
        tables: as many [entries, width], of one dtype.
        weight, bias: [width] or None, of any floating-point dtype.
        eps: added to the variance.

    Returns:
        [*leading shape, width], in the tables' dtype.

    Raises:
        ValueError: sizes that do not go together.
    """
    _check(indices, tables, weight, bias)
    rows = [F.embedding(index, table) for index, table in zip(indices, tables, strict=True)]
    return layer_norm(functools.reduce(torch.add, rows), weight, bias, eps)


def _check(indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError for what no kernel may be given; symbolic sizes are taken on trust."""
    shapes = [list(table.shape) for table in tables]
    if not tables or len(indices) != len(tables):
        raise ValueError(f"each index needs a table, and there are {len(indices)} indices and {len(tables)} tables")
    if any(table.dim() != 2 or differ(table.shape[1], tables[0].shape[-1]) for table in tables):
        raise ValueError(f"the tables have to be [entries, width], of one width; they are {shapes}")
    for vector in (weight, bias):
        if vector is not None and (vector.dim() != 1 or differ(vector.shape[0], tables[0].shape[1])):
            raise ValueError(f"weight and bias have to be as wide as the tables {shapes}, not {list(vector.shape)}")


def fake(
    indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    _check(indices, tables, weight, bias)
    shape = torch.broadcast_shapes(*(i.shape for i in indices))  # type: ignore[no-untyped-call]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tables))
    return tables[0].new_empty((*shape, tables[0].shape[1]), dtype=dtype)


def refusal(
    indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> str | None:
    if reason := without_triton():
        return reason
    if any(t is not None and t.dtype is torch.float64 for t in (*tables, weight, bias)):
        return "the kernel computes in float32; float64 stays with PyTorch"
    if not 1 <= len(tables) <= 3:
        return f"the kernel adds one to three tables, not {len(tables)}"
    width = tables[0].shape[1]
    if not isinstance(width, int) or width > 8192:
        return f"the kernel keeps a row of up to 8192 numbers in registers, and these have {width}"
    return None


def kernel(
    indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    from accelkit.kernels import norms

    _check(indices, tables, weight, bias)
    return norms.embedding_layer_norm(indices, tables, weight, bias, eps)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
