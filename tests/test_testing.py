"""accelkit.testing: each helper passes where it should, and fails with words that say why where it should not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

from accelkit import Dim
from accelkit.errors import PassError
from accelkit.pass_api import GraphPass, Match, PassResult, RewritePass
from accelkit.testing import (
    apply,
    assert_idempotent,
    assert_left_alone,
    assert_same_numbers,
    float64_reference,
    graph_text,
    run,
    trace,
    units_in_last_place,
)  # fmt: skip

aten = torch.ops.aten


@dataclass(frozen=True)
class DoubleToAdd(RewritePass):
    """x * 2 -> x + x"""

    def pattern(self, x: Any) -> Any:
        return aten.mul.Tensor(x, 2)

    def replacement(self, x: Any) -> Any:
        return aten.add.Tensor(x, x)

    def check(self, match: Match) -> None:
        match.require(match.value("x").dtype != torch.float64, "float64 is left alone")


@dataclass(frozen=True)
class AddsForever(RewritePass):
    """x + 1 -> (x + 1) + 0, again and again"""

    def pattern(self, x: Any) -> Any:
        return aten.add.Tensor(x, 1)

    def replacement(self, x: Any) -> Any:
        return aten.add.Tensor(aten.add.Tensor(x, 1), 0)


@dataclass(frozen=True)
class Scale(RewritePass):
    """x * 2 -> x * factor"""

    factor: float

    def pattern(self, x: Any) -> Any:
        return aten.mul.Tensor(x, 2)

    def replacement(self, x: Any) -> Any:
        return aten.mul.Tensor(x, self.factor)


@dataclass(frozen=True)
class AsksForSize(GraphPass):
    """Freezes a dynamic size, by asking for it."""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        if graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0] >= 5:
            result.refused("x", "too long")
        return result


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Increment(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_left_alone() -> None:
    assert_left_alone(DoubleToAdd(), Double(), torch.randn(3).double(), reason="float64 is left")
    assert_left_alone(DoubleToAdd(), Increment(), torch.randn(3), reason=None)


def test_left_alone_fails_with_what_happened() -> None:
    with pytest.raises(AssertionError, match=r"double_to_add rewrote \['mul'\] in\n%x: f32\[3\] = input"):
        assert_left_alone(DoubleToAdd(), Double(), torch.randn(3), reason=None)
    with pytest.raises(AssertionError, match=r"does not refuse with 'integers', but \['float64 is left alone'\]"):
        assert_left_alone(DoubleToAdd(), Double(), torch.randn(3).double(), reason="integers")
    with pytest.raises(AssertionError, match="expected nothing to refuse"):
        assert_left_alone(DoubleToAdd(), Double(), torch.randn(3).double(), reason=None)


def test_idempotent() -> None:
    record = assert_idempotent(DoubleToAdd(), Double(), torch.randn(3, 4), dynamic_shapes={"x": {0: Dim("rows")}})
    assert record.rewrites == ("mul",)
    with pytest.raises(AssertionError, match=r"a second run of adds_forever rewrote \["):
        assert_idempotent(AddsForever(), Increment(), torch.randn(3))
    with pytest.raises(AssertionError, match="double_to_add finds nothing to do"):
        assert_idempotent(DoubleToAdd(), Increment(), torch.randn(3))


def test_frozen_size_is_found() -> None:
    with pytest.raises(PassError, match="shape guard"):
        assert_idempotent(
            [AsksForSize(), DoubleToAdd()], Double(), torch.randn(3, 4), dynamic_shapes={"x": {0: Dim("rows")}}
        )


def test_same_numbers() -> None:
    assert_same_numbers(DoubleToAdd(), Double(), torch.randn(50))
    assert_same_numbers(Scale(2 + 2**-20), Double(), torch.randn(50), ulps=16)
    assert_same_numbers(Scale(2 + 2**-20), Double(), torch.randn(50), times=2, floor=2**-20)


def test_same_numbers_fails_with_the_distance() -> None:
    with pytest.raises(AssertionError, match="output 0 is 4 units in the last place off, 0 allowed"):
        assert_same_numbers(Scale(2 * (1 + 2**-21)), Double(), torch.ones(3))
    with pytest.raises(AssertionError, match=r"relative error of 0\.5, 0\.1 allowed"):
        assert_same_numbers(Scale(3), Double(), torch.randn(50), times=2, floor=0.1)
    with pytest.raises(AssertionError, match="units in the last place"):
        assert_same_numbers(Scale(math.nan), Double(), torch.randn(3), ulps=10**6)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same_numbers(Scale(math.nan), Double(), torch.randn(3), times=2, floor=0.5)
    with pytest.raises(AssertionError, match="rewrote nothing"):
        assert_same_numbers(DoubleToAdd(), Increment(), torch.randn(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_units_in_last_place(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    one, zero, infinity = (torch.tensor([v], dtype=dtype) for v in (1.0, 0.0, math.inf))
    assert units_in_last_place(one, one) == 0
    assert units_in_last_place(one + info.eps, one) == 1
    assert units_in_last_place(one, one - info.eps) == 2  # below 1 the spacing is half
    assert units_in_last_place(-zero, zero) == 0
    assert units_in_last_place(infinity, torch.tensor([info.max], dtype=dtype)) == 1
    assert units_in_last_place(zero + math.nan, zero + math.nan) == 0
    assert units_in_last_place(zero + math.nan, zero) > 2**60
    assert units_in_last_place(one, -one) == 2 * units_in_last_place(one, zero)
    assert units_in_last_place(one[:0], one[:0]) == 0
    with pytest.raises(AssertionError, match="is not"):
        units_in_last_place(one, one[:0])


def test_units_in_last_place_of_integers() -> None:
    numbers = torch.arange(3)
    assert units_in_last_place(numbers, numbers.clone()) == 0
    assert units_in_last_place(numbers, numbers + 1) > 2**60


def test_float64_reference_leaves_the_module_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    result = float64_reference(model, torch.randn(2, 3))[0]
    assert result.dtype == torch.float64
    assert model[0].weight.dtype == torch.float32
    assert model.training


def test_trace_apply_and_run() -> None:
    x = torch.randn(3)
    graph = trace(Double(), x)
    assert apply([DoubleToAdd(), AddsForever()], graph).name == "adds_forever"
    assert graph_text(graph).splitlines()[1:] == ["%0: f32[3] = aten.add.Tensor(%x, %x)", "return (%0)"]
    assert torch.equal(run(graph, x)[0], x + x)
