"""The kernels behind `accelkit.kernels.attention`: one program computes a block of queries of one head.

Scores stay in registers as float32 and in units of log2(e), so that a softmax weight is one exp2 (`scale` includes the factor).
Blocks of keys that lie wholly inside the sequence do no masking work; what is left over is one shorter block.

    BLOCK_M, BLOCK_N     queries of a program, keys of a step          TAIL     keys of the last, incomplete step, or 0
    WIDTH, BLOCK_D       head width, and rounded up to a power of two  MASK     "none", "boolean", "additive"
    BY_KEY               the mask is the same for all queries          PRECISION  of float32 products
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def rows_of(
    ptr, first, stride, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr
):
    """[BLOCK, BLOCK_D] from row `first` on; zeros beyond the width and, where BOUNDED, from row `count` on."""
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    if BOUNDED:
        within = (first + rows < count)[:, None]
        if WIDTH != BLOCK_D:
            within = within & (dims < WIDTH)[None, :]
        return tl.load(ptrs, mask=within, other=0.0)
    if WIDTH != BLOCK_D:
        return tl.load(ptrs, mask=(dims < WIDTH)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(ptr, block, first, stride, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    dims = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(first, tl.int64) * stride + rows[:, None] * stride + dims[None, :]
    tl.store(ptrs, block.to(ptr.dtype.element_ty), mask=(first + rows < count)[:, None] & (dims < WIDTH)[None, :])


@triton.jit
def scores_of(
    query,
    key,
    first_row,
    length,
    first_key,
    keys,
    mask_ptr,
    mask_row_stride,
    mask_key_stride,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N]; with a mask they are scaled, without one weights does that in the same instruction."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_key + tl.arange(0, BLOCK_N)
    if MASK != "none":
        if BY_KEY:
            ptrs = mask_ptr + columns.to(tl.int64) * mask_key_stride
            if BOUNDED:
                found = tl.load(ptrs, mask=columns < keys, other=0)
            else:
                found = tl.load(ptrs)
            found = found[None, :]
        else:
            ptrs = (
                mask_ptr
                + rows.to(tl.int64)[:, None] * mask_row_stride
                + columns.to(tl.int64)[None, :] * mask_key_stride
            )
            found = tl.load(ptrs, mask=(rows < length)[:, None] & (columns < keys)[None, :], other=0)
        scores *= scale
        if MASK == "boolean":
            scores = tl.where(found != 0, scores, NEGATIVE_INFINITY)
        else:
            # in the queries' dtype first, as the plain definition has it; the lowest number is not minus infinity
            added = found.to(query.dtype).to(tl.float32)
            scores += tl.where(added == NEGATIVE_INFINITY, added, tl.maximum(added * LOG2_E, LOWEST))
    if BOUNDED:
        scores = tl.where((columns < keys)[None, :], scores, NEGATIVE_INFINITY)
    if CAUSAL:
        scores = tl.where(columns[None, :] <= rows[:, None], scores, NEGATIVE_INFINITY)
    return scores


@triton.jit
def peak_of(scores, scale, MASK: tl.constexpr):
    peak = tl.max(scores, axis=1)
    if MASK == "none":
        peak *= scale
    return peak


@triton.jit
def anchor_of(peak, MASK: tl.constexpr):
    """What is subtracted before exp2: the peak, but 0 where every key so far is masked out."""
    if MASK == "none":
        return peak
    return tl.where(peak == NEGATIVE_INFINITY, 0.0, peak)


@triton.jit
def weights_of(scores, anchor, scale, MASK: tl.constexpr):
    if MASK == "none":
        return tl.exp2(scores * scale - anchor[:, None])
    return tl.exp2(scores - anchor[:, None])


@triton.jit
def finished(sums, total, MASK: tl.constexpr):
    """Weighted sums over their total; 0 where every key is masked out, as PyTorch has it."""
    if MASK == "none":
        return sums / total[:, None]
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _step(
    sums,
    peak,
    total,
    query,
    key,
    value,
    first_row,
    length,
    first_key,
    keys,
    mask_ptr,
    mask_row_stride,
    mask_key_stride,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys of the online softmax (arXiv 1805.02867, 2205.14135)."""
    scores = scores_of(
        query, key, first_row, length, first_key, keys, mask_ptr, mask_row_stride, mask_key_stride, scale,
        BLOCK_M, BLOCK_N, MASK, BY_KEY, CAUSAL, BOUNDED, PRECISION,
    )  # fmt: skip
    highest = tl.maximum(peak, peak_of(scores, scale, MASK))
    anchor = anchor_of(highest, MASK)
    weights = weights_of(scores, anchor, scale, MASK)
    shrink = tl.exp2(peak - anchor)
    total = total * shrink + tl.sum(weights, axis=1)
    sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
    return sums, highest, total


