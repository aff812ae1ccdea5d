"""layer_norm(table_0[indices_0] + table_1[indices_1] + ..., weight, bias)

How BERT begins: words, positions and token types, each row read once and the sum never written.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, without_triton
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
    """
    rows = [F.embedding(index, table) for index, table in zip(indices, tables, strict=True)]
    return layer_norm(functools.reduce(torch.add, rows), weight, bias, eps)


def fake(
    indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
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
    return None


def kernel(
    indices: list[Tensor], tables: list[Tensor], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    from accelkit.kernels import norms

    return norms.embedding_layer_norm(indices, tables, weight, bias, eps)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
