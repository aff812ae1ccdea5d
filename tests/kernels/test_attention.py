"""The attention kernels against float64: at most twice plain PyTorch's own error, for masks, strides and odd sizes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from accelkit.ops import attention as operator
from accelkit.ops import variable_length_attention as variable_length

attention = pytest.importorskip("accelkit.kernels.attention", reason="the kernels need Triton")

CONFIGS = [("pointers", 32, 32, 4, 2), ("descriptors", 32, 16, 4, 2), ("one_pass", 16, 0, 4, 1)]
on_each = pytest.mark.parametrize("config", CONFIGS, ids=[config[0] for config in CONFIGS])


def _written_out(options: dict[str, Any], query: Tensor, key: Tensor) -> dict[str, Any]:
    """The mask in full: PyTorch 2.11's kernels read a broadcast or unaligned one out of bounds."""
    if (mask := options.get("mask")) is None:
        return options
    shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    return options | {"mask": mask.expand(shape).clone(memory_format=torch.contiguous_format)}


def close(query: Tensor, key: Tensor, value: Tensor, config: Any = None, **options: Any) -> None:
    """The kernel's error against float64 is at most twice plain PyTorch's, and a rounding."""
    kernel = attention.attention(query, key, value, config=config and attention.AttentionConfig(*config), **options)
    plain = operator.meaning(
        *(t.clone(memory_format=torch.contiguous_format) for t in (query, key, value)),
        **_written_out(options, query, key),
    )
    mask = options.pop("mask", None)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype).double()
    truth = operator.meaning(query.double(), key.double(), value.double(), mask, **options)
    assert kernel.dtype is query.dtype
    assert kernel.is_contiguous()
    # float32 products are three of tf32's: a few more roundings than one, where 16-bit results hide that
    floor = torch.finfo(query.dtype).eps * (4 if query.dtype is torch.float32 else 0.25) * truth.norm()
    assert (kernel.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + floor


def operands(
    device: str, length: int, keys: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    sizes = ((2, length, heads, width), (2, keys, key_heads, width), (2, keys, key_heads, width))
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes]


@on_each
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "keys", "heads", "key_heads", "width", "dtype"),
    [
        (33, 33, 2, 2, 64, torch.float16),
        (17, 40, 2, 1, 24, torch.float16),
        (1, 19, 2, 1, 16, torch.float32),
        (40, 5, 1, 1, 8, torch.float32),
        (16, 48, 2, 2, 80, torch.float16),
    ],
)
def test_no_mask(
    device: str,
    length: int,
    keys: int,
    heads: int,
    key_heads: int,
    width: int,
    dtype: torch.dtype,
    causal: bool,
    config: Any,
) -> None:
    close(*operands(device, length, keys, heads, key_heads, width, dtype), config, causal=causal)


@on_each
@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((2, 1, 1, 40), False),
        ((2, 1, 1, 40), True),
        ((40,), False),
        ((2, 1, 17, 40), True),
        ((2, 17, 40), False),
        ((17, 1), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks(device: str, shape: tuple[int, ...], kind: torch.dtype, causal: bool, config: Any) -> None:
    mask = torch.rand(shape, device=device) > 0.4
    mask[..., 0] = True
    if kind is not torch.bool:
        mask = torch.randn(shape, device=device, dtype=kind).masked_fill(~mask, float("-inf"))
    close(*operands(device, 17, 40, 2, 1, 16, torch.float16), config, mask=mask, causal=causal)


@on_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_without_keys_is_zero(device: str, config: Any, dtype: torch.dtype) -> None:
    query, key, value = operands(device, 17, 40, 2, 2, 16, dtype)
    mask = torch.rand(2, 1, 1, 40, device=device) > 0.4
    mask[0] = False
    for given in (mask, torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))):
        result = attention.attention(query, key, value, given, config=attention.AttentionConfig(*config))
        assert (result[0] == 0).all()
        assert (result[1] != 0).all()


@on_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_lowest_number_is_not_minus_infinity(device: str, config: Any, dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 1, 1, 40, device=device, dtype=dtype)
    mask[0] = mask[1, ..., 3:] = torch.finfo(dtype).min  # all keys alike; the first three
    close(*operands(device, 17, 40, 2, 2, 16, dtype), config, mask=mask)


@on_each
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scales(device: str, config: Any, scale: float) -> None:
    close(*operands(device, 20, 33, 2, 1, 32, torch.float32), config, scale=scale)


@on_each
def test_operands_are_taken_as_they_lie(device: str, config: Any) -> None:
    packed = torch.randn(1, 37, 3, 2, 16, device=device)
    close(*packed.unbind(2), config)
    headed = torch.randn(3, 1, 2, 37, 16, device=device)
    close(*(t.transpose(1, 2) for t in headed), config)
    close(*torch.randn(3, 1, 16, 2, 37, device=device).transpose(2, 4), config)  # last dimension not dense
    query = torch.randn(2, 37, 2, 16, device=device)
    close(query, query[:1].expand(2, -1, -1, -1), query[:, :, :1].expand(-1, -1, 2, -1), config)
    close(*torch.randn(3, 37 * 2 * 16 + 1, device=device)[:, 1:].unflatten(1, (1, 37, 2, 16)), config)  # not aligned


