"""Linear layers on a GPU: which implementation, and how it is launched.

    cublas   torch.nn.functional.linear and what follows as operators of their own: few rows, nothing to fuse
    hopper   `linear_hopper`: many rows on compute capability 9.x; epilogues for nothing
    tiles    `linear_tiles`: portable Triton; few rows with an epilogue, rows that are counted on the device

default(...)      an implementation by rule; candidates(...)   those worth measuring
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.errors import TritonError

from accelkit.errors import LoweringError, warn
from accelkit.kernels import dense_last, on_device_of
from accelkit.ops.folded_linear import HOPPER_FAILURES, without_hopper
from accelkit.ops.linear_activation import ACTIVATIONS
from accelkit.tuning.choices import Choices


class LinearConfig(NamedTuple):
    """How a linear layer is computed.

    Attributes:
        implementation: cublas, hopper or tiles.
        block_m, block_n, block_k: the tile of a warpgroup (hopper) or of a program (tiles); 0 for cublas.
        warps: warps of a program (tiles). stages: steps of K whose loads are in flight.
    """

    implementation: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 0
    stages: int = 0


CUBLAS = LinearConfig("cublas")
_HOPPER = LinearConfig("hopper", 128, 128, 64, 4, 5)
_HOPPER_TILES = (_HOPPER, LinearConfig("hopper", 128, 64, 64, 4, 6), LinearConfig("hopper", 64, 128, 64, 4, 6))
_TILES = tuple(
    LinearConfig("tiles", *tile)
    for tile in (
        (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 5), (64, 64, 128, 4, 4),
        (64, 32, 128, 4, 5), (32, 64, 128, 4, 5), (32, 32, 128, 4, 5), (16, 64, 128, 4, 5),
    )
)  # fmt: skip


class LinearProblem(NamedTuple):
    """What a choice depends on.

    Attributes:
        rows, features, width: the matrix product's M, N and K.
        dtype: of the operands.
        activation: as in `accelkit.linear_activation`.
        residual: whether one is added. counted: whether only so many rows as a tensor on the device says matter.
    """

    rows: int
    features: int
    width: int
    dtype: torch.dtype
    activation: str
    residual: bool
    counted: bool


def default(problem: LinearProblem, hopper: bool, processors: int) -> LinearConfig:
    """An implementation by rule; the limits follow benchmarks/results/h200/kernel_choices.json."""
    tiles = -(-problem.rows // 128) * -(-problem.features // 128)
    aligned = problem.width % 8 == 0 and problem.features % 8 == 0
    gelu = problem.activation in ("gelu", "silu")  # what cuBLAS has no epilogue for
    if hopper and aligned and tiles >= (4 if problem.activation == "relu" else 2) * processors:
        if problem.activation != "none" or problem.residual or problem.counted or problem.width <= 1024:
            return _HOPPER
    elif hopper and aligned and gelu and tiles >= processors:
        return _HOPPER_TILES[1]
    elif gelu and problem.rows <= 256 and problem.width % 128 == 0:
        return LinearConfig("tiles", 64, 64, 128, 4, 4)
    if problem.counted:
        return LinearConfig("tiles", 64, 64, 64, 4, 5)
    return CUBLAS


def candidates(problem: LinearProblem, hopper: bool, processors: int) -> list[LinearConfig]:
    """The implementations worth measuring for a problem; the default is among them."""
    tiles = -(-problem.rows // 128) * -(-problem.features // 128)
    found = [] if problem.counted else [CUBLAS]
    if hopper and problem.width % 8 == 0 and problem.features % 8 == 0:
        found += _HOPPER_TILES if tiles < 8 * processors else (_HOPPER,)
    if tiles < 4 * processors:
        found += [c for c in _TILES if c.block_m <= max(16, 2 * problem.rows)]
    fallback = default(problem, hopper, processors)
    return found if fallback in found else [*found, fallback]


def linear_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    rows: Tensor | None,
    config: LinearConfig | None = None,
) -> Tensor:
    """`accelkit.ops.linear_activation.meaning` on a GPU."""
    flat = dense_last(x.reshape(-1, x.shape[-1]))
    features = weight.shape[0]
    shape = (*x.shape[:-1], features)
    if not flat.numel() or not features:
        return x.new_empty(shape)
    added = None if residual is None else dense_last(residual.expand(shape).reshape(-1, features))
    problem = LinearProblem(
        flat.shape[0], features, flat.shape[1], x.dtype, activation, residual is not None, rows is not None
    )
    config = config or chosen[x.device, problem] or default_on(x.device, problem)
    with on_device_of(x):
        return _IMPLEMENTATIONS[config.implementation](flat, weight, bias, activation, added, rows, config).reshape(
            shape
        )


def default_on(device: torch.device, problem: LinearProblem) -> LinearConfig:
    """`default` on this device."""
    return default(problem, *_device_facts(device))


@functools.cache
def _device_facts(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its number of multiprocessors."""
    if device.type != "cuda":
        return False, 1
    hopper = without_hopper(torch.empty(0, device=device)) is None
    return hopper, torch.cuda.get_device_properties(device).multi_processor_count


