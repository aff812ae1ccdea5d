"""The kernel for sequences so short that all scores of a block of queries fit in registers: an ordinary softmax.

    keys = FIRST + SECOND + THIRD     197 = 128 + 64 + 5 of 16: powers of two, little of them beyond the end

The online softmax of `attention_kernels` would rescale its sums after each block and wait for each block's peak.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from accelkit.kernels.attention_kernels import (
    anchor_of,
    finished,
    peak_of,
    placed,
    rows_of,
    scores_of,
    store_rows,
    weights_of,
)


@triton.jit
def one_pass_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
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
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
    BY_KEY: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """All keys of a head at once, in up to three blocks FIRST + SECOND + THIRD (197 = 128 + 64 + 5 of 16): an ordinary softmax.

    WHOLE: the last block is complete. Only the last one may be incomplete.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    batch_idx, head_idx, _, first_row, query_ptr, key_ptr, value_ptr, out_ptr = placed(
        query_ptr, key_ptr, value_ptr, out_ptr, length, heads, group, query_batch_stride, query_head_stride,
        key_batch_stride, key_head_stride, value_batch_stride, value_head_stride, BLOCK_M, WIDTH,
    )  # fmt: skip
    if MASK != "none":
        mask_ptr += batch_idx.to(tl.int64) * mask_batch_stride + head_idx.to(tl.int64) * mask_head_stride
    query = rows_of(query_ptr, first_row, query_row_stride, length, BLOCK_M, WIDTH, BLOCK_D, True)
    key = rows_of(key_ptr, 0, key_row_stride, keys, FIRST, WIDTH, BLOCK_D, SECOND == 0 and not WHOLE)
    value = rows_of(value_ptr, 0, value_row_stride, keys, FIRST, WIDTH, BLOCK_D, SECOND == 0 and not WHOLE)
    scores = scores_of(
        query, key, first_row, length, 0, keys, mask_ptr, mask_row_stride, mask_key_stride, scale,
        BLOCK_M, FIRST, MASK, BY_KEY, CAUSAL, SECOND == 0 and not WHOLE, PRECISION,
    )  # fmt: skip
    peak = peak_of(scores, scale, MASK)
    if SECOND > 0:
        key_2 = rows_of(key_ptr, FIRST, key_row_stride, keys, SECOND, WIDTH, BLOCK_D, THIRD == 0 and not WHOLE)
        value_2 = rows_of(value_ptr, FIRST, value_row_stride, keys, SECOND, WIDTH, BLOCK_D, THIRD == 0 and not WHOLE)
        scores_2 = scores_of(
            query, key_2, first_row, length, FIRST, keys, mask_ptr, mask_row_stride, mask_key_stride, scale,
            BLOCK_M, SECOND, MASK, BY_KEY, CAUSAL, THIRD == 0 and not WHOLE, PRECISION,
        )  # fmt: skip
        peak = tl.maximum(peak, peak_of(scores_2, scale, MASK))
    if THIRD > 0:
        key_3 = rows_of(key_ptr, FIRST + SECOND, key_row_stride, keys, THIRD, WIDTH, BLOCK_D, not WHOLE)
        value_3 = rows_of(value_ptr, FIRST + SECOND, value_row_stride, keys, THIRD, WIDTH, BLOCK_D, not WHOLE)
        scores_3 = scores_of(
            query, key_3, first_row, length, FIRST + SECOND, keys, mask_ptr, mask_row_stride, mask_key_stride, scale,
            BLOCK_M, THIRD, MASK, BY_KEY, CAUSAL, not WHOLE, PRECISION,
        )  # fmt: skip
        peak = tl.maximum(peak, peak_of(scores_3, scale, MASK))
    anchor = anchor_of(peak, MASK)
    weights = weights_of(scores, anchor, scale, MASK)
    total = tl.sum(weights, axis=1)
    sums = tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    if SECOND > 0:
        weights_2 = weights_of(scores_2, anchor, scale, MASK)
        total += tl.sum(weights_2, axis=1)
        sums = tl.dot(weights_2.to(value.dtype), value_2, sums, input_precision=PRECISION)
    if THIRD > 0:
        weights_3 = weights_of(scores_3, anchor, scale, MASK)
        total += tl.sum(weights_3, axis=1)
        sums = tl.dot(weights_3.to(value.dtype), value_3, sums, input_precision=PRECISION)
    store_rows(out_ptr, finished(sums, total, MASK), first_row, heads * WIDTH, length, BLOCK_M, WIDTH, BLOCK_D)
