"""activation(norm(x) W^T + bias) + norm(residual), and the result's statistics for the next one

Layer norm without a pass over memory. With W folded with the norm's weight, and the bias with the norm's bias,

    layer_norm(x) W^T + bias  =  (x W'^T - mean * column sums of W') / deviation + bias'

so the linear layer multiplies x as it lies, and its epilogue needs two numbers a row, which the layer that wrote x gives.
No pass makes this operator: targets whose kernels gain by it fold weights when they compile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.linear_activation import ACTIVATIONS
from accelkit.ops.operator import Operator, define, without_triton
from accelkit.ops.row_moments import GROUP

SCHEMA = (
    "folded_linear(Tensor x, Tensor weight, Tensor? bias, str activation='none', Tensor? moments=None, "
    "Tensor? column_sums=None, Tensor? residual=None, Tensor? residual_moments=None, Tensor? residual_weight=None, "
    "Tensor? residual_bias=None, bool statistics=False) -> (Tensor, Tensor)"
)


def meaning(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    moments: Tensor | None = None,
    column_sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_moments: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    """A linear layer between two layer norms; computed in float32 (float64 where x is).

    Args:
        x: [..., width]. weight: [features, width], of x's dtype. bias: [features] or None, of any floating-point dtype.
        activation: as in `accelkit.linear_activation`.
        moments: [..., 2] from `accelkit.row_moments`, with which x is normalised on the way in; column_sums: [features], of
            weight over its width, then needed.
        residual: [..., features] of x's dtype, added after the activation; normalised with residual_moments and the affine
            residual_weight and residual_bias, [features], where these are given.
        statistics: whether to give the result's statistics; features is then a multiple of 64.

    Returns:
        ([..., features] in x's dtype, [..., features / 64, 2] in float32: each group's mean and sum of squared differences; no
        groups where statistics are not asked for).

    Raises:
        ValueError: an unknown activation, moments without column sums.
    """
    _require(activation, moments, column_sums)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.to(wide))
    if moments is not None and column_sums is not None:
        y = (y - moments[..., :1] * column_sums) * moments[..., 1:]
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        added = residual.to(wide)
        if residual_moments is not None:
            added = (added - residual_moments[..., :1]) * residual_moments[..., 1:]
            added = added if residual_weight is None else added * residual_weight
            added = added if residual_bias is None else added + residual_bias
        y = y + added
    if not statistics:
        return y.to(x.dtype).contiguous(), x.new_empty((*x.shape[:-1], 0, 2), dtype=torch.float32)
    groups = y.reshape(*y.shape[:-1], -1, GROUP)
    means = groups.mean(-1, keepdim=True)
    found = torch.stack([means.squeeze(-1), (groups - means).square().sum(-1)], -1)
    return y.to(x.dtype).contiguous(), found.to(torch.float32)


def _require(activation: str, moments: Tensor | None, column_sums: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation has to be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if moments is not None and column_sums is None:
        raise ValueError("moments need column_sums, the sums of weight over its width")


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    moments: Tensor | None = None,
    column_sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_moments: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    _require(activation, moments, column_sums)
    shape = (*x.shape[:-1], weight.shape[0])
    found = (*x.shape[:-1], weight.shape[0] // GROUP if statistics else 0, 2)
    return x.new_empty(shape), x.new_empty(found, dtype=torch.float32)


def refusal(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    moments: Tensor | None = None,
    column_sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_moments: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    statistics: bool = False,
) -> str | None:
    if reason := without_hopper(x):
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel multiplies float16 and bfloat16, not {x.dtype}"
    if any(t is not None and t.dtype is not x.dtype for t in (weight, residual)):
        return "the operands differ in dtype"
    features, width = weight.shape
    if width % 8 or features % (GROUP if statistics else 8):
        return f"a {features} x {width} weight: the kernel wants multiples of 8, of {GROUP} where it gives statistics"
    if residual_moments is not None and (residual_weight is None or residual_bias is None):
        return "the kernel normalises a residual only with weight and bias"
    return None


HOPPER_FAILURES: dict[torch.device, str] = {}
"""Devices on which Triton could not compile or launch the Hopper kernels, and what it said."""


def without_hopper(tensor: Tensor) -> str | None:
    """Why Hopper's kernels cannot run on this (fake) tensor's device, or None."""
    if reason := without_triton():
        return reason
    if tensor.device.type != "cuda":
        return "the kernel is for NVIDIA's Hopper GPUs"
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability[0] != 9:
        return f"the kernel is for compute capability 9.x (Hopper), this GPU has {capability[0]}.{capability[1]}"
    return HOPPER_FAILURES.get(tensor.device)


def kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    moments: Tensor | None = None,
    column_sums: Tensor | None = None,
    residual: Tensor | None = None,
    residual_moments: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor]:
    from accelkit.kernels import linear

    return linear.folded_linear(
        x, weight, bias, activation, moments, column_sums, residual, residual_moments, residual_weight, residual_bias,
        statistics,
    )  # fmt: skip


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