chosen = Choices(
    "linear", LinearProblem, LinearConfig, lambda device, problem: candidates(problem, *_device_facts(device))
)
"""What measuring found, by device and problem; filled by `accelkit.tuning`."""


def _cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, rows: Tensor | None,
    config: LinearConfig,
) -> Tensor:  # fmt: skip
    if bias is not None and activation in ("relu", "gelu_tanh"):  # cuBLASLt has these two epilogues
        y = torch._addmm_activation(bias, x, weight.t(), use_gelu=activation == "gelu_tanh")
    else:
        y = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return y if residual is None else y.add_(residual)


def _hopper(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, rows: Tensor | None,
    config: LinearConfig,
) -> Tensor:  # fmt: skip
    tile = (config.block_m, config.block_n)
    try:
        result, _ = _on_hopper(
            _aligned(x), _aligned(weight), bias, activation, _aligned(residual), rows, tile=tile, stages=config.stages
        )
    except _NotLaunched as failure:
        warn(f"linear layers run without the Hopper kernel, which Triton {triton.__version__} refuses: {failure}")
        slower = _cublas if rows is None else _tiles
        return slower(x, weight, bias, activation, residual, rows, LinearConfig("tiles", 64, 64, 64, 4, 5))
    return result


class _NotLaunched(Exception):
    """Triton does not compile or launch the Hopper kernel: Gluon, which it is written in, is new and still changes."""


def _on_hopper(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    try:
        from accelkit.kernels import linear_hopper

        return linear_hopper.linear(x, *args, **kwargs)
    except (ImportError, AttributeError, TypeError, TritonError) as error:
        HOPPER_FAILURES[x.device] = reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        _device_facts.cache_clear()
        raise _NotLaunched(reason) from error


def _tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None, rows: Tensor | None,
    config: LinearConfig,
) -> Tensor:  # fmt: skip
    from accelkit.kernels import linear_tiles

    tile = (config.block_m, config.block_n, config.block_k)
    return linear_tiles.linear(
        x, dense_last(weight), bias, activation, residual, rows, tile, config.warps, config.stages
    )


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"cublas": _cublas, "hopper": _hopper, "tiles": _tiles}


def _aligned(tensor: Tensor | None) -> Tensor:
    """The tensor as Hopper's bulk copies want it: dense in the last dimension, rows and start at multiples of 16 bytes."""
    if tensor is None:
        return tensor  # type: ignore[return-value]
    size = tensor.element_size()
    if tensor.stride(1) == 1 and tensor.stride(0) * size % 16 == 0 and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    moments: Tensor | None,
    column_sums: Tensor | None,
    residual: Tensor | None,
    residual_moments: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """`accelkit.ops.folded_linear.meaning` on Hopper.

    Raises:
        LoweringError: Triton does not compile or launch the kernel.
    """
    features = weight.shape[0]
    leading = x.shape[:-1]
    if not x.numel():
        groups_of = features // 64 if statistics else 0
        return x.new_empty((*leading, features)), x.new_empty((*leading, groups_of, 2), dtype=torch.float32)
    with on_device_of(x), _told():
        result, groups = _on_hopper(
            _aligned(dense_last(x.reshape(-1, x.shape[-1]))),
            _aligned(weight),
            bias,
            activation,
            None if residual is None else _aligned(dense_last(residual.reshape(-1, features))),
            moments=None if moments is None else moments.reshape(-1, 2).contiguous(),
            column_sums=column_sums,
            residual_moments=None if residual_moments is None else residual_moments.reshape(-1, 2).contiguous(),
            residual_weight=residual_weight,
            residual_bias=residual_bias,
            statistics=statistics,
        )
    found = (
        x.new_empty((*leading, 0, 2), dtype=torch.float32)
        if groups is None
        else groups.reshape(*leading, features // 64, 2)
    )
    return result.reshape(*leading, features), found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except _NotLaunched as failure:
        raise LoweringError(f"Triton {triton.__version__} refuses the Hopper kernel: {failure}") from failure


def patch_embedding(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`accelkit.ops.patch_embedding.meaning` on a GPU: one copy that gathers the patches, one matrix product."""
    batch, channels, height, width = image.shape
    features, _, patch_height, patch_width = weight.shape
    across, down = width // patch_width, height // patch_height
    image = image[:, :, : down * patch_height, : across * patch_width]
    patches = image.reshape(batch, channels, down, patch_height, across, patch_width).permute(0, 2, 4, 1, 3, 5)
    rows = patches.reshape(batch, down * across, channels * patch_height * patch_width)
    return linear_activation(rows, weight.reshape(features, -1), bias, "none", None, None)
