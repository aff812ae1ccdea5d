"""s = x + residual; (rms_norm(s, weight), s)

The same as residual_layer_norm for models that divide by the root of the mean square (arXiv 1910.07467).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, without_triton
from accelkit.ops.residual_layer_norm import check

SCHEMA = "residual_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps=1e-06, Tensor? rows=None) -> (Tensor, Tensor)"


def meaning(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMS normalisation of a sum, over the last dimension.

    Args:
        x: [..., width]. residual: the same shape; where its dtype differs, the sum has the promoted one.
        weight: [width] or None, of any floating-point dtype.
        eps: added to the mean square.
        rows: int32 [1]; only so many rows (of the leading dimensions, flattened) matter, the others hold anything.

    Returns:
        (normalised, sum), both in the sum's dtype.

    Raises:
        ValueError: sizes that do not go together.
    """
    check(x, residual, weight)
    total = (x + residual).contiguous()
    widest = torch.promote_types(total.dtype, total.dtype if weight is None else weight.dtype)
    weight = None if weight is None else weight.to(widest)
    return F.rms_norm(total.to(widest), (x.shape[-1],), weight, eps).to(total.dtype).contiguous(), total


def fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check(x, residual, weight)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)


def refusal(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6, rows: Tensor | None = None
) -> str | None:
    if reason := without_triton():
        return reason
    if any(t is not None and t.dtype is torch.float64 for t in (x, residual, weight)):
        return "the kernel computes in float32; float64 stays with PyTorch"
    return None


def kernel(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from accelkit.kernels import norms

    check(x, residual, weight)
    return norms.residual_rms_norm(x, residual, weight, eps, rows)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel, counted=("x", "residual")))
