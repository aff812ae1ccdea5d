"""Launching the attention kernels: which configuration, and what of the operands the kernels can take as it lies.

default(...)      a configuration by rule
candidates(...)   those worth measuring
attention(..., config), variable_length_attention(..., config)
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from accelkit.kernels import dense_last, dependent, dependent_launch, dependent_launch_on, on_device_of
from accelkit.kernels.attention_kernels import dense_kernel, variable_length_kernel
from accelkit.kernels.attention_one_pass import one_pass_kernel
from accelkit.tuning.choices import Choices

WIDEST_HEAD = 256
LONGEST_ONE_PASS = 272
"""Keys whose scores, beside 64 queries, fit in the registers of 4 warps."""

_HOPPER_SHARED_BYTES = 227 * 1024  # of one program on sm_90 (CUDA C++ Programming Guide, table of compute capabilities)


class AttentionConfig(NamedTuple):
    """How attention is launched.

    Attributes:
        style: "pointers" (asynchronous copies), "descriptors" (Hopper's bulk tensor copies; pointers where the operands'
            alignment does not allow them) or "one_pass" (short sequences, no online softmax).
        block_m: queries of a program. block_n: keys of a step; 0 in one pass.
        warps: warps a program. stages: steps whose loads are in flight.
        pdl: programmatic dependent launch (Hopper and later): overlap the launch with the end of the kernel before.
    """

    style: str
    block_m: int
    block_n: int
    warps: int
    stages: int
    pdl: bool = False


def default(length: int, keys: int, width: int, dtype: torch.dtype, causal: bool = False) -> AttentionConfig:
    """The configuration by rule, for operands of any batch and number of heads."""
    block_d = _block_d(width)
    if dtype is torch.float32:
        return AttentionConfig("pointers", 64, 32 if block_d <= 128 else 16, 4, 2)
    if block_d > 128:
        return AttentionConfig("pointers", 64, 32, 4, 2)
    if block_d > 64:
        return AttentionConfig("pointers", 128 if length > 64 else 64, 64, 8 if length > 64 else 4, 2)
    if keys <= 128 and not causal:
        return AttentionConfig("one_pass", 64, 0, 4, 1)
    if length <= 64:
        return AttentionConfig("pointers", 64, 64, 4, 3)
    return AttentionConfig("descriptors", 64, 64, 4, 2 if keys <= LONGEST_ONE_PASS else 3)


def candidates(
    length: int,
    keys: int,
    width: int,
    dtype: torch.dtype,
    causal: bool = False,
    masked: bool = False,
    limit: int = _HOPPER_SHARED_BYTES,
) -> list[AttentionConfig]:
    """The default and the configurations worth measuring beside it, whose programs need at most `limit` bytes of shared memory."""
    block_d = _block_d(width)
    found = [default(length, keys, width, dtype, causal)]
    if dtype is not torch.float32 and block_d <= 128:
        if keys <= LONGEST_ONE_PASS:
            found += [AttentionConfig("one_pass", 64, 0, 4, 1), AttentionConfig("one_pass", 128, 0, 8, 1)]
        for style in ("pointers", "descriptors"):
            found += [
                AttentionConfig(style, block_m, block_n, warps, stages)
                for block_m, block_n, warps, stages in (
                    (64, 64, 4, 2),
                    (64, 64, 4, 3),
                    (64, 128, 4, 2),
                    (128, 64, 4, 2),
                    (128, 64, 4, 3),
                    (128, 64, 8, 2),
                    (128, 64, 8, 3),
                    (128, 128, 8, 2),
                    (128, 128, 8, 3),
                )
                if block_m <= max(64, 2 * length) and block_n <= max(64, keys)
            ]
    elif dtype is not torch.float32:
        found += [AttentionConfig("pointers", m, n, w, 2) for m, n, w in ((64, 32, 8), (128, 32, 8))]
    fitting = [c for c in found if c is found[0] or shared_bytes(c, keys, width, dtype, causal, masked) <= limit]
    return list(dict.fromkeys(fitting))


@functools.cache
def shared_bytes_on(device: torch.device) -> int:
    """The shared memory that a program may have on this device, as Triton asks for it when it launches."""
    if device.type != "cuda":
        return _HOPPER_SHARED_BYTES
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def shared_bytes(
    config: AttentionConfig, keys: int, width: int, dtype: torch.dtype, causal: bool = False, masked: bool = False
) -> int:
    """At least the shared memory of one program: blocks of queries, keys and values, and what goes around them.

    As Triton 3.6 compiles for sm_90: 8 bytes a stage for the barriers of bulk copies, and where a mask is laid out as scores
    are, at most 512 bytes a warp.
    """
    if config.style == "one_pass":
        held = sum(one_pass_blocks(keys)[:3])
    else:  # the shorter block is loaded before the loop and stays; under a causal line it takes the memory of the loop's
        held = config.block_n * config.stages + (0 if causal else _tail(keys, config.block_n))
    blocks = (config.block_m + 2 * held) * _block_d(width) * dtype.itemsize
    return blocks + 8 * config.stages + (512 * config.warps if masked else 0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """`accelkit.ops.attention.meaning` on a GPU: operands [batch, length, heads, width] with any strides but the last."""
    batch, length, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    out = torch.empty((batch, length, heads, width), dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    if keys == 0:
        return out.zero_()
    query, scale = _positive(query, scale)
    query, key, value = dense_last(query), dense_last(key), dense_last(value)
    config = config or default(length, keys, width, query.dtype, causal)._replace(pdl=dependent_launch(query))
    kind, mask = _prepared(mask, query, keys)
    shared: dict[str, Any] = {
        "BLOCK_M": config.block_m,
        "WIDTH": width,
        "BLOCK_D": _block_d(width),
        "MASK": kind,
        "BY_KEY": mask is None or mask.stride(2) == 0,
        "CAUSAL": causal,
        "PRECISION": _precision(),
    }
    numbers = (length, keys, heads, heads // key_heads, scale * math.log2(math.e))
    strides = [stride for t in (query, key, value) for stride in t.stride()[:3]]
    strides += (0, 0, 0, 0) if mask is None else mask.stride()
    grid = (batch * heads * triton.cdiv(length, config.block_m),)
    with on_device_of(query):
        if config.style == "one_pass":
            first, second, third, whole = one_pass_blocks(keys)
            one_pass_kernel[grid](
                query, key, value, mask, out, *numbers, *strides,
                FIRST=first, SECOND=second, THIRD=third, WHOLE=whole, **shared, **_options(config),
            )  # fmt: skip
        else:
            descriptors = _descriptors(key, value, config, _block_d(width))
            dense_kernel[grid](
                query, key, value, *descriptors, mask, out, *numbers, *strides,
                BLOCK_N=config.block_n, TAIL=config.block_n if causal else _tail(keys, config.block_n),
                SPECIALISE=False, **shared, **_options(config),
            )  # fmt: skip
    return out


def variable_length_default(longest: int, width: int, dtype: torch.dtype) -> AttentionConfig:
    """The configuration by rule for packed sequences of at most `longest` rows."""
    if dtype is torch.float32 or _block_d(width) > 128:
        return default(longest, LONGEST_ONE_PASS + 1, width, dtype)
    return AttentionConfig("pointers", 64, 64, 4, 2) if longest <= 256 else AttentionConfig("pointers", 128, 64, 4, 3)


def variable_length_candidates(
    longest: int, width: int, dtype: torch.dtype, limit: int = _HOPPER_SHARED_BYTES
) -> list[AttentionConfig]:
    """The configurations worth measuring for packed sequences; as for `candidates`."""
    dense = candidates(longest, longest, width, dtype, limit=limit)
    found = [variable_length_default(longest, width, dtype), *(c for c in dense if c.style == "pointers")]
    return list(dict.fromkeys(found))


class VariableLengthProblem(NamedTuple):
    """What a choice for packed sequences depends on.

    Attributes:
        rows, sequences, longest: sizes of the packing.
        heads, key_heads, width: of the operands, whose dtype is `dtype`.
        causal: as in `accelkit.variable_length_attention`.
    """

    rows: int
    sequences: int
    longest: int
    heads: int
    key_heads: int
    width: int
    dtype: torch.dtype
    causal: bool


def variable_length_problem(
    query: Tensor, key: Tensor, offsets: Tensor, longest: int, causal: bool
) -> VariableLengthProblem:
    """The problem of these operands."""
    rows, heads, width = query.shape
    return VariableLengthProblem(rows, offsets.shape[0] - 1, longest, heads, key.shape[1], width, query.dtype, causal)


def _variable_length_on(device: torch.device, problem: VariableLengthProblem) -> list[AttentionConfig]:
    found = variable_length_candidates(problem.longest, problem.width, problem.dtype, shared_bytes_on(device))
    return [config._replace(pdl=dependent_launch_on(device)) for config in found]


chosen = Choices("variable-length attention", VariableLengthProblem, AttentionConfig, _variable_length_on)
"""What measuring found for packed sequences, by device and problem; filled by `accelkit.tuning`."""


def variable_length_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """`accelkit.ops.variable_length_attention.meaning` on a GPU; rows beyond the last sequence are left as they are."""
    rows, heads, width = query.shape
    out = torch.empty((rows, heads, width), dtype=query.dtype, device=query.device)
    sequences = offsets.shape[0] - 1
    if out.numel() == 0 or sequences <= 0 or longest <= 0:
        return out
    query, scale = _positive(query, scale)
    query, key, value = dense_last(query), dense_last(key), dense_last(value)
    config = config or chosen[query.device, variable_length_problem(query, key, offsets, longest, causal)]
    config = config or variable_length_default(longest, width, query.dtype)._replace(pdl=dependent_launch(query))
    with on_device_of(query):
        variable_length_kernel[(triton.cdiv(longest, config.block_m), heads, sequences)](
            query, key, value, offsets, out, heads, heads // key.shape[1], scale * math.log2(math.e),
            *(stride for t in (query, key, value) for stride in t.stride()[:2]),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL=config.block_n, WIDTH=width,
            BLOCK_D=_block_d(width), CAUSAL=causal, PRECISION=_precision(), **_options(config),
        )  # fmt: skip
    return out


def one_pass_blocks(keys: int) -> tuple[int, int, int, bool]:
    """Three powers of two (at least 16, or 0) that hold `keys` keys with little to spare, and whether they do so exactly.

    >>> one_pass_blocks(197), one_pass_blocks(128), one_pass_blocks(100), one_pass_blocks(250)
    ((128, 64, 16, False), (128, 0, 0, True), (64, 32, 16, False), (256, 0, 0, False))
    """
    blocks: list[int] = []
    rest = keys
    while rest > 0 and len(blocks) < 3:
        blocks.append(max(16, 1 << (rest.bit_length() - 1)))
        rest -= blocks[-1]
    if rest > 0:
        blocks[-1] *= 2
    while len(blocks) > 1 and blocks[-1] == blocks[-2]:
        blocks[-2:] = [2 * blocks[-1]]
    first, second, third = (*blocks, 0, 0)[:3]
    return first, second, third, first + second + third == keys


def _tail(keys: int, block_n: int) -> int:
    """Keys of the last, incomplete step: 577 = 9 * 64 + 1 has a step of 16 there, not of 64."""
    rest = keys % block_n
    return 0 if rest == 0 else max(16, int(triton.next_power_of_2(rest)))


def _block_d(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _options(config: AttentionConfig) -> dict[str, Any]:
    pdl = dependent.allowed(config.pdl)
    return {"num_warps": config.warps, "num_stages": config.stages, "PDL": pdl, **dependent.options(pdl)}


def _precision() -> str:
    """Of float32 products: what PyTorch's own matrix products are set to, or three tf32 products for one."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _positive(query: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """The kernels scale the highest score and not each one, which holds where the scale is above 0."""
    if scale is None:
        return query, 1 / math.sqrt(query.shape[-1])
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def _prepared(mask: Tensor | None, query: Tensor, keys: int) -> tuple[str, Tensor | None]:
    """The mask's kind, and the mask with a stride (0 where it broadcasts) for each of batch, head, query and key."""
    if mask is None:
        return "none", None
    batch, length, heads, _ = query.shape
    kind = "boolean" if mask.dtype is torch.bool else "additive"
    if mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)
    elif mask.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        mask = mask.to(query.dtype)
    mask = mask.expand(batch, heads, length, keys)
    if length == 1:
        mask = mask.as_strided(mask.shape, (*mask.stride()[:2], 0, mask.stride(3)))
    return kind, mask


def _descriptors(key: Tensor, value: Tensor, config: AttentionConfig, block_d: int) -> tuple[Any, Any]:
    """Descriptors of [batch, heads, keys, width], or None where bulk tensor copies cannot take the operands."""
    if config.style != "descriptors" or not (_bulk_copyable(key) and _bulk_copyable(value)):
        return None, None
    block = [1, 1, config.block_n, block_d]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    return _descriptor(key, block), _descriptor(value, block)


def _descriptor(tensor: Tensor, block: list[int]) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _bulk_copyable(tensor: Tensor) -> bool:
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in tensor.stride()[:3])
