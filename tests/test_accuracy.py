"""Errors against float64: the measure, the bound, and a reference that widens node by node and writes to nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accelkit.accuracy import check_outputs, reference_outputs, relative_error
from accelkit.capture import capture
from accelkit.measure import peak_memory
from accelkit.precision import BF16, FP16, FP32

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("result", "reference", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.3, 4.4], [3.0, 4.0], 0.1),
        ([NAN, 4.0], [NAN, 4.0], 0.0),
        ([NAN, 4.0], [3.0, 4.0], INF),
        ([3.0, 4.0], [NAN, 4.0], INF),
        ([INF, 4.0], [INF, 4.0], 0.0),
        ([-INF, 4.0], [INF, 4.0], INF),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-9, 0.0], [0.0, 0.0], INF),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_relative_error(result: list[float], reference: list[float], error: float) -> None:
    measured = relative_error(torch.tensor(result), torch.tensor(reference, dtype=torch.float64))
    assert measured == pytest.approx(error, rel=1e-6)


def test_relative_error_of_integers_booleans_and_complex_numbers() -> None:
    assert relative_error(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.25
    assert relative_error(torch.tensor([True, False]), torch.tensor([True, True])) == 0.5
    z = torch.tensor([3 + 4j], dtype=torch.complex64)
    assert relative_error(z * 1.1, z.to(torch.complex128)) == pytest.approx(0.1, rel=1e-5)


@given(st.floats(1e-3, 1e3), st.integers(1, 50))
def test_relative_error_does_not_depend_on_scale_or_order(scale: float, size: int) -> None:
    a, b = torch.randn(size), torch.randn(size, dtype=torch.float64)
    error = relative_error(a, b)
    assert relative_error(a.double() * scale, b * scale) == pytest.approx(error, rel=1e-6)
    assert relative_error(a.flip(0), b.flip(0)) == pytest.approx(error, rel=1e-9)


def one(
    result: torch.Tensor,
    reference: torch.Tensor,
    plain: torch.Tensor | None,
    precision: Any = FP32,
    tolerance: Any = None,
) -> Any:
    (checked,) = check_outputs([result], [reference], None if plain is None else [plain], ["y"], precision, tolerance)
    return checked


def test_the_bound_is_twice_plain_pytorchs_error_and_a_floor() -> None:
    truth = torch.randn(1000, dtype=torch.float64)
    noise = torch.randn(1000, dtype=torch.float64)
    noise *= truth.norm() / noise.norm()
    plain = (truth + 1e-4 * noise).float()
    assert one((truth + 1.9e-4 * noise).float(), truth, plain).ok
    assert not one((truth + 2.2e-4 * noise).float(), truth, plain).ok
    exact = truth.float().double()
    assert one((exact + 5e-7 * noise).float(), exact, exact.float()).ok
    assert not one((exact + 2e-6 * noise).float(), exact, exact.float()).ok


def test_narrow_precisions_have_a_narrow_floor_for_large_outputs() -> None:
    for size, ok in ((1, True), (4096, False)):
        truth = torch.rand(size, dtype=torch.float64) + 1
        assert one((truth * 1.04).float(), truth, truth.float(), BF16).ok is ok
    truth = torch.rand(4096, dtype=torch.float64) + 1
    assert one(truth.bfloat16(), truth, truth.bfloat16(), BF16).ok
    assert one(truth.bfloat16(), truth, None, BF16).ok
    assert not one((truth * 1.08).float(), truth, None, BF16).ok


def test_float64_models_are_held_to_float64() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    assert one(truth * (1 + 1e-15), truth, truth).ok
    assert not one(truth.float().double(), truth, truth).ok


def test_what_overflows_in_plain_pytorch_may_overflow() -> None:
    truth = torch.tensor([1e39, 1.0], dtype=torch.float64)
    plain = torch.tensor([INF, 1.0])
    assert one(torch.tensor([INF, 1.0]), truth, plain).ok
    assert not one(torch.tensor([NAN, 1.0]), truth, plain).ok
    assert not one(torch.tensor([INF, 1.1]), truth, plain).ok
    assert not one(torch.tensor([INF, 1.0]), torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 1.0])).ok


def test_integers_must_agree_as_plain_pytorch_does() -> None:
    truth = torch.arange(10)
    assert one(truth.clone(), truth, truth.clone()).ok
    assert not one(truth + (truth == 3), truth, truth.clone()).ok
    assert one(truth + (truth == 3), truth, truth.clone(), tolerance=0.1).ok


class Conversions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("state", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.mul_(2)
        x[0] = 0.125
        y = self.linear(x.to(torch.float16).float()) + torch.arange(5, dtype=torch.float32) / 3
        return torch.softmax(y, -1, dtype=torch.float32) * self.state


def test_the_reference_is_float64_throughout_and_writes_to_nothing() -> None:
    model, x = Conversions(), torch.randn(3, 5)
    program = capture(model, (x,), {})
    given, state = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    (reference,) = (r for r in reference_outputs(program.graph, (x,)) if r.shape == (3, 5))
    wide, own = x.double(), model.linear
    wide[0] = 0.125
    y = wide @ own.weight.double().t() + own.bias.double() + torch.arange(5, dtype=torch.float64) / 3
    assert reference.dtype == torch.float64
    torch.testing.assert_close(reference, torch.softmax(y, -1).detach() * 2, rtol=1e-14, atol=0)
    assert torch.equal(x, given)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_reading_bits_has_no_float64_form() -> None:
    class Bits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(torch.int32) + 1

    x = torch.randn(4)
    with pytest.raises(NotImplementedError, match="reads the bits of a tensor"):
        reference_outputs(capture(Bits(), (x,), {}).graph, (x,))


def test_peak_memory_holds_no_float64_copy_of_all_weights() -> None:
    width, layers = 1200, 16
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    x = torch.randn(1, width)
    program = capture(model, (x,), {})
    one_wide = width * width * 8
    with peak_memory(0.001) as memory:
        reference_outputs(program.graph, (x,))
    assert memory.peak_bytes - memory.before_bytes < 8 * one_wide  # all of them would be sixteen


def test_plain_pytorch_that_overflows_is_no_yardstick() -> None:
    reference = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    result = reference.float() * (1 + 2e-3)
    some, none = torch.tensor([1.001, 2.002, torch.nan, torch.inf]), torch.full((4,), torch.nan)
    (checked,) = check_outputs([result], [reference], [some], ["y"], FP16, None)
    assert checked.yardstick == pytest.approx(1e-3, rel=1e-2)  # where it is finite
    (checked,) = check_outputs([result], [reference], [none], ["y"], FP16, None)
    assert (checked.yardstick, checked.allowed) == (None, 8 * FP16.epsilon)
    assert checked.ok
