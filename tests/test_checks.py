"""The proof in the report: judged against float64 beside plain PyTorch, random models told, timings taken."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planted import Planted, optimize
from torch import fx, nn

from accelkit import AccuracyError
from accelkit import graph as graphs
from accelkit.accuracy import relative_error
from accelkit.pass_api import GraphPass, PassResult

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": self.layers(x), "index": self.layers(x).argmax(-1)}


def test_the_yardstick_of_bf16_is_the_model_cast_by_hand() -> None:
    model, x = Deep(), torch.randn(8, 32)
    fast = optimize(model, x, passes=None, precision="bf16")
    accuracy = {o.name: o for o in fast.report().variants[0].accuracy}
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())["y"]
        narrow = copy.deepcopy(model).bfloat16()(x.bfloat16())["y"]
    measured = accuracy["output['y']"]
    assert measured.yardstick == pytest.approx(relative_error(narrow, truth), rel=1e-3)
    assert 1e-4 < measured.error < 3e-2
    assert next(model.parameters()).dtype == torch.float32


def test_errors_and_timings_are_in_the_report() -> None:
    model, x = Deep(), torch.randn(8, 32)
    variant = optimize(model, x).report().variants[0]
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())["y"]
        assert variant.accuracy[0].error == pytest.approx(relative_error(model(x)["y"], truth), rel=1e-6)
    assert set(variant.timings) == {"original", "compiled"}
    assert variant.timings["original"].rounds >= 3
    assert variant.speedup is not None
    assert variant.peak_memory_bytes >= 0


def test_random_models_are_noted_and_not_compared() -> None:
    class MonteCarlo(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(x, 0.5, training=True)

    state = torch.get_rng_state()
    fast = optimize(MonteCarlo(), torch.ones(1000))
    assert torch.equal(torch.get_rng_state(), state)
    variant = fast.report().variants[0]
    assert variant.accuracy == []
    assert "not compared with float64: the model is random by itself (dropout" in variant.notes[0]
    first, second = fast(torch.ones(1000)), fast(torch.ones(1000))
    assert not torch.equal(first, second)
    assert set(first.tolist()) == {0.0, 2.0}


def test_a_model_that_cannot_be_cast_has_a_fixed_bound() -> None:
    class Baked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return self.linear(x)

    variant = optimize(Baked(), torch.randn(2, 4), precision="bf16", passes=None).report().variants[0]
    assert any("plain PyTorch cannot run this model in torch.bfloat16 (float32 only)" in n for n in variant.notes)
    assert variant.accuracy[0].yardstick is None


def test_an_operator_without_float64_is_compared_with_plain_pytorch() -> None:
    class Bits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(torch.int32)

    variant = optimize(Bits(), torch.randn(4)).report().variants[0]
    assert any("compared with plain PyTorch, since an operator has no float64 form" in n for n in variant.notes)
    with pytest.raises(AccuracyError, match=r"output is off by 1.00e\+00"):
        optimize(Bits(), torch.randn(4), target=Planted(spoil=lambda results, inputs: [results[0] + 1]))


def test_a_program_that_is_not_the_model_is_caught() -> None:
    class Flag(nn.Module):
        """Asks what export does not see in the same way: whether it is being exported."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if torch.compiler.is_compiling() else x * 3

    with pytest.raises(AccuracyError, match=r"captured program computes output other than the model itself .*3.33e-01"):
        optimize(Flag(), torch.randn(4))
    assert optimize(Flag(), torch.randn(4), tolerance=1e-5) is not None


def test_building_leaves_state_and_statistics_as_they_were() -> None:
    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("variance", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(x, self.mean, self.variance, training=True)

    model = Statistics()
    own = copy.deepcopy(model)
    fast = optimize(model, torch.randn(8, 4))
    assert torch.equal(model.mean, torch.zeros(4))
    assert torch.equal(model.variance, torch.ones(4))
    x = torch.randn(8, 4)
    torch.testing.assert_close(fast(x), own(x))
    torch.testing.assert_close(model.mean, own.mean)
    torch.testing.assert_close(model.variance, own.variance)


@dataclass(frozen=True)
class Negated(GraphPass):
    """x -> -x for the rows `negated`; declares that of the rows `open`."""

    negated: tuple[float, ...]
    open: tuple[bool, ...]

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        ((output,),) = graph.graph.output_node().args
        name = graphs.set_attribute(graph, "signs", 1 - 2 * torch.tensor(self.negated)[:, None])
        with graph.graph.inserting_before(graph.graph.output_node()):
            signs = graph.graph.get_attr(name)
            changed = graph.graph.call_function(torch.ops.aten.mul.Tensor, (output, signs))
        graph.graph.output_node().args = ((changed,),)
        result.rewrote(changed)
        result.leaves_open(0, lambda x: ~torch.tensor(self.open), "by design")
        return result


def test_what_a_pass_leaves_open_is_not_compared_and_the_rest_is() -> None:
    model, x = nn.Linear(4, 5), torch.randn(3, 4)
    fast = optimize(model, x, passes=[Negated((0, 1, 0), (False, True, False))])
    variant = fast.report().variants[0]
    assert variant.accuracy[0].error < 1e-6
    assert "compared at 2 of 3 positions, the others are no results (by design)" in variant.notes[0]
    with torch.no_grad():
        assert torch.allclose(fast(x)[1], -model(x)[1])
    with pytest.raises(AccuracyError):
        optimize(model, x, passes=[Negated((1, 1, 0), (False, True, False))])
