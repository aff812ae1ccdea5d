"""Histograms that lose no count, and the limits that calibrators make of them."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import accelkit
from accelkit import InputError, Int8
from accelkit.precision import as_precision, needs_calibration
from accelkit.quantization import MSE, Entropy, Histogram, Max, Percentile
from accelkit.quantization.calibrators import Calibrator, squared_error
from accelkit.quantization.histogram import BINS

quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
ALL = (Max(), Percentile(), Percentile(99.0), MSE(), Entropy())


def histogram(*tensors: torch.Tensor) -> Histogram:
    made = Histogram()
    for tensor in tensors:
        made.add(tensor)
    return made


@quick
@hypothesis.given(
    st.integers(0, 1000), st.lists(st.floats(-12, 12), min_size=1, max_size=6), st.randoms(use_true_random=False)
)
def test_order_and_cuts_change_nothing(seed, exponents, shuffle):
    torch.manual_seed(seed)
    tensors = [torch.randn(50) * 2.0**e for e in exponents]
    whole = histogram(torch.cat(tensors))
    shuffled = list(tensors)
    shuffle.shuffle(shuffled)
    cut = histogram(*(piece for t in shuffled for piece in t.split(7)))
    assert torch.equal(whole.counts, cut.counts)
    assert (whole.exponent, whole.minimum, whole.maximum) == (cut.exponent, cut.minimum, cut.maximum)
    assert whole.total == 50 * len(exponents)


def test_each_count_lies_where_it_would_have_from_the_start():
    small, large = torch.tensor([0.3, -0.3, 0.0, 1e-3]), torch.tensor([-700.0])
    made = histogram(small, large)
    for value in (*small, *large):
        assert made.counts[BINS + math.floor(float(value) / made.width)] >= 1
    assert made.exponent == 10
    assert made.magnitudes().sum() == 5
    assert made.largest == 700.0


def test_nothing_and_zeros():
    assert histogram(torch.empty(0)).total == 0
    zeros = histogram(torch.zeros(5), torch.zeros(3))
    assert (zeros.total, zeros.largest) == (8, 0.0)
    assert all(c.threshold(zeros) == 0 and c.limits(zeros) == (0, 0) for c in ALL)
    zeros.add(torch.tensor([4.0]))
    assert zeros.magnitudes()[0] == 8


def test_nan_and_infinity_are_counted_apart():
    made = histogram(torch.tensor([1.0, math.nan, math.inf, -2.0]))
    assert (made.non_finite, made.total, made.minimum, made.maximum) == (2, 2, -2.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    values = torch.randn(100).to(dtype)
    assert torch.equal(histogram(values).counts, histogram(values.double()).counts)


def test_max_clips_nothing():
    assert Max().threshold(histogram(torch.tensor([1.0, -3.5]))) == 3.5
    assert Max().limits(histogram(torch.tensor([1.0, 3.5]))) == (0.0, 3.5)  # 0 is held exactly by every range


def test_percentile_against_the_sorted_values():
    torch.manual_seed(0)
    values = torch.randn(20000)
    for percent in (50.0, 99.0, 99.9, 100.0):
        exact = float(values.abs().double().quantile(percent / 100))
        made = histogram(values)
        assert abs(Percentile(percent).threshold(made) - exact) <= 2 * made.width + 1e-3 * exact
    assert Percentile(100).threshold(made) == Max().threshold(made)


@pytest.mark.parametrize("kind", [MSE(), Entropy()])
def test_an_outlier_is_clipped(kind):
    torch.manual_seed(0)
    values = torch.randn(100000)
    values[0] = 60.0
    made = histogram(values)
    assert 3.0 < kind.threshold(made) < 59.0


def test_mse_is_the_least_squared_error():
    torch.manual_seed(0)
    values = torch.randn(5000) ** 3
    made = histogram(values)

    def true_error(t: float) -> float:
        step = t / 127
        return float((values - (values / step).round().clamp(-127, 127) * step).square().mean())

    best = MSE().threshold(made)
    assert all(true_error(best) <= 1.02 * true_error(made.largest * n / 16) for n in range(1, 17))
    assert squared_error(made, -best, best) == pytest.approx(true_error(best), rel=0.02)


def test_entropy_of_what_fits_is_everything():
    assert Entropy().threshold(histogram(torch.linspace(-1, 1, 20001))) == pytest.approx(1.0, abs=0.05)


def test_values_are_frozen_equal_and_written_out():
    assert Percentile(99.9) == Percentile(99.9) != Percentile(99.99)
    assert all(accelkit.quantization.as_calibrator(c.to_json()) == c for c in ALL)
    assert set(Calibrator.known) == {"max", "percentile", "mse", "entropy"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Int8("ft3"), "unknown INT8 scheme 'ft3'; did you mean 'ft2'\\? Known INT8 schemes: dynamic, ft1, ft2, qdq"),
        (lambda: Int8(calibrator="maxx"), "unknown calibrator 'maxx'; did you mean 'max'\\? Known calibrators: entropy, max,"),
        (lambda: Int8(calibrator=Max), r"did you mean Max\(\)\?"),
        (lambda: Int8(calibrator=3), "unknown calibrator 3"),
        (lambda: Int8(smooth=1.5), "alpha is from 0 to 1"),
        (lambda: Int8(activations="s16"), "known are None, s8, u8"),
        (lambda: Int8(family="gpt"), "known are auto, vit, bert"),
        (lambda: Int8(keep=(3,)), "a tuple of patterns"),
        (lambda: Percentile(0), "above 0 and at most 100"),
        (lambda: MSE(1), "at least 2"),
        (lambda: Entropy(0), "at least 1"),
        (lambda: as_precision(Int8), r"did you mean Int8\(\)\?"),
        (lambda: as_precision("int4"), "Known precisions: bf16, fp16, fp32, fp8, int8, tf32"),
    ],
)  # fmt: skip
def test_wrong_values_list_what_is_known(wrong, words):
    with pytest.raises(InputError, match=words):
        wrong()


def test_precisions_are_values():
    value = Int8("ft2", calibrator=MSE(64), smooth=0.5, keep="encoder.layer.11.*", activations="u8", family="bert")
    assert as_precision(value.to_json()) == value
    assert as_precision("int8") == Int8() == Int8("qdq", Percentile(99.99))
    assert str(Int8()) == "int8"
    assert repr(Int8("ft1", "max")) == "Int8(scheme='ft1', calibrator=Max())"
    assert value.keep == ("encoder.layer.11.*",)
    assert not needs_calibration(Int8("dynamic"))
    assert needs_calibration(Int8("dynamic", smooth=0.5))
    assert not needs_calibration(as_precision("fp16"))
    assert (value.name, value.dtype) == ("int8", torch.float32)
    assert as_precision(accelkit.Fp8().to_json()) == as_precision("fp8")
