"""The kernels behind `accelkit.kernels.norms`: one program normalises one row, or a few short ones.

Statistics are in float32 and taken in two passes over registers (the mean, then the mean square of what is centred):
the one-pass formula E[x^2] - E[x]^2 cancels where the mean is large. The sum is normalised before it is rounded.

    CENTRE        subtract the mean (layer normalisation), or not (RMS normalisation)
    ROWS, BLOCK   rows of a program; width rounded up to a power of two
    PDL           wait for the kernel before this one only here, so that its launch overlaps with that kernel's end
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def _scaled(result, weight_ptr, bias_ptr, columns, width):
    """result * weight + bias, either of which may be None."""
    within = columns < width
    if weight_ptr is not None:
        result *= tl.load(weight_ptr + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def _normalised(total, within, columns, width, weight_ptr, bias_ptr, eps, CENTRE: tl.constexpr):
    """Rows [ROWS, BLOCK] in float32, normalised; `within` is false beyond the width."""
    if CENTRE:
        mean = tl.sum(total, axis=1) / width
        total = tl.where(within, total - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(total * total, axis=1) / width + eps)
    return _scaled(total * inverse[:, None], weight_ptr, bias_ptr, columns, width)


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    normalised_ptr,
    total_ptr,
    rows_ptr,
    row_count,
    width,
    x_stride,
    residual_stride,
    eps,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    if rows_ptr is not None:
        row_count = tl.minimum(row_count, tl.load(rows_ptr))
    first = tl.program_id(0) * ROWS
    if first >= row_count:
        return
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    within = (rows < row_count)[:, None] & (columns < width)[None, :]
    rows = rows.to(tl.int64)[:, None]
    total = tl.load(x_ptr + rows * x_stride + columns[None, :], mask=within, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * residual_stride + columns[None, :]
        total += tl.load(residual_ptrs, mask=within, other=0.0).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr + rows * width + columns[None, :], total, mask=within)
    result = _normalised(total, within, columns, width, weight_ptr, bias_ptr, eps, CENTRE)
    tl.store(normalised_ptr + rows * width + columns[None, :], result, mask=within)


@triton.jit
def _summed(x_ptr, residual_ptr, columns, width):
    total = tl.load(x_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return total


@triton.jit
def wide_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    normalised_ptr,
    total_ptr,
    rows_ptr,
    row_count,
    width,
    x_stride,
    residual_stride,
    eps,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row that does not fit in registers: read three times, the last two from the cache. ROWS is 1."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS
    if rows_ptr is not None:  # noqa: SIM102 - decided when the kernel is compiled, the second when it runs
        if row >= tl.load(rows_ptr):
            return
    x_ptr += row * x_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    block = tl.arange(0, BLOCK)
    mean = 0.0
    if CENTRE:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            sums += _summed(x_ptr, residual_ptr, start + block, width)
        mean = tl.sum(sums, axis=0) / width
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + block
        centred = tl.where(columns < width, _summed(x_ptr, residual_ptr, columns, width) - mean, 0.0)
        squares += centred * centred
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    for start in range(0, width, BLOCK):
        columns = start + block
        total = _summed(x_ptr, residual_ptr, columns, width)
        if total_ptr is not None:
            tl.store(total_ptr + row * width + columns, total, mask=columns < width)
        result = _scaled(((total - mean) * inverse)[None, :], weight_ptr, bias_ptr, columns, width)
        tl.store(normalised_ptr + row * width + columns[None, :], result, mask=(columns < width)[None, :])


@triton.jit
def _looked_up(index_ptr, table_ptr, places, outer_stride, inner_stride, table_stride, entries, inner, columns, within):
    """The rows of a table [ROWS, BLOCK]; NaN where an index is out of range, for PyTorch would stop there."""
    outer_idx = places // inner
    index_ptrs = index_ptr + outer_idx * outer_stride + (places - outer_idx * inner) * inner_stride
    index = tl.load(index_ptrs, mask=tl.sum(within.to(tl.int32), axis=1) > 0, other=0).to(tl.int64)
    known = (index >= 0) & (index < entries)
    found = tl.load(
        table_ptr + index[:, None] * table_stride + columns[None, :], mask=within & known[:, None], other=0.0
    ).to(tl.float32)
    return tl.where(known[:, None] | (~within), found, float("nan"))


@triton.jit
def embedding_kernel(
    index_0_ptr,
    index_1_ptr,
    index_2_ptr,
    table_0_ptr,
    table_1_ptr,
    table_2_ptr,
    weight_ptr,
    bias_ptr,
    normalised_ptr,
    row_count,
    inner,
    width,
    outer_0_stride,
    inner_0_stride,
    outer_1_stride,
    inner_1_stride,
    outer_2_stride,
    inner_2_stride,
    table_0_stride,
    table_1_stride,
    table_2_stride,
    entries_0,
    entries_1,
    entries_2,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Place p of the result is (p // inner, p % inner) of each index tensor, whose strides may be 0."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    within = (places < row_count)[:, None] & (columns < width)[None, :]
    total = _looked_up(
        index_0_ptr,
        table_0_ptr,
        places,
        outer_0_stride,
        inner_0_stride,
        table_0_stride,
        entries_0,
        inner,
        columns,
        within,
    )
    if index_1_ptr is not None:
        total += _looked_up(
            index_1_ptr,
            table_1_ptr,
            places,
            outer_1_stride,
            inner_1_stride,
            table_1_stride,
            entries_1,
            inner,
            columns,
            within,
        )
    if index_2_ptr is not None:
        total += _looked_up(
            index_2_ptr,
            table_2_ptr,
            places,
            outer_2_stride,
            inner_2_stride,
            table_2_stride,
            entries_2,
            inner,
            columns,
            within,
        )
    result = _normalised(total, within, columns, width, weight_ptr, bias_ptr, eps, True)
    tl.store(normalised_ptr + places[:, None] * width + columns[None, :], result, mask=within)
