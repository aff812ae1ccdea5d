"""The kernel for few rows on Hopper, against float64; programmatic dependent launch changes no bit of it or of `linear_hopper`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accelkit.kernels import dependent
from accelkit.ops import folded_linear, linear_activation, row_moments

one_tile = pytest.importorskip("accelkit.kernels.linear_one_tile", reason="the kernels need Triton")
hopper = pytest.importorskip("accelkit.kernels.linear_hopper", reason="the kernels need Triton")

TILES = [(64, 64), (64, 128), (128, 64), (128, 128)]
EPS = 1e-5


def test_stages_leave_room_for_a_second_program() -> None:
    for tile in TILES:
        ring = one_tile.default_stages(tile) * (tile[0] + tile[1]) * 64 * 2
        assert ring <= 96 * 1024
        assert one_tile.default_stages(tile) >= 3


@pytest.fixture
def gpu() -> str:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.x")
    return "cuda"


def operands(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, b, r = (torch.randn(shape, device=device) for shape in ((m, k), (n, k), (n,), (m, n)))
    return tuple(t.to(dtype) for t in (x + 0.5, w / k**0.5, b, r))  # type: ignore[return-value]


def statistics_of(t: Tensor) -> Tensor:
    groups = t.double().reshape(t.shape[0], -1, 64)
    means = groups.mean(-1, keepdim=True)
    return torch.stack([means.squeeze(-1), (groups - means).square().sum(-1)], -1)


def near(result: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert result.dtype is plain.dtype
    rounding = torch.finfo(result.dtype).eps * truth.norm()
    assert (result.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", TILES)
def test_linear(gpu: str, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    for m, n, k in ((577, 768, 768), (196, 1040, 200), (1, 8, 8), (37, 72, 3072)):
        x, w, b, r = operands(m, n, k, dtype, gpu)
        for activation, bias, residual in (("gelu", b, r), ("none", None, None)):
            wide = [None if t is None else t.double() for t in (bias, residual)]
            truth = linear_activation.meaning(x.double(), w.double(), wide[0], activation, wide[1])
            plain = linear_activation.meaning(x, w, bias, activation, residual)
            result, none = one_tile.linear(x, w, bias, activation, residual, tile=tile)
            near(result, plain, truth)
            assert none is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(577, 768, 768), (3, 128, 1024), (196, 256, 4096)])
def test_layer_norms_folded(gpu: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w, b, r = operands(m, n, k, dtype, gpu)
    scale, shift = torch.rand(n, device=gpu) + 0.5, torch.randn(n, device=gpu)
    moments = [row_moments.meaning(statistics_of(t), EPS) for t in (x, r)]
    truth, statistics = folded_linear.meaning(
        x.double(), w.double(), b.double(), "gelu", moments[0], w.double().sum(1), r.double(), moments[1],
        scale.double(), shift.double(), True,
    )  # fmt: skip
    plain = linear_activation.meaning(torch.nn.functional.layer_norm(x, (k,), eps=EPS), w, b, "gelu")
    plain = plain + torch.nn.functional.layer_norm(r, (n,), scale.to(dtype), shift.to(dtype), EPS)
    result, found = one_tile.linear(
        x, w, b, "gelu", r, x_statistics=statistics_of(x).float(), x_eps=EPS, column_sums=w.float().sum(1),
        residual_statistics=statistics_of(r).float(), residual_eps=EPS, residual_weight=scale, residual_bias=shift,
        statistics=True,
    )  # fmt: skip
    near(result, plain, truth)
    assert found is not None
    found, statistics = (row_moments.meaning(s.double(), EPS) for s in (found, statistics))
    assert (found - statistics).norm() <= 1e-5 * statistics.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
def test_parts_add_up(gpu: str, tile: tuple[int, int]) -> None:
    for m, n, k, splits in ((577, 768, 3072, 4), (37, 72, 200, 3), (196, 768, 768, 12)):
        x, w, _, _ = operands(m, n, k, torch.float16, gpu)
        parts = one_tile.parts(x, w, splits, tile)
        truth = x.double() @ w.double().t()
        assert parts.shape[0] <= splits
        assert (parts.double().sum(0) - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.gpu
def test_dependent_launch_changes_no_bit(gpu: str) -> None:
    """A chain in a CUDA graph, each layer reading what the one before wrote; inputs change between replays."""
    weights = [operands(1, 768, 768, torch.float16, gpu)[1] for _ in range(8)]
    x = torch.empty(577, 768, dtype=torch.float16, device=gpu)

    def chain(linear: Any) -> Tensor:
        y = x
        for weight in weights:
            y = linear(y, weight, None, "relu", y)[0] * 0.5  # PyTorch's kernel in between every second time
            y = linear(y, weight, None, "none", None)[0]
        return y

    for linear in (one_tile.linear, hopper.linear):
        recorded = {}
        for on in (False, True):
            with dependent.launches(on), dependent.constants(weights):
                chain(linear)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    result = chain(linear)
                recorded[on] = graph, result
        for _ in range(20):
            x.normal_()
            for graph, result in recorded.values():
                result.zero_()
                graph.replay()
            assert torch.equal(recorded[False][1], recorded[True][1])
            assert recorded[True][1].abs().sum() > 0
