"""A pass that changes what the model computes, on request: every other pass is still held to the model, and it is told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from planted import Planted, optimize
from torch import Tensor, fx, nn

from accelkit import AccuracyError
from accelkit.pass_api import GraphPass, PassResult

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")
aten = torch.ops.aten
X = torch.rand(4, 8) + 0.5


class Square(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), dropout

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.dropout(self.linear(x), self.dropout, training=self.dropout > 0)
        return aten.mul.Tensor(y, y), y.argmax(-1)


@dataclass(frozen=True)
class Cubed(GraphPass):
    """y * y -> y * (y * y), said or unsaid."""

    said: bool = True

    @property
    def changes_meaning(self) -> str | None:
        return "cubes, not squares" if self.said else None

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        (node,) = graph.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        with graph.graph.inserting_before(node):
            square = graph.graph.call_function(aten.mul.Tensor, node.args)
        node.args = (node.args[0], square)
        result.rewrote(node)
        return result


@dataclass(frozen=True)
class Scaled(GraphPass):
    """A pass with a mistake: the linear layer's result times `by`."""

    by: float = 1.01

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        (node,) = graph.graph.find_nodes(op="call_function", target=aten.linear.default)
        with graph.graph.inserting_after(node):
            scaled = graph.graph.call_function(aten.mul.Scalar, (node, self.by))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        result.rewrote(node)
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_errors_are_against_what_was_asked_for(precision: str) -> None:
    passes = ("set_precision", Cubed()) if precision == "bf16" else (Cubed(),)
    if precision == "bf16":
        from accelkit_passes.set_precision import SetPrecision

        passes = (SetPrecision(precision="bf16"), Cubed())
    fast = optimize(Square(), X, passes=passes, precision=precision)
    variant = fast.report().variants[0]
    assert all(output.ok for output in variant.accuracy)
    assert variant.accuracy[0].yardstick > 0
    assert variant.notes[:2] == [
        "cubed changes what the model computes, as asked: cubes, not squares; inputs that no engine covers run on the "
        "model as it was",
        variant.notes[1],
    ]
    assert variant.notes[1].startswith("errors are against a float64 run of the graph after cubed; its distance")
    assert variant.notes[1].endswith("output[1] 0.00e+00")


def test_a_change_that_is_not_said_is_an_error() -> None:
    with pytest.raises(AccuracyError, match=r"output\[0\] is off by"):
        optimize(Square(), X, passes=(Cubed(said=False),))


def test_a_wrong_pass_before_the_change_is_caught() -> None:
    with pytest.raises(
        AccuracyError, match=r"the passes before cubed compute something else than the model: output\[0\]"
    ):
        optimize(Square(), X, passes=(Scaled(), Cubed()))


def test_a_wrong_pass_after_the_change_is_caught() -> None:
    with pytest.raises(AccuracyError, match=r"further from float64 than allowed: output\[0\] is off by 3.03e-02"):
        optimize(Square(), X, passes=(Cubed(), Scaled()))


def test_a_wrong_engine_is_caught() -> None:
    target = Planted(spoil=lambda results, inputs: [results[0], results[1] + 1])
    with pytest.raises(AccuracyError, match=r"output\[1\] is off by 1.00e\+00"):
        optimize(Square(), X, passes=(Cubed(),), target=target)


def test_it_is_told_of_a_random_model_too() -> None:
    notes = optimize(Square(0.5), X, passes=(Cubed(),)).report().variants[0].notes
    assert "cubed changes what the model computes" in notes[0]
    assert "the model is random by itself" in notes[1]


def test_without_float64_nothing_is_compared() -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return aten.mul.Tensor(x, x).view(torch.int32)

    variant = optimize(Bits(), X, passes=(Cubed(),)).report().variants[0]
    assert variant.accuracy == []
    assert any(
        n.startswith("not compared: the model is changed on request, and an operator has no float64")
        for n in variant.notes
    )


def test_where_nothing_was_rewritten_nothing_is_told() -> None:
    @dataclass(frozen=True)
    class Idle(Cubed):
        def run(self, graph: fx.GraphModule) -> PassResult:
            return PassResult()

    variant = optimize(Square(), X, passes=(Idle(),)).report().variants[0]
    assert not any("changes what the model computes" in note for note in variant.notes)
