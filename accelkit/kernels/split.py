"""Few rows: K split between programs, their parts added up by the layer norm that follows.

parts [splits, rows, features] = x[:, k0:k1] W[:, k0:k1]^T        one program a tile and split, float32
s = sum of parts + bias + residual;  layer_norm(s)                one program a row
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from accelkit.kernels import dense_last, dependent, on_device_of
from accelkit.tuning.choices import Choices


class SplitConfig(NamedTuple):
    """How it is launched.

    Attributes:
        splits: parts of K. block_m, block_n, block_k: a program's tile and step.
        warps, stages: of a program of the matrix product.
    """

    splits: int
    block_m: int
    block_n: int
    block_k: int = 64
    warps: int = 4
    stages: int = 4


class SplitProblem(NamedTuple):
    """What a choice depends on.

    Attributes:
        rows, features, width: the matrix product's M, N and K.
        dtype: of the operands.
    """

    rows: int
    features: int
    width: int
    dtype: torch.dtype


def default(rows: int, features: int, width: int, processors: int) -> SplitConfig:
    """By rule: as many splits as fill the multiprocessors once, of at least 256 numbers each."""
    block_m = 32 if rows <= 32 else 64
    tiles = -(-rows // block_m) * -(-features // 64)
    splits = max(1, min(processors // tiles, width // 256, 8))
    return SplitConfig(splits, block_m, 64, 128 if width % 128 == 0 else 64)


def candidates(rows: int, features: int, width: int, processors: int) -> list[SplitConfig]:
    """The configurations worth measuring."""
    found = [default(rows, features, width, processors)]
    for block_m, block_n in ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128)):
        tiles = -(-rows // block_m) * -(-features // block_n)
        for splits in (1, 2, 3, 4, 6, 8):
            if width // splits >= 128 and block_m <= max(32, 2 * rows) and splits * tiles <= 3 * processors:
                found.append(SplitConfig(splits, block_m, block_n))
    return list(dict.fromkeys(found))


def default_on(device: torch.device, problem: SplitProblem) -> SplitConfig:
    """`default` on this device."""
    return default(*problem[:3], _processors(device))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


chosen = Choices("split", SplitProblem, SplitConfig, lambda device, p: candidates(*p[:3], _processors(device)))
"""What measuring found, by device and problem; filled by `accelkit.tuning`."""


@triton.jit
def product_kernel(
    x_ptr, w_ptr, parts_ptr, M, N, K, x_stride, w_stride, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * SPLIT_K
    end = tl.minimum(first + SPLIT_K, K)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride + first + k[None, :]
    w_ptrs = w_ptr + (n % N).to(tl.int64)[None, :] * w_stride + first + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, SPLIT_K, BLOCK_K):
        x = tl.load(x_ptrs, mask=k[None, :] < end - first - start, other=0.0)
        w = tl.load(w_ptrs, mask=k[:, None] < end - first - start, other=0.0)
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    where = (tl.program_id(1).to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(parts_ptr + where, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def sum_and_norm_kernel(
    parts_ptr, bias_ptr, residual_ptr, weight_ptr, shift_ptr, normalised_ptr, sum_ptr, M, N, residual_stride, eps,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    total = tl.load(residual_ptr + row * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (split * M + row) * N + n, mask=inside, other=0.0)
    mean = tl.sum(total, 0) / N
    away = tl.where(inside, total - mean, 0.0)
    y = away * tl.rsqrt(tl.sum(away * away, 0) / N + eps)
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(normalised_ptr + row * N + n, y.to(normalised_ptr.dtype.element_ty), mask=inside)
    tl.store(sum_ptr + row * N + n, total.to(sum_ptr.dtype.element_ty), mask=inside)


def linear_residual_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    config: SplitConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`accelkit.ops.linear_residual_layer_norm.meaning` on a GPU."""
    features, k = weight.shape
    shape = (*x.shape[:-1], features)
    normalised, total = x.new_empty(shape), x.new_empty(shape)
    flat, weight = dense_last(x.reshape(-1, k)), dense_last(weight)
    added = dense_last(residual.expand(shape).reshape(-1, features))
    m = flat.shape[0]
    if not normalised.numel():
        return normalised, total
    problem = SplitProblem(m, features, k, x.dtype)
    config = config or chosen[x.device, problem] or default_on(x.device, problem)
    step = -(-k // config.splits // config.block_k) * config.block_k
    splits = -(-k // step)
    parts = x.new_empty((splits, m, features), dtype=torch.float32)
    pdl = dependent.dependent("split", x)
    launch = dependent.options(pdl)
    with on_device_of(x):
        product_kernel[(triton.cdiv(m, config.block_m) * triton.cdiv(features, config.block_n), splits)](
            flat, weight, parts, m, features, k, flat.stride(0), weight.stride(0), step, config.block_m, config.block_n,
            config.block_k, pdl, num_warps=config.warps, num_stages=config.stages, **launch,
        )  # fmt: skip
        block = triton.next_power_of_2(features)
        sum_and_norm_kernel[(m,)](
            parts, bias, added, norm_weight, norm_bias, normalised, total, m, features, added.stride(0), eps, splits, block,
            pdl, num_warps=max(1, min(block // 256, 16)), num_stages=1, **launch,
        )  # fmt: skip
    return normalised, total
