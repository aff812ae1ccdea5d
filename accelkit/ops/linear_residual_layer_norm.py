"""s = x W^T + bias + residual; (layer_norm(s, norm_weight, norm_bias), s)

The second half of a transformer's attention and of its network, for few rows: there a matrix product fills a GPU only with K
split between programs, and the sum over the parts, which would be a kernel of its own, is done by the layer norm.
No pass makes this operator: targets whose kernels gain by it put it together when they compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.ops import linear_activation, residual_layer_norm
from accelkit.ops.operator import Operator, define, without_triton

SCHEMA = (
    "linear_residual_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps=1e-05) -> (Tensor, Tensor)"
)


def meaning(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`accelkit.linear_activation` without activation, then `accelkit.residual_layer_norm`.

    Args:
        x: [..., width]. weight: [features, width], bias: [features] or None, of x's dtype.
        residual: [..., features]. norm_weight, norm_bias: [features] or None, of any floating-point dtype.
        eps: added to the variance.

    Returns:
        (normalised, sum), both [..., features] in the sum's dtype.
    """
    linear = linear_activation.meaning(x, weight, bias)
    return residual_layer_norm.meaning(linear, residual, norm_weight, norm_bias, eps)


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    linear = linear_activation.fake(x, weight, bias)
    return residual_layer_norm.fake(linear, residual, norm_weight, norm_bias, eps)


def refusal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> str | None:
    if reason := without_triton():
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels multiply float16 and bfloat16, not {x.dtype}"
    if any(t is not None and t.dtype is not x.dtype for t in (weight, bias, residual)):
        return "the operands differ in dtype"
    if any(t is not None and t.dtype is torch.float64 for t in (norm_weight, norm_bias)):
        return "the kernel computes in float32; float64 stays with PyTorch"
    if weight.shape[0] > 8192:
        return f"rows of {weight.shape[0]} do not fit into one program's registers"
    return None


def kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    from accelkit.kernels import split

    return split.linear_residual_layer_norm(x, weight, bias, residual, norm_weight, norm_bias, eps)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