@pytest.mark.parametrize("length", [16, 128, 196, 197, 250, 272])
def test_blocks_of_one_pass_hold_all_keys(length: int) -> None:
    first, second, third, whole = attention.one_pass_blocks(length)
    blocks = [block for block in (first, second, third) if block]
    assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
    assert sum(blocks[:-1]) < length <= sum(blocks)
    assert whole == (sum(blocks) == length)


@pytest.mark.parametrize("keys", [0, 1, 64])
def test_empty(device: str, keys: int) -> None:
    query, key, value = operands(device, 3, keys, 2, 2, 16, torch.float16)
    assert attention.attention(query[:0], key[:0], value[:0]).shape == (0, 3, 2, 16)
    if keys == 0:
        assert (attention.attention(query, key, value) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(577, 577, 64), (197, 197, 64), (128, 128, 64), (1, 300, 128), (70, 70, 256)])
def test_candidates_hold_the_default(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    length, keys, width = sizes
    found = attention.candidates(length, keys, width, dtype)
    assert attention.default(length, keys, width, dtype) in found
    assert len(set(found)) == len(found) >= (1 if dtype is torch.float32 else 2)


@pytest.mark.parametrize(
    ("config", "keys", "width", "causal", "masked", "asked"),
    [
        (("pointers", 128, 128, 8, 3), 512, 128, False, False, 229376),
        (("pointers", 128, 128, 8, 3), 150, 128, False, False, 245760),  # 22 keys are left over: a block of 32
        (("descriptors", 128, 128, 8, 3), 150, 128, False, False, 245784),
        (("pointers", 128, 128, 8, 3), 300, 128, True, False, 229376),
        (("pointers", 128, 128, 8, 3), 256, 128, False, True, 233472),
        (("descriptors", 128, 64, 4, 3), 197, 64, False, True, 71704),
        (("pointers", 64, 128, 4, 2), 290, 96, False, True, 182272),
        (("one_pass", 128, 0, 8, 1), 272, 128, False, False, 163840),
        (("pointers", 128, 32, 8, 2), 70, 256, False, False, 147456),
    ],
)
def test_shared_memory(config: Any, keys: int, width: int, causal: bool, masked: bool, asked: int) -> None:
    """Against what Triton 3.6 asked for when it compiled these for sm_90, 16-bit, masks by query and key."""
    found = attention.shared_bytes(attention.AttentionConfig(*config), keys, width, torch.float16, causal, masked)
    assert asked <= found <= 1.06 * asked


def test_candidates_fit_into_shared_memory() -> None:
    config = attention.AttentionConfig("pointers", 128, 128, 8, 3)
    assert config in attention.candidates(512, 512, 128, torch.float16)
    assert config not in attention.candidates(150, 150, 128, torch.float16)
    assert config not in attention.candidates(512, 512, 128, torch.float16, masked=True)
    small = attention.candidates(512, 512, 128, torch.float16, limit=99 * 1024)
    assert len(small) > 1
    assert all(attention.shared_bytes(c, 512, 128, torch.float16) <= 99 * 1024 for c in small)
    assert attention.shared_bytes_on(torch.device("cpu")) == 227 * 1024


@pytest.mark.gpu
def test_candidates_at_the_limit_take_masks() -> None:
    given, mask = operands("cuda", 130, 256, 4, 2, 128, torch.float16), torch.rand(130, 256, device="cuda") > 0.4
    mask[:, 0] = True
    limit = attention.shared_bytes_on(given[0].device)
    found = attention.candidates(130, 256, 128, torch.float16, masked=True, limit=limit)
    largest = sorted(found, key=lambda c: attention.shared_bytes(c, 256, 128, torch.float16, masked=True))[-4:]
    for config in largest:
        close(*given, config, mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(577, 577, 64), (197, 197, 64), (128, 128, 32), (70, 150, 128), (70, 70, 256)])
def test_candidates_are_right(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    length, keys, width = sizes
    given = operands("cuda", length, keys, 4, 2, width, dtype)
    for config in attention.candidates(length, keys, width, dtype):
        close(*given, config)


OFFSETS = [[0, 3, 3, 40, 55], [0, 60], [0, 1, 2, 3], [0, 0]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bounds", OFFSETS, ids=str)
def test_variable_length(device: str, bounds: list[int], causal: bool) -> None:
    query = torch.randn(60, 2, 24, device=device)
    key, value = torch.randn(60, 2, 1, 24, device=device).unbind(1)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    for config in (None, attention.AttentionConfig("pointers", 16, 32, 4, 2)):
        kernel = attention.variable_length_attention(query, key, value, offsets, longest, causal, config=config)
        plain = variable_length.meaning(query, key, value, offsets, longest, causal)
        torch.testing.assert_close(kernel[: bounds[-1]], plain[: bounds[-1]])


def test_variable_length_leaves_other_rows_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(60, 2, 16, device=device)
    offsets = torch.tensor([0, 20, 37], dtype=torch.int32, device=device)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(7.0))
    kernel = attention.variable_length_attention(query, query, query, offsets, 20)
    assert (kernel[37:] == 7.0).all()
    assert not (kernel[:37] == 7.0).any()
