"""activation(norm(x) W^T + bias) + residual on Hopper's own instructions: TMA loads, wgmma, one producer warp, two consumers.

A persistent grid, one program a multiprocessor. The producer warp fills a ring of shared-memory stages; two warpgroups
take turns at the tensor cores: while one multiplies, the other turns its accumulator into results (normalisation, bias,
activation, residual, statistics, cast, store). cuBLAS pays for its epilogue: with K = 768 it is a sixth of a tile's time.

The layer norm before a linear layer costs no pass over memory (see `accelkit.ops.folded_linear`): W is folded with the
norm's weight ahead of time, the kernel multiplies the raw x, and the epilogue subtracts mean * column sum and divides by the
deviation. The statistics come from the kernel that wrote x, in groups of 64 columns, as (mean, sum of squared differences).
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda

from accelkit.kernels import dependent

BLOCK_K = gl.constexpr(64)  # 128 bytes of fp16, the widest swizzle
GROUP = gl.constexpr(64)  # columns that share one pair of statistics, and that the epilogue works on at a time


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def activate(x, ACTIVATION: gl.constexpr):
    """The activation on float32, for results of 16 bits.

    Exact GELU as max(x, 0) - |x| Q(|x|), Q the normal distribution's tail: exp(-x^2 / 2) times a polynomial in 1 / (1 + p |x|),
    the form of Abramowitz and Stegun's 7.1.25 with coefficients fitted to |x| Q: absolute error 1.5e-6, and relative error
    4.6e-4 far out where x is negative, where float16's own rounding is 4.9e-4.
    """
    if ACTIVATION == "relu":
        x = gl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * _reciprocal(1.0 + _exp2(x * -1.4426950408889634))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)), exponent in powers of 2
        u = x * (-2.302208198014325 - 0.1029432375577375 * x * x)
        x = x * _reciprocal(1.0 + _exp2(u))
    elif ACTIVATION == "gelu":
        z = gl.abs(x)
        t = _reciprocal(1.0 + 0.2825 * z)
        p = (((0.308863840061162 * t - 0.10239616436987635) * t + 0.19186532242601806) * t + 0.10170986721468875) * t
        x = gl.maximum(x, 0.0) - z * p * _exp2(x * x * -0.7213475204444817)
    return x


@gluon.jit
def _rows_and_tiles(rows_ptr, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HAS_ROWS: gl.constexpr):
    if HAS_ROWS:
        M = gl.minimum(M, gl.load(rows_ptr))
    return M, gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)


@gluon.jit
def _moments(moments_ptr, m, M):
    mean = gl.load(moments_ptr + m * 2, mask=m < M, other=0.0)
    scale = gl.load(moments_ptr + m * 2 + 1, mask=m < M, other=0.0)
    return mean, scale


@gluon.jit
def columns_of(pointer, column, N, layout: gl.constexpr):
    n = column + gl.arange(0, GROUP, layout=gl.SliceLayout(0, layout))
    return gl.load(pointer + n, mask=n < N, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _both(pointer, column, N, layout: gl.constexpr, HALVES: gl.constexpr):
    if HALVES == 2:
        both = (columns_of(pointer, column, N, layout), columns_of(pointer, column + GROUP, N, layout))
    else:
        both = (columns_of(pointer, column, N, layout),)  # type: ignore[assignment]
    return both


@gluon.jit
def halves_of(acc, BLOCK_M: gl.constexpr, HALVES: gl.constexpr):
    if HALVES == 2:
        halves = acc.reshape((BLOCK_M, 2, GROUP)).permute((0, 2, 1)).split()
    else:
        halves = (acc,)
    return halves


@gluon.jit
def rows_of(vector, layout: gl.constexpr):
    return gl.convert_layout(vector, gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def _producer(x_desc, w_desc, rows_ptr, x_ring, w_ring, ready, empty, M, N, K, BLOCK_M: gl.constexpr,
              BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_ROWS: gl.constexpr, PDL: gl.constexpr,
              EARLY: gl.constexpr):  # fmt: skip
    columns = gl.cdiv(N, BLOCK_N)
    early = 0  # stages whose part of W is on its way already
    if EARLY:
        early = gl.minimum(gl.cdiv(K, BLOCK_K), STAGES)
        for stage in range(early):
            full = ready.index(stage)
            mbarrier.expect(full, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            column = gl.program_id(0) % columns * BLOCK_N
            tma.async_copy_global_to_shared(w_desc, [column, stage * BLOCK_K], full, w_ring.index(stage))
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    M, tiles = _rows_and_tiles(rows_ptr, M, N, BLOCK_M, BLOCK_N, HAS_ROWS)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile // columns * BLOCK_M
        column = tile % columns * BLOCK_N
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            full = ready.index(stage)
            mbarrier.expect(full, x_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=step >= early)
            tma.async_copy_global_to_shared(x_desc, [row, k], full, x_ring.index(stage))
            tma.async_copy_global_to_shared(w_desc, [column, k], full, w_ring.index(stage), pred=step >= early)
            step += 1


@gluon.jit
def _consumer(me: gl.constexpr, x_desc, out_desc, residual_desc, rows_ptr, bias_ptr, moments_ptr, column_sums_ptr,
              residual_moments_ptr, residual_weight_ptr, residual_bias_ptr, statistics_ptr, x_ring, w_ring, out_buffers, ready,
              empty, turn, residual_ready, M, N, K, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
              HAS_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_MOMENTS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
              HAS_RESIDUAL_MOMENTS: gl.constexpr, STATISTICS: gl.constexpr, ACTIVATION: gl.constexpr,
              PDL: gl.constexpr):  # fmt: skip
    if PDL:
        cuda.gdc_wait()
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    HALVES: gl.constexpr = BLOCK_N // GROUP
    M, tiles = _rows_and_tiles(rows_ptr, M, N, BLOCK_M, BLOCK_N, HAS_ROWS)
    columns = gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(K, BLOCK_K)
    dtype: gl.constexpr = x_desc.dtype
    step = me * steps  # every second tile of this program is mine, and the ring's steps with it
    mine = 0  # tiles that I have done
    acc = gl.zeros((BLOCK_M, BLOCK_N), dtype=gl.float32, layout=ACC)
    layout: gl.constexpr = halves_of(acc, BLOCK_M, HALVES)[0].type.layout
    for tile in range(gl.program_id(0) + me * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        row = tile // columns * BLOCK_M
        column = tile % columns * BLOCK_N
        if HAS_RESIDUAL:
            tma.store_wait(pendings=0)  # the tile before has left the buffer: the residual may come into it
            mbarrier.expect(residual_ready.index(me), HALVES * residual_desc.block_type.nbytes)
            for half in gl.static_range(HALVES):
                tma.async_copy_global_to_shared(
                    residual_desc,
                    [row, column + half * GROUP],
                    residual_ready.index(me),
                    out_buffers.index(HALVES * me + half),
                )
        # Loaded now, used in the epilogue: the products hide the wait.
        m = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, ACC))
        if HAS_MOMENTS:
            mean, scale = _moments(moments_ptr, m, M)
        if HAS_RESIDUAL_MOMENTS:
            r_mean, r_scale = _moments(residual_moments_ptr, m, M)
        if HAS_BIAS and not HAS_RESIDUAL:  # beside a residual there are no registers left for it
            biases = _both(bias_ptr, column, N, layout, HALVES)
        if HAS_MOMENTS:
            sums = _both(column_sums_ptr, column, N, layout, HALVES)
        # A barrier tells two rounds of the ring apart, no more: I may not wait for a stage while the other is still rounds
        # behind it. The tensor cores are one's at a time anyway.
        mbarrier.wait(turn.index(me), (mine & 1) ^ (1 - me))
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            w = w_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_ring.index(stage), w, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            # the product before this one is done: its stage is free
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - me), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        step += steps

        # 64 columns at a time, so that their temporaries fit beside the rest of the accumulator.
        halves = halves_of(acc, BLOCK_M, HALVES)
        if HAS_RESIDUAL:
            mbarrier.wait(residual_ready.index(me), mine & 1)
        for half in gl.static_range(HALVES):
            y = halves[half]
            left = column + half * GROUP
            out = out_buffers.index(HALVES * me + half)
            if HAS_MOMENTS:
                y = (y - rows_of(mean, layout) * sums[half]) * rows_of(scale, layout)
            if HAS_BIAS and HAS_RESIDUAL:
                y = y + columns_of(bias_ptr, left, N, layout)
            if HAS_BIAS and not HAS_RESIDUAL:
                y = y + biases[half]
            y = activate(y, ACTIVATION)
            if HAS_RESIDUAL:
                residual = out.load(layout).to(gl.float32)
                if HAS_RESIDUAL_MOMENTS:
                    residual = (residual - rows_of(r_mean, layout)) * rows_of(r_scale, layout)
                    residual = residual * columns_of(residual_weight_ptr, left, N, layout)
                    residual = residual + columns_of(residual_bias_ptr, left, N, layout)
                y = y + residual
            if STATISTICS:
                # One pass: 16-bit values cannot lie so close together, for their size, that fp32 sums would lose the difference.
                total = gl.sum(y, 1)
                squares = gl.maximum(gl.sum(y * y, 1) - total * total / GROUP, 0.0)
                i = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
                where = (i * (N // GROUP) + left // GROUP) * 2
                inside = (i < M) & (left < N)
                gl.store(statistics_ptr + where, total / GROUP, mask=inside)
                gl.store(statistics_ptr + where + 1, squares, mask=inside)
            if not HAS_RESIDUAL:
                tma.store_wait(pendings=HALVES - 1)  # of the tile before: this half of the buffer is free again
            out.store(y.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, left], out)
        mine += 1
    tma.store_wait(pendings=0)


@gluon.jit
def linear_kernel(x_desc, w_desc, out_desc, residual_desc, rows_ptr, bias_ptr, moments_ptr, column_sums_ptr,
                  residual_moments_ptr, residual_weight_ptr, residual_bias_ptr, statistics_ptr, M, N, K,
                  BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_ROWS: gl.constexpr,
                  HAS_BIAS: gl.constexpr, HAS_MOMENTS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
                  HAS_RESIDUAL_MOMENTS: gl.constexpr, STATISTICS: gl.constexpr, ACTIVATION: gl.constexpr,
                  PDL: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    out_buffers = gl.allocate_shared_memory(dtype, [2 * BLOCK_N // GROUP, BLOCK_M, GROUP], out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    residual_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for me in gl.static_range(2):
        mbarrier.init(turn.index(me), count=1)
        mbarrier.init(residual_ready.index(me), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (_consumer, (0, x_desc, out_desc, residual_desc, rows_ptr, bias_ptr, moments_ptr, column_sums_ptr,
                         residual_moments_ptr, residual_weight_ptr, residual_bias_ptr, statistics_ptr, x_ring, w_ring,
                         out_buffers, ready, empty, turn, residual_ready, M, N, K, BLOCK_M, BLOCK_N, STAGES, HAS_ROWS,
                         HAS_BIAS, HAS_MOMENTS, HAS_RESIDUAL, HAS_RESIDUAL_MOMENTS, STATISTICS, ACTIVATION, PDL)),
            (_consumer, (1, x_desc, out_desc, residual_desc, rows_ptr, bias_ptr, moments_ptr, column_sums_ptr,
                         residual_moments_ptr, residual_weight_ptr, residual_bias_ptr, statistics_ptr, x_ring, w_ring,
                         out_buffers, ready, empty, turn, residual_ready, M, N, K, BLOCK_M, BLOCK_N, STAGES, HAS_ROWS,
                         HAS_BIAS, HAS_MOMENTS, HAS_RESIDUAL, HAS_RESIDUAL_MOMENTS, STATISTICS, ACTIVATION, PDL)),
            (_producer, (x_desc, w_desc, rows_ptr, x_ring, w_ring, ready, empty, M, N, K, BLOCK_M, BLOCK_N, STAGES,
                         HAS_ROWS, PDL, EARLY)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@functools.cache
def layout_of(rows: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, 64], gl.float16 if dtype is torch.float16 else gl.bfloat16)


@functools.cache
def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    *,
    moments: torch.Tensor | None = None,
    column_sums: torch.Tensor | None = None,
    residual_moments: torch.Tensor | None = None,
    residual_weight: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
    statistics: bool = False,
    tile: tuple[int, int] = (128, 128),
    stages: int = 5,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(result [rows, features], its statistics [rows, features / 64, 2] or None).

    Args:
        x: [rows, width], float16 or bfloat16; its rows 16-byte aligned, its last dimension contiguous. weight: [features,
            width] likewise, of the same dtype; features a multiple of 8, of 64 where statistics are asked for.
        bias, column_sums: [features], any floating-point dtype. residual: [rows, features] of x's dtype.
        moments, residual_moments: [rows, 2], float32, mean and reciprocal deviation: x (the residual) is normalised on the
            way in; the residual's affine part, residual_weight and residual_bias, follows.
        tile: rows and columns of a warpgroup's tile, 64 or 128 each. stages: 64-wide steps of K in flight.
    """
    m, k = x.shape
    n = weight.shape[0]
    block_m, block_n = tile
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    x_desc = TensorDescriptor.from_tensor(x, [block_m, 64], layout_of(block_m, x.dtype))
    w_desc = TensorDescriptor.from_tensor(weight, [block_n, 64], layout_of(block_n, x.dtype))
    out_desc = TensorDescriptor.from_tensor(out, [block_m, 64], layout_of(block_m, x.dtype))
    residual_desc = (
        out_desc
        if residual is None
        else TensorDescriptor.from_tensor(residual, [block_m, 64], layout_of(block_m, x.dtype))
    )
    groups = x.new_empty((m, n // 64, 2), dtype=torch.float32) if statistics else None
    pdl = dependent.dependent("hopper", x)
    early = pdl and rows is None and dependent.is_constant(weight)  # counted rows may leave a program without a tile
    grid = (min(processors_of(x.device), -(-m // block_m) * -(-n // block_n)),)
    optional = (rows, bias, moments, column_sums, residual_moments, residual_weight, residual_bias, groups)
    linear_kernel[grid](
        x_desc, w_desc, out_desc, residual_desc, *(or_unused(t, x) for t in optional), m, n, k, block_m, block_n, stages,
        rows is not None, bias is not None, moments is not None, residual is not None, residual_moments is not None,
        statistics, activation, pdl, early, num_warps=4, maxnreg=168, **dependent.options(pdl),
    )  # fmt: skip
    return out, groups


def or_unused(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    return unused if tensor is None else tensor
