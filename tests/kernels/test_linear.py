"""The linear layers' kernels against float64: at most twice plain PyTorch's own error, on odd sizes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from accelkit.errors import AccelkitWarning, LoweringError
from accelkit.ops import OPERATORS, folded_linear, linear_activation, linear_residual_layer_norm, row_moments

linear = pytest.importorskip("accelkit.kernels.linear", reason="the kernels need Triton")
split = pytest.importorskip("accelkit.kernels.split", reason="the kernels need Triton")
moments = pytest.importorskip("accelkit.kernels.moments", reason="the kernels need Triton")

LOW = [torch.float16, torch.bfloat16]


def near(kernel: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice plain PyTorch's error, and a rounding of the result's dtype (one for all numbers, not for each)."""
    assert kernel.dtype is plain.dtype
    assert kernel.shape == plain.shape
    # float32 sums in another order differ by a few roundings, where 16-bit results hide that
    floor = (4 if kernel.dtype is torch.float32 else 1) * torch.finfo(kernel.dtype).eps
    assert (kernel.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + floor * truth.norm()


def interpretable(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")


def operands(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((m, k), (n, k), (n,), (m, n))
    x, w, b, r = (torch.randn(shape, device=device) for shape in shapes)
    return tuple(t.to(dtype) for t in (x, w / k**0.5, b, r))  # type: ignore[return-value]


SIZES = [(37, 72, 48), (64, 64, 64), (5, 33, 19), (1, 128, 200)]


@pytest.mark.parametrize("activation", linear_activation.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_tiles(device: str, dtype: torch.dtype, activation: str) -> None:
    interpretable(device, dtype)
    config = linear.LinearConfig("tiles", 32, 32, 32, 4, 2)
    for m, n, k in SIZES:
        x, w, b, r = operands(m, n, k, dtype, device)
        wide = [t.double() for t in (x, w, b)]
        for bias, residual in ((b, r), (None, None)):
            arguments = (wide[2] if bias is not None else None, activation, None if residual is None else r.double())
            truth = linear_activation.meaning(wide[0], wide[1], *arguments)
            plain = linear_activation.meaning(x, w, bias, activation, residual)
            near(linear.linear_activation(x, w, bias, activation, residual, None, config), plain, truth)


def test_tiles_take_strided_rows_and_leave_uncounted_rows_out(device: str) -> None:
    config = linear.LinearConfig("tiles", 16, 32, 32, 4, 2)
    x, w, b, _ = operands(48, 40, 64, torch.float16, device)
    strided = torch.cat([x, x], 1)[:, :64]
    rows = torch.tensor([20], dtype=torch.int32, device=device)
    result = linear.linear_activation(strided, w, b, "relu", None, rows, config)
    plain = linear_activation.meaning(x, w, b, "relu")
    near(result[:20], plain[:20], linear_activation.meaning(x.double(), w.double(), b.double(), "relu")[:20])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_split(device: str, dtype: torch.dtype, splits: int) -> None:
    interpretable(device, dtype)
    config = split.SplitConfig(splits, 32, 32, 32, 4, 2)
    for m, n, k in [(37, 72, 200), (5, 33, 96), (32, 64, 64)]:
        x, w, b, r = operands(m, n, k, dtype, device)
        scale, shift = (torch.randn(n, device=device) for _ in range(2))
        arguments = (x, w, b, r, scale, shift)
        truth = linear_residual_layer_norm.meaning(*(t.double() for t in arguments))
        plain = linear_residual_layer_norm.meaning(*arguments)
        for kernel, meant, true in zip(
            split.linear_residual_layer_norm(*arguments, 1e-5, config), plain, truth, strict=True
        ):
            near(kernel, meant, true)


def test_split_without_weights_of_the_norm_or_bias(device: str) -> None:
    x, w, _, r = operands(9, 48, 64, torch.float16, device)
    truth = linear_residual_layer_norm.meaning(x.double(), w.double(), None, r.double(), None, None)
    plain = linear_residual_layer_norm.meaning(x, w, None, r, None, None)
    for kernel, meant, true in zip(
        split.linear_residual_layer_norm(x, w, None, r, None, None, 1e-5), plain, truth, strict=True
    ):
        near(kernel, meant, true)


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_moments(device: str, groups: int) -> None:
    statistics = torch.rand(35, groups, 2, device=device) + 0.1
    truth = row_moments.meaning(statistics.double(), 1e-5)
    near(moments.row_moments(statistics, 1e-5), row_moments.meaning(statistics, 1e-5), truth)


def test_candidates_contain_the_default() -> None:
    for m, n, k in [(18464, 768, 3072), (577, 3072, 768), (1, 1000, 768), (100, 37, 19)]:
        for counted in (False, True):
            problem = linear.LinearProblem(m, n, k, torch.float16, "gelu", False, counted)
            assert linear.default(problem, True, 132) in linear.candidates(problem, True, 132)
        assert split.default(m, n, k, 132) in split.candidates(m, n, k, 132)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Triton whose Gluon is not the one that the Hopper kernel is written for."""
    hopper = pytest.importorskip("accelkit.kernels.linear_hopper")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("module 'gl' has no attribute 'warp_specialize'")

    monkeypatch.setattr(hopper, "linear", refuse)
    yield
    folded_linear.HOPPER_FAILURES.clear()


@pytest.mark.parametrize("counted", [False, True])
def test_without_the_hopper_kernel_others_take_over_and_say_so(refused: None, counted: bool) -> None:
    x, w, b, _ = operands(40, 24, 64, torch.float16, "cpu")
    rows = torch.tensor([33], dtype=torch.int32) if counted else None
    config = linear.LinearConfig("hopper", 128, 128, 64, 4, 5)
    with pytest.warns(AccelkitWarning, match=r"without the Hopper kernel.*has no attribute 'warp_specialize'"):
        result = linear.linear_activation(x, w, b, "gelu", None, rows, config)
    truth = linear_activation.meaning(x.double(), w.double(), b.double(), "gelu")
    near(result[:33], linear_activation.meaning(x, w, b, "gelu")[:33], truth[:33])
    assert "warp_specialize" in folded_linear.HOPPER_FAILURES[x.device]


def test_a_folded_graph_without_the_hopper_kernel_is_an_error(refused: None) -> None:
    x, w, b, _ = operands(40, 64, 64, torch.float16, "cpu")
    with pytest.raises(LoweringError, match=r"refuses the Hopper kernel.*warp_specialize"):
        folded_linear.kernel(x, w, b)


def test_no_rows() -> None:
    x, w, b, _ = operands(0, 64, 64, torch.float16, "cpu")
    result, statistics = folded_linear.kernel(x, w, b, statistics=True)
    assert result.shape == (0, 64)
    assert statistics.shape == (0, 1, 2)


# --- on the GPU that they are for


@pytest.fixture
def hopper() -> str:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for compute capability 9.x")
    return "cuda"


BIG = [(577, 768, 768), (130, 1040, 200), (1, 8, 8), (5000, 2304, 768), (18464, 768, 3072)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tile", [(128, 128), (128, 64), (64, 128), (64, 64)])
def test_hopper(hopper: str, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    config = linear.LinearConfig("hopper", *tile, 64, 4, 4)
    for m, n, k in BIG:
        x, w, b, r = operands(m, n, k, dtype, hopper)
        for activation in (
            linear_activation.ACTIVATIONS if tile == (128, 128) else ("gelu",)
        ):  # each compiles for seconds
            truth = linear_activation.meaning(x.double(), w.double(), b.double(), activation, r.double())
            plain = linear_activation.meaning(x, w, b, activation, r)
            near(linear.linear_activation(x, w, b, activation, r, None, config), plain, truth)
        rows = torch.tensor([m // 2 + 1], dtype=torch.int32, device=hopper)
        counted = linear.linear_activation(x, w, None, "none", None, rows, config)[: m // 2 + 1]
        truth, plain = linear_activation.meaning(x.double(), w.double(), None), linear_activation.meaning(x, w, None)
        near(counted, plain[: m // 2 + 1], truth[: m // 2 + 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(577, 768, 768), (3, 128, 1024), (18464, 3072, 768)])
def test_folded(hopper: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w, b, r = operands(m, n, k, dtype, hopper)

    def moments_of(t: Tensor) -> Tensor:
        t = t.double()
        return torch.stack([t.mean(-1), torch.rsqrt(t.var(-1, unbiased=False) + 1e-5)], -1)

    scale, shift = torch.rand(n, device=hopper) + 0.5, torch.randn(n, device=hopper)
    rest = ("gelu", moments_of(x), w.double().sum(1), r.double(), moments_of(r), scale.double(), shift.double(), True)
    truth, statistics = folded_linear.meaning(x.double(), w.double(), b.double(), *rest)
    # the yardstick: the parts, each in plain PyTorch
    normalised = torch.nn.functional.layer_norm(x, (k,), eps=1e-5)
    plain = linear_activation.meaning(normalised, w, b, "gelu")
    plain = plain + torch.nn.functional.layer_norm(r, (n,), scale.to(dtype), shift.to(dtype), 1e-5)
    low = ("gelu", moments_of(x).float(), w.float().sum(1), r, moments_of(r).float(), scale, shift, True)
    assert OPERATORS["folded_linear"].refusal(x, w, b, *low) is None
    result, found = folded_linear.kernel(x, w, b, *low)
    near(result, plain, truth)
    found, statistics = (row_moments.meaning(s.double(), 1e-5) for s in (found, statistics))
    assert (found - statistics).norm() <= 1e-5 * statistics.norm()  # sums of 64 in float32, each square in one pass
