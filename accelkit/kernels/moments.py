"""group statistics -> (mean, 1 / sqrt(variance + eps)) of each row

What a kernel that writes rows knows of its 64 columns, put together for the kernel that reads them (Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", 1979).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from accelkit.kernels import dependent

GROUP = 64
"""Columns of a group."""


@triton.jit
def row_moments_kernel(
    statistics_ptr, moments_ptr, M, groups, eps, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    g = tl.arange(0, GROUPS)
    inside = (m < M)[:, None] & (g < groups)[None, :]
    where = (m[:, None] * groups + g[None, :]) * 2
    means = tl.load(statistics_ptr + where, mask=inside, other=0.0)
    squares = tl.load(statistics_ptr + where + 1, mask=inside, other=0.0)
    mean = tl.sum(means, 1) / groups
    away = tl.where((g < groups)[None, :], means - mean[:, None], 0.0)
    variance = (tl.sum(squares, 1) + tl.sum(away * away, 1) * GROUP) / (groups * GROUP)
    tl.store(moments_ptr + m * 2, mean, mask=m < M)
    tl.store(moments_ptr + m * 2 + 1, tl.rsqrt(variance + eps), mask=m < M)


def row_moments(statistics: torch.Tensor, eps: float) -> torch.Tensor:
    """[rows, 2] float32, mean and reciprocal deviation, of contiguous [rows, groups, 2]: mean and squared differences."""
    m, groups, _ = statistics.shape
    moments = statistics.new_empty((m, 2))
    block = 32
    pdl = dependent.dependent("moments", statistics)
    row_moments_kernel[(triton.cdiv(m, block),)](
        statistics, moments, m, groups, eps, GROUP, triton.next_power_of_2(groups), block, pdl, num_warps=4,
        **dependent.options(pdl),
    )  # fmt: skip
    return moments
