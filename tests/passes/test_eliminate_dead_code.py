"""EliminateDeadCode: what nobody reads goes, with the weights that nobody names."""

from __future__ import annotations

import hypothesis
import torch
import torch.nn.functional as F
from pass_checks import check, dtypes, graph_of, quick, refused, shapes, values
from torch import nn

from accelkit.testing import apply, graph_text, run
from accelkit_passes.eliminate_dead_code import EliminateDeadCode


def leftovers(self, x):
    x.exp().relu()
    F.dropout(x, 0.1, False)
    F.dropout(x, 0.1, True)
    self.w * 2
    return x + self.scale


def test_golden() -> None:
    graph = graph_of(leftovers, torch.randn(3, 3), w=torch.randn(3), scale=nn.Parameter(torch.randn(3)))
    before = graph_text(graph)
    record = apply(EliminateDeadCode(), graph)
    assert (
        before
        == """\
%scale: f32[3] = attribute
%w: f32[3] = attribute
%x: f32[3, 3] = input
%0: f32[3, 3] = aten.exp(%x)
%1: f32[3, 3] = aten.relu(%0)
%2: f32[3, 3] = aten.dropout(%x, 0.1, False)
%3: f32[3, 3] = aten.dropout(%x, 0.1, True)
%4: f32[3] = aten.mul.Tensor(%w, 2)
%5: f32[3, 3] = aten.add.Tensor(%x, %scale)
return (%5)"""
    )
    assert (
        graph_text(graph)
        == """\
%scale: f32[3] = attribute
%x: f32[3, 3] = input
%0: f32[3, 3] = aten.dropout(%x, 0.1, True)
%1: f32[3, 3] = aten.add.Tensor(%x, %scale)
return (%1)"""
    )
    assert "attribute w" in record.rewrites
    assert not hasattr(graph, "w")
    assert [r.node for r in record.refusals] == ["dropout_1"]


def test_random_stays() -> None:
    x = torch.randn(3)
    (reason,) = refused(EliminateDeadCode(), graph_of(lambda self, x: (torch.rand(3), x * 2)[1], x), x)
    assert reason == "it is random: without it, the random operators after it would draw other numbers"


def test_what_is_read_stays() -> None:
    x = torch.randn(3)
    assert (
        refused(EliminateDeadCode(), graph_of(lambda self, x: x.view(3, 1).sum(1) * self.w, x, w=torch.randn(1)), x)
        == []
    )


def test_writes_to_buffers_stay() -> None:
    def counting(self, x):
        self.calls += 1
        return x * 2

    calls = torch.zeros(())
    graph = graph_of(counting, torch.randn(3), calls=calls)
    apply(EliminateDeadCode(), graph)
    assert "aten.copy_(%calls" in graph_text(graph)
    before = graph.calls.clone()
    run(graph, torch.randn(3))
    assert graph.calls == before + 1


def test_unused_inputs_stay() -> None:
    x, y = torch.randn(3), torch.randn(3)
    graph = graph_of(lambda self, x, y: x * 2, x, y)
    assert refused(EliminateDeadCode(), graph, x, y) == []
    assert "%y: f32[3] = input" in graph_text(graph)


def test_a_shared_weight_stays_under_the_name_that_is_read() -> None:
    weight = nn.Parameter(torch.randn(3))
    x = torch.randn(3)
    graph = graph_of(lambda self, x: x * self.a, x, a=weight)
    graph.register_parameter("tied", weight)
    record = check(EliminateDeadCode(), graph, x)
    assert record.rewrites == ("attribute tied",)
    assert graph.a is weight


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x - 1, (x,))


def test_the_branches_of_a_condition_keep_what_they_hold() -> None:
    from accelkit.testing import trace

    x = torch.randn(2, 3)
    check(EliminateDeadCode(), trace(Branches().eval(), x), x, rewrites=0)


def test_dynamic_sizes_that_nobody_reads_go() -> None:
    x = torch.randn(3, 4)
    graph = graph_of(lambda self, x: (x.view(x.shape[0], 2, 2), x * 2)[1], x, batch=True)
    check(EliminateDeadCode(), graph, x)
    assert "sym_size" not in graph_text(graph)
    assert run(graph, torch.ones(5, 4))[0].shape == (5, 4)


@quick
@hypothesis.given(shapes, dtypes)
def test_numbers(shape: list[int], dtype: torch.dtype) -> None:
    def function(self, x):
        y, _, z = x * 2, self.w + x, x.sum()
        return y + self.w, (z + y)[0]

    x = values(shape, dtype)
    check(EliminateDeadCode(), graph_of(function, x, w=values([1], dtype)), x, rewrites=1)
