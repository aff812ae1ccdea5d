"""activation(x W^T + bias) + residual in portable Triton: any GPU, any sizes and strides, small batches above all.

One program a tile of the result, tiles in groups of rows so that neighbours share what is in the L2 cache. Few rows leave
most of a GPU idle with large tiles: the candidates go down to 16 x 64, and K can be split between programs that add up their
parts in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from accelkit.kernels import dependent


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation on float32. Exact GELU: erf by formula 7.1.26 of Abramowitz and Stegun, absolute error 1.5e-7."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp2(x * -1.4426950408889634))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
        u = x * (1.5957691216057308 + 0.07135481282552 * x * x)
        x = x / (1.0 + tl.exp2(u * -1.4426950408889634))
    elif ACTIVATION == "gelu":
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
        tail = 0.5 * x * p * tl.exp2(z * z * -1.4426950408889634)  # x * (1 - erf(z)) / 2
        x = tl.where(x > 0, x - tail, tail)
    return x


@triton.jit
def linear_tiles_kernel(
    x_ptr, w_ptr, out_ptr, bias_ptr, residual_ptr, rows_ptr, M, N, K, x_stride, w_stride, out_stride, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + tile % (GROUP * tiles_n) % height
    tile_n = tile % (GROUP * tiles_n) // height
    if HAS_ROWS:
        if tile_m * BLOCK_M >= tl.load(rows_ptr):
            return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride + k[None, :]
    w_ptrs = w_ptr + (n % N).to(tl.int64)[None, :] * w_stride + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(
            residual_ptr + m.to(tl.int64)[:, None] * residual_stride + n[None, :], mask=inside, other=0.0
        ).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    tile: tuple[int, int, int] = (64, 64, 64),
    warps: int = 4,
    stages: int = 4,
) -> torch.Tensor:
    """x [rows, width] and weight [features, width] of any row stride, contiguous in the last dimension."""
    m, k = x.shape
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k = tile
    pdl = dependent.dependent("tiles", x)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)
    linear_tiles_kernel[grid](
        x, weight, out, bias if bias is not None else x, residual if residual is not None else x,
        rows if rows is not None else x, m, n, k, x.stride(0), weight.stride(0), out.stride(0),
        residual.stride(0) if residual is not None else 0, block_m, block_n, block_k, 8, k % block_k == 0,
        rows is not None, bias is not None, residual is not None, activation,
        pdl, num_warps=warps, num_stages=stages, **dependent.options(pdl),
    )  # fmt: skip
    return out
