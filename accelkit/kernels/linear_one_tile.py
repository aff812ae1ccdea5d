"""activation(norm(x) W^T + bias) + residual for few rows on Hopper: one tile a program, all of whose warps work on it.

Where all tiles run at once there is no other tile behind whose products an epilogue could hide (`linear_hopper`), and what
counts is how soon the first product starts and how soon the last result is out. So a tile is shared by up to two warpgroups,
which halves its epilogue; the first stages of W come in before the kernel before has ended (`dependent`); and a program takes
so little of a multiprocessor that the next kernel's can move in beside it.

Layer norm comes folded, as in `linear_hopper`, but its row moments are put together here, from statistics loaded while the
tensor cores work: a kernel of its own for that takes longer than the rows do.

    parts[split] = x[:, k0:k1] W[:, k0:k1]^T      with K split between programs, float32; `split` adds them up
"""

from __future__ import annotations

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
from accelkit.kernels.linear_hopper import (
    BLOCK_K,
    GROUP,
    activate,
    columns_of,
    halves_of,
    layout_of,
    or_unused,
    rows_of,
)


@gluon.jit
def _statistics(pointer, row, M, GROUPS: gl.constexpr, BLOCK_M: gl.constexpr, WARPS: gl.constexpr):
    """[BLOCK_M, numbers]: each row's pairs, one after another; zeros beyond the last group."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    m = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, 32 if GROUPS <= 16 else 128, layout=gl.SliceLayout(0, layout))
    inside = (m < M)[:, None] & (c < 2 * GROUPS)[None, :]
    return gl.load(pointer + m[:, None] * (2 * GROUPS) + c[None, :], mask=inside, other=0.0)


@gluon.jit
def _moments(pairs, eps, GROUPS: gl.constexpr, GROUP: gl.constexpr, layout: gl.constexpr):
    """Mean and reciprocal deviation of each row, for rows of a tile in `layout` (as `moments.row_moments_kernel`)."""
    means, squares = pairs.reshape((pairs.shape[0], pairs.shape[1] // 2, 2)).split()
    g = gl.arange(0, means.shape[1], layout=gl.SliceLayout(0, means.type.layout))
    mean = gl.sum(means, 1) / GROUPS
    away = gl.where((g < GROUPS)[None, :], means - mean[:, None], 0.0)
    variance = (gl.sum(squares, 1) + gl.sum(away * away, 1) * GROUP) / (GROUPS * GROUP)
    return rows_of(mean, layout), rows_of(gl.rsqrt(variance + eps), layout)


@gluon.jit
def _residual(pointer, row, column, M, N, stride, BLOCK_M: gl.constexpr, layout: gl.constexpr):
    m = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    n = column + gl.arange(0, GROUP, layout=gl.SliceLayout(0, layout))
    inside = (m < M)[:, None] & (n < N)[None, :]
    return gl.load(pointer + m[:, None] * stride + n[None, :], mask=inside, other=0.0)


@gluon.jit
def _producer(x_desc, w_desc, x_ring, w_ring, ready, empty, row, column, first, steps, STAGES: gl.constexpr,
              PDL: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    nbytes: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    if PDL and not EARLY:
        cuda.gdc_wait()
    for stage in gl.static_range(STAGES):
        full = ready.index(stage)
        mbarrier.expect(full, nbytes, pred=stage < steps)
        k = first + stage * BLOCK_K
        tma.async_copy_global_to_shared(w_desc, [column, k], full, w_ring.index(stage), pred=stage < steps)
    if PDL and EARLY:
        cuda.gdc_wait()
    for stage in gl.static_range(STAGES):
        k = first + stage * BLOCK_K
        tma.async_copy_global_to_shared(x_desc, [row, k], ready.index(stage), x_ring.index(stage), pred=stage < steps)
    if PDL:
        cuda.gdc_launch_dependents()
    for step in range(STAGES, steps):
        free = step % STAGES
        mbarrier.wait(empty.index(free), (step // STAGES & 1) ^ 1)
        full = ready.index(free)
        mbarrier.expect(full, nbytes)
        tma.async_copy_global_to_shared(x_desc, [row, first + step * BLOCK_K], full, x_ring.index(free))
        tma.async_copy_global_to_shared(w_desc, [column, first + step * BLOCK_K], full, w_ring.index(free))


@gluon.jit
def _consumer(out_desc, bias_ptr, x_statistics_ptr, column_sums_ptr, residual_ptr, residual_statistics_ptr,
              residual_weight_ptr, residual_bias_ptr, statistics_ptr, parts_ptr, x_ring, w_ring, ready, empty, row, column,
              steps, M, N, residual_stride, x_eps, residual_eps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
              STAGES: gl.constexpr, PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, X_GROUPS: gl.constexpr,
              HAS_RESIDUAL: gl.constexpr, RESIDUAL_GROUPS: gl.constexpr, STATISTICS: gl.constexpr,
              ACTIVATION: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = BLOCK_M // 16
    HALVES: gl.constexpr = BLOCK_N // GROUP
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_N, 16]
    )
    acc = gl.zeros((BLOCK_M, BLOCK_N), dtype=gl.float32, layout=ACC)
    layout: gl.constexpr = halves_of(acc, BLOCK_M, HALVES)[0].type.layout
    if PDL:
        cuda.gdc_wait()
    # Loaded now, used in the epilogue: the products hide the wait.
    if X_GROUPS > 0:
        x_pairs = _statistics(x_statistics_ptr, row, M, X_GROUPS, BLOCK_M, WARPS)
    if RESIDUAL_GROUPS > 0:
        residual_pairs = _statistics(residual_statistics_ptr, row, M, RESIDUAL_GROUPS, BLOCK_M, WARPS)
    if HAS_RESIDUAL:
        residual = (_residual(residual_ptr, row, column, M, N, residual_stride, BLOCK_M, layout),)
        if HALVES == 2:
            other = _residual(residual_ptr, row, column + GROUP, M, N, residual_stride, BLOCK_M, layout)
            residual = (residual[0], other)  # type: ignore[assignment]
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
        w = w_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(x_ring.index(stage), w, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        # the product before this one is done: its stage is free
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    halves = halves_of(acc, BLOCK_M, HALVES)
    m = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    if PARTS:
        for half in gl.static_range(HALVES):
            n = column + half * GROUP + gl.arange(0, GROUP, layout=gl.SliceLayout(0, layout))
            where = (gl.program_id(1) * M + m)[:, None] * N + n[None, :]
            gl.store(parts_ptr + where, halves[half], mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        if X_GROUPS > 0:
            mean, scale = _moments(x_pairs, x_eps, X_GROUPS, GROUP, layout)
        if RESIDUAL_GROUPS > 0:
            r_mean, r_scale = _moments(residual_pairs, residual_eps, RESIDUAL_GROUPS, GROUP, layout)
        for half in gl.static_range(HALVES):
            y = halves[half]
            left = column + half * GROUP
            if X_GROUPS > 0:
                y = (y - mean * columns_of(column_sums_ptr, left, N, layout)) * scale
            if HAS_BIAS:
                y = y + columns_of(bias_ptr, left, N, layout)
            y = activate(y, ACTIVATION)
            if HAS_RESIDUAL:
                added = residual[half].to(gl.float32)
                if RESIDUAL_GROUPS > 0:
                    added = (added - r_mean) * r_scale * columns_of(residual_weight_ptr, left, N, layout)
                    added = added + columns_of(residual_bias_ptr, left, N, layout)
                y = y + added
            if STATISTICS:
                # One pass: 16-bit values cannot lie so close together, for their size, that fp32 sums would lose the difference.
                total = gl.sum(y, 1)
                squares = gl.maximum(gl.sum(y * y, 1) - total * total / GROUP, 0.0)
                where = (m * (N // GROUP) + left // GROUP) * 2
                inside = (m < M) & (left < N)
                gl.store(statistics_ptr + where, total / GROUP, mask=inside)
                gl.store(statistics_ptr + where + 1, squares, mask=inside)
            x_ring.index(half).store(y.to(out_desc.dtype))  # every load into the ring has been waited for
        fence_async_shared()
        for half in gl.static_range(HALVES):
            tma.async_copy_shared_to_global(out_desc, [row, column + half * GROUP], x_ring.index(half))
        tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["M", "SPLIT_K"])
def one_tile_kernel(x_desc, w_desc, out_desc, bias_ptr, x_statistics_ptr, column_sums_ptr, residual_ptr,
                    residual_statistics_ptr, residual_weight_ptr, residual_bias_ptr, statistics_ptr, parts_ptr, M, N, K,
                    SPLIT_K, residual_stride, x_eps, residual_eps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                    STAGES: gl.constexpr, PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, X_GROUPS: gl.constexpr,
                    HAS_RESIDUAL: gl.constexpr, RESIDUAL_GROUPS: gl.constexpr, STATISTICS: gl.constexpr,
                    ACTIVATION: gl.constexpr, PDL: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    height = gl.cdiv(M, BLOCK_M)  # neighbours share W's tile, which comes from memory; x lies in the L2 cache
    row = gl.program_id(0) % height * BLOCK_M
    column = gl.program_id(0) // height * BLOCK_N
    first = gl.program_id(1) * SPLIT_K
    steps = gl.cdiv(gl.minimum(K - first, SPLIT_K), BLOCK_K)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (_consumer, (out_desc, bias_ptr, x_statistics_ptr, column_sums_ptr, residual_ptr, residual_statistics_ptr,
                         residual_weight_ptr, residual_bias_ptr, statistics_ptr, parts_ptr, x_ring, w_ring, ready, empty,
                         row, column, steps, M, N, residual_stride, x_eps, residual_eps, BLOCK_M, BLOCK_N, STAGES, PARTS,
                         HAS_BIAS, X_GROUPS, HAS_RESIDUAL, RESIDUAL_GROUPS, STATISTICS, ACTIVATION, PDL)),
            (_producer, (x_desc, w_desc, x_ring, w_ring, ready, empty, row, column, first, steps, STAGES, PDL, EARLY)),
        ],
        [1],
        [24],
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    *,
    x_statistics: torch.Tensor | None = None,
    x_eps: float = 0.0,
    column_sums: torch.Tensor | None = None,
    residual_statistics: torch.Tensor | None = None,
    residual_eps: float = 0.0,
    residual_weight: torch.Tensor | None = None,
    residual_bias: torch.Tensor | None = None,
    statistics: bool = False,
    tile: tuple[int, int] = (64, 64),
    stages: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(result [rows, features], its statistics [rows, features / 64, 2] or None).

    Args:
        x, weight, bias, activation, residual, column_sums, residual_weight, residual_bias, statistics: as in
            `linear_hopper.linear`.
        x_statistics, residual_statistics: [rows, groups, 2], float32, contiguous, of a kernel that was asked for them: x (the
            residual) is normalised on the way in, with x_eps (residual_eps) added to the variance; 4096 columns at most.
        tile: rows and columns of a program's tile, 64 or 128 each.
        stages: 64-wide steps of K in flight; by default as many as leave room for a second program on a multiprocessor.
    """
    m, n = x.shape[0], weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    groups = x.new_empty((m, n // 64, 2), dtype=torch.float32) if statistics else None
    _launch(
        x, weight, out, (bias, x_statistics, column_sums, residual, residual_statistics, residual_weight, residual_bias, groups),
        None, x_eps, residual_eps, x.shape[1], 1, activation, tile, stages,
    )  # fmt: skip
    return out, groups


def parts(
    x: torch.Tensor, weight: torch.Tensor, splits: int, tile: tuple[int, int] = (128, 128), stages: int | None = None
) -> torch.Tensor:
    """[splits, rows, features], float32: the products of at most `splits` equal parts of K."""
    m, k = x.shape
    step = -(-k // splits // 64) * 64
    splits = -(-k // step)
    found = x.new_empty((splits, m, weight.shape[0]), dtype=torch.float32)
    _launch(x, weight, None, (None,) * 8, found, 0.0, 0.0, step, splits, "none", tile, stages)
    return found


def _launch(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None, optional: tuple[torch.Tensor | None, ...],
    found: torch.Tensor | None, x_eps: float, residual_eps: float, step: int, splits: int, activation: str,
    tile: tuple[int, int], stages: int | None,
) -> None:  # fmt: skip
    (m, k), n = x.shape, weight.shape[0]
    block_m, block_n = tile
    bias, x_statistics, _, residual, residual_statistics, _, _, statistics = optional
    x_desc = TensorDescriptor.from_tensor(x, [block_m, 64], layout_of(block_m, x.dtype))
    w_desc = TensorDescriptor.from_tensor(weight, [block_n, 64], layout_of(block_n, x.dtype))
    out_desc = x_desc if out is None else TensorDescriptor.from_tensor(out, [block_m, 64], layout_of(block_m, x.dtype))
    pdl = dependent.dependent("one_tile", x)
    one_tile_kernel[(-(-m // block_m) * -(-n // block_n), splits)](
        x_desc, w_desc, out_desc, *(or_unused(t, x) for t in optional), or_unused(found, x), m, n, k, step,
        0 if residual is None else residual.stride(0), x_eps, residual_eps, block_m, block_n,
        stages or default_stages(tile), found is not None, bias is not None, 0 if x_statistics is None else x_statistics.shape[1],
        residual is not None, 0 if residual_statistics is None else residual_statistics.shape[1], statistics is not None,
        activation, pdl, pdl and dependent.is_constant(weight), num_warps=block_m // 16,
        # few, so that another program fits beside this one; products 128 columns wide do not compile with fewer
        maxnreg=80 if block_n == 64 else 96, **dependent.options(pdl),
    )  # fmt: skip


def default_stages(tile: tuple[int, int]) -> int:
    """Stages of 64 columns of K that fill 96 KiB: two programs, of this kernel and the next, share a multiprocessor."""
    return 96 * 1024 // ((tile[0] + tile[1]) * 128)
