"""Packing the rows that matter to the front of a buffer, and putting them back.

    mask [batch, length]   ->   where each row goes      two kernels: each sequence's count, then its rows' places
    rows by those places   ->   rows                     one copy

No step waits for the mask's values: programs whose rows do not matter return.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from accelkit.kernels import dependent, on_device_of

_ROWS = 4
"""Rows of a program that copies."""
_LONGEST_BLOCK = 1024
_WIDEST_BLOCK = 1024


@triton.jit
def count_kernel(mask_ptr, counts_ptr, length, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a sequence: how many of its tokens are kept."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    sequence = tl.program_id(0).to(tl.int64)
    kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        kept += tl.load(mask_ptr + sequence * length + offs, mask=offs < length, other=0).to(tl.int32)
    tl.store(counts_ptr + sequence, tl.sum(kept, axis=0))


@triton.jit
def place_kernel(
    mask_ptr, counts_ptr, sources_ptr, positions_ptr, offsets_ptr, rows_ptr, batch, length, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program a sequence: it sums the others' counts by itself, which spares a kernel between."""
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    sequence = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK], tl.int32)
    whole = tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + offs, mask=offs < batch, other=0)
        whole += counts
        before += tl.where(offs < sequence, counts, 0)
    first = tl.sum(before, axis=0)
    total = tl.sum(whole, axis=0)
    tl.store(offsets_ptr + sequence, first)
    if sequence == batch - 1:
        tl.store(offsets_ptr + batch, total)
        tl.store(rows_ptr, total)
    for start in range(0, length, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < length
        tokens = sequence * length + offs
        kept = tl.load(mask_ptr + tokens, mask=inside, other=0).to(tl.int32)
        places = first + tl.cumsum(kept, axis=0) - kept  # kept tokens before this one
        tl.store(positions_ptr + tokens, tl.where(kept != 0, places, -1), mask=inside)
        tl.store(sources_ptr + tl.where(kept != 0, places, total + tokens - places), tokens, mask=inside)
        first += tl.sum(kept, axis=0)


@triton.jit
def pack_kernel(
    x_ptr, sources_ptr, rows_ptr, packed_ptr, row_count, width, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    row_count = tl.minimum(row_count, tl.load(rows_ptr))
    first = tl.program_id(0) * ROWS
    if first >= row_count:
        return
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sources = tl.load(sources_ptr + rows, mask=rows < row_count, other=0).to(tl.int64)
    inside = (rows < row_count)[:, None] & (columns < width)[None, :]
    values = tl.load(x_ptr + sources[:, None] * x_stride + columns[None, :], mask=inside)
    tl.store(packed_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], values, mask=inside)


@triton.jit
def unpack_kernel(
    packed_ptr, positions_ptr, x_ptr, row_count, width, packed_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    positions = tl.load(positions_ptr + rows, mask=rows < row_count, other=-1).to(tl.int64)
    inside = (rows < row_count)[:, None] & (columns < width)[None, :]
    values = tl.load(
        packed_ptr + positions[:, None] * packed_stride + columns[None, :],
        mask=inside & (positions >= 0)[:, None],
        other=0,
    )
    tl.store(x_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], values, mask=inside)


def packed_layout(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`accelkit.ops.packed_layout.meaning` on a GPU."""
    batch, length = mask.shape
    new = torch.zeros if mask.numel() == 0 else torch.empty
    sources, positions, offsets, rows, counts = (
        new(shape, dtype=torch.int32, device=mask.device)
        for shape in ((batch * length,), (batch, length), (batch + 1,), (1,), (batch,))
    )
    if mask.numel() == 0:
        return sources, positions, offsets, rows
    mask = mask.contiguous().view(torch.uint8)
    block = max(16, min(int(triton.next_power_of_2(max(length, min(batch, 256)))), _LONGEST_BLOCK))
    with on_device_of(mask):
        count_kernel[(batch,)](mask, counts, length, BLOCK=block, **_options(mask))
        place_kernel[(batch,)](
            mask, counts, sources, positions, offsets, rows, batch, length, BLOCK=block, **_options(mask)
        )
    return sources, positions, offsets, rows


def pack_rows(x: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    """`accelkit.ops.pack_rows.meaning` on a GPU; rows beyond the count are left as they are."""
    row_count = x.shape[0] * x.shape[1]
    packed = torch.empty((row_count, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return packed
    flat = _plain(x).reshape(row_count, -1)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    width = flat.shape[1]
    block = _block(width)
    with on_device_of(x):
        pack_kernel[(triton.cdiv(row_count, _ROWS), triton.cdiv(width, block))](
            flat, sources, rows, _plain(packed), row_count, width, flat.stride(0),
            ROWS=_ROWS, BLOCK=block, **_options(x),
        )  # fmt: skip
    return packed


def unpack_rows(packed: Tensor, positions: Tensor) -> Tensor:
    """`accelkit.ops.unpack_rows.meaning` on a GPU."""
    x = torch.empty((*positions.shape, *packed.shape[1:]), dtype=packed.dtype, device=packed.device)
    if x.numel() == 0:
        return x
    flat = _plain(packed).reshape(packed.shape[0], -1)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    row_count, width = positions.numel(), flat.shape[1]
    block = _block(width)
    with on_device_of(packed):
        unpack_kernel[(triton.cdiv(row_count, _ROWS), triton.cdiv(width, block))](
            flat, positions.contiguous(), _plain(x), row_count, width, flat.stride(0),
            ROWS=_ROWS, BLOCK=block, **_options(packed),
        )  # fmt: skip
    return x


def _options(tensor: Tensor) -> dict[str, Any]:
    pdl = dependent.dependent("rows", tensor)
    return {"PDL": pdl, "num_warps": 4, **dependent.options(pdl)}


def _plain(tensor: Tensor) -> Tensor:
    # pointers to booleans are copied as what they are in memory
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def _block(width: int) -> int:
    return max(1, min(int(triton.next_power_of_2(width)), _WIDEST_BLOCK))
