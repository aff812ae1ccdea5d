"""activation(x W^T + bias) + residual

A linear layer with what follows it computed before its result leaves the chip: one kernel instead of two or three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, without_triton

SCHEMA = (
    "linear_activation(Tensor x, Tensor weight, Tensor? bias, str activation='none', Tensor? residual=None, "
    "Tensor? rows=None) -> Tensor"
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""By name, as PyTorch computes them."""


def meaning(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """A linear layer, an activation and a residual.

    Args:
        x: [..., width]. weight: [features, width], of x's dtype. bias: [features] of x's dtype, or None.
        activation: none, gelu (exact), gelu_tanh, relu or silu.
        residual: [..., features] of x's dtype, added after the activation, or None.
        rows: int32 [1]; only so many rows (of the leading dimensions, flattened) matter, the others hold anything.

    Returns:
        [..., features], in x's dtype.

    Raises:
        ValueError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation has to be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    y = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return (y if residual is None else y + residual).contiguous()


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation has to be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def refusal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> str | None:
    if reason := without_triton():
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels multiply float16 and bfloat16, not {x.dtype}"
    if any(t is not None and t.dtype is not x.dtype for t in (weight, bias, residual)):
        return "the operands differ in dtype"
    return None


def kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    residual: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    from accelkit.kernels import linear

    return linear.linear_activation(x, weight, bias, activation, residual, rows)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel, counted=("x", "residual")))