@triton.jit
def _attend(
    query,
    key_ptr,
    value_ptr,
    key_desc,
    value_desc,
    batch_idx,
    key_head_idx,
    first_row,
    length,
    keys,
    key_stride,
    value_stride,
    mask_ptr,
    mask_row_stride,
    mask_key_stride,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALISE: tl.constexpr,
):
    """The finished block [BLOCK_M, BLOCK_D]: what needs no bounds in one pipelined loop, the rest before or after it.

    TAIL_FIRST: there is exactly one incomplete step, and its loads wait together with those of the queries.
    """
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        whole = tl.minimum(whole, first_row // BLOCK_N * BLOCK_N)
    if TAIL_FIRST:
        last_key = rows_of(key_ptr, whole, key_stride, keys, TAIL, WIDTH, BLOCK_D, True)
        last_value = rows_of(value_ptr, whole, value_stride, keys, TAIL, WIDTH, BLOCK_D, True)
        sums, peak, total = _step(
            sums, peak, total, query, last_key, last_value, first_row, length, whole, keys,
            mask_ptr, mask_row_stride, mask_key_stride, scale,
            BLOCK_M, TAIL, MASK, BY_KEY, False, True, PRECISION,
        )  # fmt: skip
    for first_key in tl.range(0, whole, BLOCK_N, warp_specialize=SPECIALISE):
        if key_desc is not None:
            key = key_desc.load([batch_idx, key_head_idx, first_key, 0]).reshape(BLOCK_N, BLOCK_D)
            value = value_desc.load([batch_idx, key_head_idx, first_key, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            key = rows_of(key_ptr, first_key, key_stride, keys, BLOCK_N, WIDTH, BLOCK_D, False)
            value = rows_of(value_ptr, first_key, value_stride, keys, BLOCK_N, WIDTH, BLOCK_D, False)
        sums, peak, total = _step(
            sums, peak, total, query, key, value, first_row, length, first_key, keys,
            mask_ptr, mask_row_stride, mask_key_stride, scale,
            BLOCK_M, BLOCK_N, MASK, BY_KEY, False, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0 and not TAIL_FIRST:
        end = keys
        if CAUSAL:
            end = tl.minimum(keys, first_row + BLOCK_M)
        for first_key in tl.range(whole, end, TAIL, num_stages=1):
            key = rows_of(key_ptr, first_key, key_stride, keys, TAIL, WIDTH, BLOCK_D, True)
            value = rows_of(value_ptr, first_key, value_stride, keys, TAIL, WIDTH, BLOCK_D, True)
            sums, peak, total = _step(
                sums, peak, total, query, key, value, first_row, length, first_key, keys,
                mask_ptr, mask_row_stride, mask_key_stride, scale,
                BLOCK_M, TAIL, MASK, BY_KEY, CAUSAL, True, PRECISION,
            )  # fmt: skip
    return finished(sums, total, MASK)


@triton.jit
def placed(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    length,
    heads,
    group,
    query_batch_stride,
    query_head_stride,
    key_batch_stride,
    key_head_stride,
    value_batch_stride,
    value_head_stride,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Which block of which head this program computes, and the pointers moved there.

    Blocks of one head are neighbours in the grid: its keys and values come from DRAM once and then from L2.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    tile = tl.program_id(0)
    head = tile // tiles
    first_row = (tile - head * tiles) * BLOCK_M
    batch_idx = head // heads
    head_idx = head - batch_idx * heads
    key_head_idx = head_idx // group
    batch_offset = batch_idx.to(tl.int64)
    query_ptr += batch_offset * query_batch_stride + head_idx * query_head_stride
    key_ptr += batch_offset * key_batch_stride + key_head_idx * key_head_stride
    value_ptr += batch_offset * value_batch_stride + key_head_idx * value_head_stride
    out_ptr += batch_offset * length * heads * WIDTH + head_idx * WIDTH
    return batch_idx, head_idx, key_head_idx, first_row, query_ptr, key_ptr, value_ptr, out_ptr


@triton.jit
def dense_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_desc,
    value_desc,
    mask_ptr,
    out_ptr,
    length,
    keys,
    heads,
    group,
    scale,
    query_batch_stride,
    query_row_stride,
    query_head_stride,
    key_batch_stride,
    key_row_stride,
    key_head_stride,
    value_batch_stride,
    value_row_stride,
    value_head_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_key_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    SPECIALISE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: batch x heads x blocks of queries."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    batch_idx, head_idx, key_head_idx, first_row, query_ptr, key_ptr, value_ptr, out_ptr = placed(
        query_ptr, key_ptr, value_ptr, out_ptr, length, heads, group, query_batch_stride, query_head_stride,
        key_batch_stride, key_head_stride, value_batch_stride, value_head_stride, BLOCK_M, WIDTH,
    )  # fmt: skip
    if MASK != "none":
        mask_ptr += batch_idx.to(tl.int64) * mask_batch_stride + head_idx.to(tl.int64) * mask_head_stride
    query = rows_of(query_ptr, first_row, query_row_stride, length, BLOCK_M, WIDTH, BLOCK_D, True)
    result = _attend(
        query, key_ptr, value_ptr, key_desc, value_desc, batch_idx, key_head_idx, first_row, length, keys,
        key_row_stride, value_row_stride, mask_ptr, mask_row_stride, mask_key_stride, scale,
        BLOCK_M, BLOCK_N, TAIL, TAIL > 0 and not CAUSAL, WIDTH, BLOCK_D, MASK, BY_KEY, CAUSAL, PRECISION, SPECIALISE,
    )  # fmt: skip
    store_rows(out_ptr, result, first_row, heads * WIDTH, length, BLOCK_M, WIDTH, BLOCK_D)


@triton.jit
def variable_length_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    offsets_ptr,
    out_ptr,
    heads,
    group,
    scale,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (blocks of the longest sequence, heads, sequences); blocks beyond their sequence's end return at once."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    sequence = tl.program_id(2)
    start = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - start
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= length:
        return
    head_idx = tl.program_id(1)
    key_head_idx = head_idx // group
    start = start.to(tl.int64)
    query_ptr += start * query_row_stride + head_idx * query_head_stride
    key_ptr += start * key_row_stride + key_head_idx * key_head_stride
    value_ptr += start * value_row_stride + key_head_idx * value_head_stride
    out_ptr += start * heads * WIDTH + head_idx * WIDTH
    query = rows_of(query_ptr, first_row, query_row_stride, length, BLOCK_M, WIDTH, BLOCK_D, True)
    result = _attend(
        query, key_ptr, value_ptr, None, None, 0, 0, first_row, length, length,
        key_row_stride, value_row_stride, None, 0, 0, scale,
        BLOCK_M, BLOCK_N, TAIL, False, WIDTH, BLOCK_D, "none", True, CAUSAL, PRECISION, False,
    )  # fmt: skip
    store_rows(out_ptr, result, first_row, heads * WIDTH, length, BLOCK_M, WIDTH, BLOCK_D)
