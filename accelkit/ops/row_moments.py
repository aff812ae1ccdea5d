"""group statistics -> (mean, 1 / sqrt(variance + eps)) of each row

The link between an `accelkit.folded_linear` that writes rows and one that normalises them on the way in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.ops.operator import Operator, define, without_triton

SCHEMA = "row_moments(Tensor statistics, float eps) -> Tensor"

GROUP = 64
"""Columns that share one pair of statistics."""


def meaning(statistics: Tensor, eps: float) -> Tensor:
    """Mean and reciprocal deviation of rows from those of their groups (Chan, Golub and LeVeque, 1979).

    Args:
        statistics: [..., groups, 2]: of each group of 64 columns the mean and the sum of squared differences from it.
        eps: added to the variance.

    Returns:
        [..., 2], the mean and 1 / sqrt(variance + eps).
    """
    means, squares = statistics.unbind(-1)
    mean = means.mean(-1, keepdim=True)
    variance = (squares.sum(-1) + GROUP * (means - mean).square().sum(-1)) / (GROUP * means.shape[-1])
    return torch.stack([mean.squeeze(-1), torch.rsqrt(variance + eps)], -1)


def fake(statistics: Tensor, eps: float) -> Tensor:
    return statistics.new_empty((*statistics.shape[:-2], 2))


def refusal(statistics: Tensor, eps: float) -> str | None:
    if reason := without_triton():
        return reason
    return None if statistics.dtype is torch.float32 else f"the kernel takes float32, not {statistics.dtype}"


def kernel(statistics: Tensor, eps: float) -> Tensor:
    from accelkit.kernels import moments

    flat = statistics.reshape(-1, *statistics.shape[-2:]).contiguous()
    return moments.row_moments(flat, eps).reshape(*statistics.shape[:-2], 2)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
