"""linear_activation, folded_linear, row_moments and patch_embedding: their meanings, fakes and refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

import accelkit.ops
from accelkit.ops.linear_activation import ACTIVATIONS
from accelkit.testing import relative_error

ops = torch.ops.accelkit
LOW = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize(("activation", "dtype"), itertools.product(ACTIVATIONS, LOW))
def test_linear_activation(activation: str, dtype: torch.dtype) -> None:
    x, w, b, r = (
        randn(2, 5, 24, dtype=dtype),
        randn(7, 24, dtype=dtype),
        randn(7, dtype=dtype),
        randn(2, 5, 7, dtype=dtype),
    )
    truth = ACTIVATIONS[activation](F.linear(x.double(), w.double(), b.double())) + r.double()
    assert relative_error(ops.linear_activation(x, w, b, activation, r), truth) < LOW[dtype]
    opcheck(ops.linear_activation.default, (x, w, b, activation, r))
    opcheck(ops.linear_activation.default, (x.transpose(0, 1), w, None, activation))


def test_an_unknown_activation_is_an_error_that_lists_the_known() -> None:
    x, w = randn(2, 8), randn(4, 8)
    with pytest.raises(ValueError, match="gelu_tanh, relu, silu, not 'swish'"):
        ops.linear_activation(x, w, None, "swish")
    with pytest.raises(ValueError, match="gelu_tanh, relu, silu, not 'swish'"):
        ops.folded_linear(x, w, None, "swish")


def moments_of(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.stack([x.mean(-1), torch.rsqrt(x.var(-1, unbiased=False) + eps)], -1)


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 128), (1, 192)])
def test_row_moments_put_groups_together(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64) * 3 + 7
    groups = x.unflatten(-1, (-1, 64))
    means = groups.mean(-1)
    statistics = torch.stack([means, (groups - means[..., None]).square().sum(-1)], -1)
    assert relative_error(ops.row_moments(statistics, 1e-5), moments_of(x, 1e-5)) < 1e-12
    opcheck(ops.row_moments.default, (statistics.float(), 1e-5))


@pytest.mark.parametrize(("activation", "dtype"), itertools.product(("none", "gelu"), LOW))
def test_a_folded_linear_is_layer_norm_and_linear(activation: str, dtype: torch.dtype) -> None:
    x, w = randn(2, 5, 128, dtype=dtype) * 2 + 1, randn(64, 128, dtype=dtype)
    b, scale, shift = randn(64), torch.rand(128) + 0.5, randn(128)
    residual, r_scale, r_shift = randn(2, 5, 64, dtype=dtype) + 1, torch.rand(64) + 0.5, randn(64)

    def norm(t: torch.Tensor, s: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(t.double(), (t.shape[-1],), s.double(), h.double(), 1e-6)

    truth = ACTIVATIONS[activation](F.linear(norm(x, scale, shift), w.double(), b.double()))
    truth = truth + norm(residual, r_scale, r_shift)
    folded = (w.float() * scale).to(dtype)
    moments, r_moments = (moments_of(t.double(), 1e-6).float() for t in (x, residual))
    arguments = (x, folded, b + w.float() @ shift, activation, moments, folded.float().sum(1))
    result, statistics = ops.folded_linear(*arguments, residual, r_moments, r_scale, r_shift, True)
    assert relative_error(result, truth) < LOW[dtype]
    assert relative_error(ops.row_moments(statistics, 1e-6), moments_of(truth, 1e-6)) < 4 * LOW[dtype]
    opcheck(ops.folded_linear.default, (*arguments, residual, r_moments, r_scale, r_shift, True))
    opcheck(ops.folded_linear.default, (x, w, None))


def test_moments_need_column_sums() -> None:
    x, w = randn(3, 64), randn(4, 64)
    with pytest.raises(ValueError, match="moments need column_sums"):
        ops.folded_linear(x, w, None, "none", moments_of(x, 0.0))


@pytest.mark.parametrize("size", [(12, 8), (13, 11)])
@pytest.mark.parametrize("dtype", LOW)
def test_patch_embedding_is_a_convolution(size: tuple[int, int], dtype: torch.dtype) -> None:
    image, w, b = randn(2, 3, *size, dtype=dtype), randn(6, 3, 4, 4, dtype=dtype), randn(6, dtype=dtype)
    truth = F.conv2d(image.double(), w.double(), b.double(), stride=4).flatten(2).transpose(1, 2)
    assert relative_error(ops.patch_embedding(image, w, b), truth) < LOW[dtype]
    opcheck(ops.patch_embedding.default, (image, w, None))


FOLD_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.randn(3, 64)}, "NVIDIA's Hopper"),
]


@pytest.mark.parametrize(("changed", "reason"), FOLD_REFUSALS)
def test_kernels_say_why_they_refuse(changed: dict[str, Any], reason: str) -> None:
    why = accelkit.ops.OPERATORS["folded_linear"].refusal(changed["x"], torch.randn(64, 64), None)
    assert why is not None
    assert reason in why
