"""The normalisation kernels against float64: at most twice plain PyTorch's own error, on odd sizes, strides and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accelkit.ops import embedding_layer_norm, residual_layer_norm, residual_rms_norm

norms = pytest.importorskip("accelkit.kernels.norms", reason="the kernels need Triton")

DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.float16, torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


def near(kernel: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice plain PyTorch's error, and a rounding of the result's dtype (one for all numbers, not for each)."""
    assert kernel.dtype is plain.dtype
    assert kernel.is_contiguous()
    scale = truth.norm()
    floor = torch.finfo(kernel.dtype).eps
    assert (kernel.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + floor * scale


@pytest.mark.parametrize(("x_dtype", "residual_dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 64), (3, 768), (1, 1), (2, 9001)])
def test_residual_layer_norm(
    device: str, shape: tuple[int, ...], x_dtype: torch.dtype, residual_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, residual = torch.randn(shape, dtype=x_dtype), torch.randn(shape, dtype=residual_dtype)
    weight, bias = torch.randn(shape[-1], dtype=weight_dtype), torch.randn(shape[-1])
    operands = [t.to(device) for t in (x, residual, weight, bias)]
    truth = residual_layer_norm.meaning(*(t.double() for t in operands))
    plain = residual_layer_norm.meaning(*operands)
    for kernel, meant, true in zip(norms.residual_layer_norm(*operands, 1e-5), plain, truth, strict=True):
        near(kernel, meant, true)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 64), (2, 9001)])
@pytest.mark.parametrize("with_weight", [True, False])
def test_residual_rms_norm(device: str, shape: tuple[int, ...], with_weight: bool) -> None:
    x, residual = (torch.randn(shape, dtype=torch.float16, device=device) for _ in range(2))
    weight = torch.randn(shape[-1], device=device) if with_weight else None
    wide = None if weight is None else weight.double()
    truth = residual_rms_norm.meaning(x.double(), residual.double(), wide)
    plain = residual_rms_norm.meaning(x, residual, weight)
    for kernel, meant, true in zip(norms.residual_rms_norm(x, residual, weight, 1e-6), plain, truth, strict=True):
        near(kernel, meant, true)


def test_mean_far_from_zero_does_not_cancel(device: str) -> None:
    x = torch.randn(4, 512, device=device) + 1000.0
    truth = torch.nn.functional.layer_norm(x.double(), (512,))
    plain = torch.nn.functional.layer_norm(x, (512,))
    near(norms.layer_norm(x, None, None, 1e-5), plain, truth)


def test_sum_is_normalised_before_it_is_rounded(device: str) -> None:
    x = torch.full((1, 64), 2048.0, dtype=torch.float16, device=device)
    residual = torch.randn(1, 64, dtype=torch.float16, device=device)
    normalised, total = norms.residual_layer_norm(x, residual, None, None, 1e-5)
    truth = torch.nn.functional.layer_norm(x.double() + residual.double(), (64,))
    assert (normalised.double() - truth).norm() < 1e-3 * truth.norm()
    assert (total.double() - x.double() - residual.double()).abs().max() > 0.5  # the sum itself cannot hold more


@pytest.mark.parametrize("shape", [(6, 40), (4, 10, 16)])
def test_operands_are_taken_as_they_lie(device: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape[:-1], 3 * shape[-1], device=device)[..., shape[-1] : 2 * shape[-1]]  # a slice of a wider row
    residual = torch.randn(shape[::-1], device=device).permute(*reversed(range(len(shape))))  # transposed
    weight = torch.randn(2 * shape[-1], device=device)[::2]
    kernel = norms.residual_layer_norm(x, residual, weight, None, 1e-5)
    plain = residual_layer_norm.meaning(x, residual, weight, None)
    assert torch.equal(kernel[1], plain[1])
    torch.testing.assert_close(kernel[0], plain[0])


@pytest.mark.parametrize("width", [16, 9000])
def test_rows_beyond_the_count_are_left_alone(device: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = (torch.randn(6, width, device=device) for _ in range(2))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(7.0))
    rows = torch.tensor([4], dtype=torch.int32, device=device)
    for kernel in norms.residual_layer_norm(x, residual, None, None, 1e-5, rows):
        assert (kernel[4:] == 7.0).all()
        assert not (kernel[:4] == 7.0).any()


def test_no_rows(device: str) -> None:
    x = torch.randn(0, 8, device=device)
    assert [t.shape for t in norms.residual_layer_norm(x, x, None, None, 1e-5)] == [(0, 8), (0, 8)]


@pytest.mark.parametrize("width", [12, 768, 2048])
def test_candidates_agree(device: str, width: int) -> None:
    x, residual = (torch.randn(9, width, device=device) for _ in range(2))
    found = norms.candidates(9, width)
    assert norms.default(9, width) in found
    plain = residual_layer_norm.meaning(x, residual, None, None)[0]
    for config in found if width < 2048 or device == "cuda" else found[:2]:
        torch.testing.assert_close(norms.residual_layer_norm(x, residual, None, None, 1e-5, config=config)[0], plain)


@pytest.mark.parametrize("tables", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embedding_layer_norm(device: str, tables: int, dtype: torch.dtype) -> None:
    indices = [torch.randint(0, 11, (2, 5)), torch.arange(5)[None], torch.zeros(2, 1, dtype=torch.int32)]
    indices = [index.to(device) for index in indices[:tables]]
    entries = [torch.randn(11, 48, dtype=dtype, device=device) for _ in indices]
    weight, bias = torch.randn(48, device=device), torch.randn(48, dtype=dtype, device=device)
    truth = embedding_layer_norm.meaning(indices, [t.double() for t in entries], weight.double(), bias.double())
    plain = embedding_layer_norm.meaning(indices, entries, weight, bias)
    near(norms.embedding_layer_norm(indices, entries, weight, bias, 1e-5), plain, truth)


def test_embedding_of_three_leading_dimensions(device: str) -> None:
    indices = [torch.randint(0, 9, (2, 3, 4), device=device), torch.randint(0, 9, (3, 1), device=device)]
    entries = [torch.randn(24, 9, device=device).t(), torch.randn(9, 24, device=device)]
    plain = embedding_layer_norm.meaning(indices, entries, None, None)
    torch.testing.assert_close(norms.embedding_layer_norm(indices, entries, None, None, 1e-5), plain)


@pytest.mark.parametrize("index", [-1, 9])
def test_index_out_of_range_is_seen(device: str, index: int) -> None:
    table = torch.randn(9, 16, device=device)
    result = norms.embedding_layer_norm([torch.tensor([[0, index]], device=device)], [table], None, None, 1e-5)
    assert result[0, 1].isnan().all()
    assert not result[0, 0].isnan().any()
