"""s = x + residual; (layer_norm(s, weight, bias), s)

What stands between the halves of every transformer layer: one read of x and residual, one write of each result, where
PyTorch's add and layer_norm read and write the sum twice. Pre-norm models use both results, post-norm models the first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, differ, without_triton

SCHEMA = (
    "residual_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps=1e-05, Tensor? rows=None)"
    " -> (Tensor, Tensor)"
)


def meaning(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layer normalisation (arXiv 1607.06450) of a sum, over the last dimension.

    Args:
        x: [..., width]. residual: the same shape; where its dtype differs, the sum has the promoted one.
        weight, bias: [width] or None, of any floating-point dtype.
        eps: added to the variance.
        rows: int32 [1]; only so many rows (of the leading dimensions, flattened) matter, the others hold anything.

    Returns:
        (normalised, sum), both in the sum's dtype.

    Raises:
        ValueError: sizes that do not go together.
    """
    check(x, residual, weight, bias)
    total = (x + residual).contiguous()
    return layer_norm(total, weight, bias, eps), total


def check(x: Tensor, residual: Tensor, *vectors: Tensor | None) -> None:
    """Raise ValueError where the residual is not x's size or a vector not its width; symbolic sizes are taken on trust."""
    if x.dim() == 0 or x.dim() != residual.dim() or any(map(differ, x.shape, residual.shape)):
        raise ValueError(
            f"x {list(x.shape)} and residual {list(residual.shape)} have to have the same sizes, [..., width]"
        )
    for vector in vectors:
        if vector is not None and (vector.dim() != 1 or differ(vector.shape[0], x.shape[-1])):
            raise ValueError(
                f"weight and bias have to be [{x.shape[-1]}] beside x {list(x.shape)}, not {list(vector.shape)}"
            )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """F.layer_norm over the last dimension, for weights of any dtype; the result has x's."""
    widest = x.dtype
    for tensor in (weight, bias):
        if tensor is not None:
            widest = torch.promote_types(widest, tensor.dtype)
    weight, bias = (None if t is None else t.to(widest) for t in (weight, bias))
    return F.layer_norm(x.to(widest), (x.shape[-1],), weight, bias, eps).to(x.dtype).contiguous()


def fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(x, residual, weight, bias)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


def refusal(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    rows: Tensor | None = None,
) -> str | None:
    if reason := without_triton():
        return reason
    if any(t is not None and t.dtype is torch.float64 for t in (x, residual, weight, bias)):
        return "the kernel computes in float32; float64 stays with PyTorch"
    return None


def kernel(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from accelkit.kernels import norms

    check(x, residual, weight, bias)
    return norms.residual_layer_norm(x, residual, weight, bias, eps, rows)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel, counted=("x", "residual")))
