"""Layer and RMS normalisation of rows, with the residual added (or the embeddings looked up) in the same kernel.

    x, residual   read once     ->     normalised, sum   written once

A row of up to 8192 numbers stays in registers between its statistics and its result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from accelkit.kernels import dense_last, dependent, dependent_launch_on, on_device_of
from accelkit.kernels.norms_kernels import embedding_kernel, norm_kernel, wide_norm_kernel
from accelkit.tuning.choices import Choices

WIDEST_BLOCK = 8192
"""The widest row that is kept in registers: 16 warps of 16 numbers a thread."""


class NormConfig(NamedTuple):
    """How a normalisation is launched.

    Attributes:
        rows: rows a program, a power of two; 1 for rows wider than WIDEST_BLOCK.
        warps: warps a program.
        pdl: programmatic dependent launch (Hopper and later): overlap the launch with the end of the kernel before.
    """

    rows: int
    warps: int
    pdl: bool = False


class NormProblem(NamedTuple):
    """What a choice depends on.

    Attributes:
        form: layer, rms (both with or without a residual) or embedding.
        rows, width: of the result. dtype: of x, or of the tables.
        tables: how many are looked up; 0 but for embeddings.
    """

    form: str
    rows: int
    width: int
    dtype: torch.dtype
    tables: int


def default(row_count: int, width: int) -> NormConfig:
    """The configuration by rule: about eight numbers a thread for each 16-byte load, several rows where they are short."""
    block = _block(width)
    if block > 512:
        return NormConfig(1, max(2, min(block // 512, 16)))
    return NormConfig(max(1, min(1024 // block, 16)), 4)


def candidates(row_count: int, width: int) -> list[NormConfig]:
    """The configurations worth measuring for so many rows of this width."""
    block = _block(width)
    shapes = {(1, warps) for warps in (1, 2, 4, 8, 16) if block // 64 >= warps >= block // 2048}
    shapes |= {(rows, warps) for rows in (2, 4, 8) for warps in (2, 4) if 512 <= rows * block // warps <= 2048}
    shapes.add(default(row_count, width)[:2])
    return [NormConfig(rows, warps) for rows, warps in sorted(shapes)]


def default_on(device: torch.device, problem: NormProblem) -> NormConfig:
    """`default` on this device, its launch overlapped with the kernel before where the device can."""
    return default(problem.rows, problem.width)._replace(pdl=dependent_launch_on(device))


def _candidates_on(device: torch.device, problem: NormProblem) -> list[NormConfig]:
    pdl = dependent_launch_on(device)
    return [config._replace(pdl=pdl) for config in candidates(problem.rows, problem.width)]


chosen = Choices("norm", NormProblem, NormConfig, _candidates_on)
"""What measuring found, by device and problem; filled by `accelkit.tuning`."""


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: Tensor | None = None,
    config: NormConfig | None = None,
) -> Tensor:
    """F.layer_norm over the last dimension, for weights of any dtype; the result is contiguous and has x's dtype."""
    normalised = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normalise(x, None, weight, bias, normalised, None, rows, eps, True, config)
    return normalised


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: Tensor | None = None,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`accelkit.ops.residual_layer_norm.meaning` on a GPU."""
    normalised, total = _results(x, residual)
    _normalise(x, residual, weight, bias, normalised, total, rows, eps, True, config)
    return normalised, total


def residual_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    rows: Tensor | None = None,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`accelkit.ops.residual_rms_norm.meaning` on a GPU."""
    normalised, total = _results(x, residual)
    _normalise(x, residual, weight, None, normalised, total, rows, eps, False, config)
    return normalised, total


def embedding_layer_norm(
    indices: list[Tensor],
    tables: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    config: NormConfig | None = None,
) -> Tensor:
    """`accelkit.ops.embedding_layer_norm.meaning` on a GPU, for one to three tables at most WIDEST_BLOCK wide.

    A row with an index out of range becomes NaN: PyTorch's own lookup would stop the GPU there.
    """
    shape = torch.broadcast_shapes(*(index.shape for index in indices))  # type: ignore[no-untyped-call]
    dtype = tables[0].dtype
    for table in tables[1:]:
        dtype = torch.promote_types(dtype, table.dtype)
    width = tables[0].shape[1]
    normalised = torch.empty((*shape, width), dtype=dtype, device=tables[0].device)
    row_count = normalised.numel() // max(width, 1)
    if row_count == 0 or width == 0:
        return normalised
    problem = NormProblem("embedding", row_count, width, dtype, len(tables))
    config = config or chosen[normalised.device, problem] or default_on(normalised.device, problem)
    tables = [dense_last(table) for table in tables]
    if len(shape) != 2:
        indices = [index.expand(shape).reshape(1, -1) for index in indices]
    expanded = [index.expand(*shape) if len(shape) == 2 else index for index in indices]
    absent: list[Any] = [None] * (3 - len(tables))
    zeros = [0] * (3 - len(tables))
    with on_device_of(normalised):
        embedding_kernel[(triton.cdiv(row_count, config.rows),)](
            *expanded,
            *absent,
            *tables,
            *absent,
            weight,
            bias,
            normalised,
            row_count,
            expanded[0].shape[1],
            width,
            *(stride for index in expanded for stride in index.stride()),
            *zeros,
            *zeros,
            *(table.stride(0) for table in tables),
            *zeros,
            *(table.shape[0] for table in tables),
            *zeros,
            eps,
            ROWS=config.rows,
            BLOCK=_block(width),
            **_options(config),
        )
    return normalised


def _block(width: int) -> int:
    return int(triton.next_power_of_2(width))


def _options(config: NormConfig) -> dict[str, Any]:
    pdl = dependent.allowed(config.pdl)
    return {"PDL": pdl, "num_warps": config.warps, "num_stages": 1, **dependent.options(pdl)}


def _results(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device), torch.empty(x.shape, dtype=dtype, device=x.device)


def _as_rows(tensor: Tensor, width: int) -> Tensor:
    """[..., width] as [rows, width] whose rows lie densely: a view where the strides allow one."""
    return dense_last(tensor.reshape(-1, width))


def _normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Tensor,
    total: Tensor | None,
    rows: Tensor | None,
    eps: float,
    centre: bool,
    config: NormConfig | None,
) -> None:
    width = x.shape[-1]
    if x.numel() == 0:
        return
    x = _as_rows(x, width)
    residual = None if residual is None else _as_rows(residual, width)
    row_count = x.shape[0]
    problem = NormProblem("layer" if centre else "rms", row_count, width, x.dtype, 0)
    config = config or chosen[x.device, problem] or default_on(x.device, problem)
    wide = width > WIDEST_BLOCK
    with on_device_of(x):
        (wide_norm_kernel if wide else norm_kernel)[(row_count if wide else triton.cdiv(row_count, config.rows),)](
            x,
            residual,
            None if weight is None else dense_last(weight),
            None if bias is None else dense_last(bias),
            normalised,
            total,
            rows,
            row_count,
            width,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            CENTRE=centre,
            ROWS=1 if wide else config.rows,
            BLOCK=WIDEST_BLOCK // 2 if wide else _block(width),
            **_options(config),
        )
