"""EliminateCommonSubexpressions: what is computed twice is computed once."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from pass_checks import check, dtypes, graph_of, quick, refused, shapes, values
from torch import nn

from accelkit.testing import apply, graph_text, run
from accelkit_passes.eliminate_common_subexpressions import EliminateCommonSubexpressions

aten = torch.ops.aten


def twice(self, x, y):
    return x.relu() + 1, x.relu() * self.w + y.view(y.shape[0], 3, 1).sum(), x.view(x.shape[0], 3, 1) * 2


def test_golden() -> None:
    graph = graph_of(twice, torch.randn(3, 3), torch.randn(3, 3), batch=True, w=torch.randn(3))
    x = graph.graph.find_nodes(op="placeholder")[0]
    (view,) = (node for node in x.users if node.target is aten.view.default)
    with graph.graph.inserting_before(view):  # torch.export has merged the sizes already
        size = graph.graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = x.meta["val"].shape[0]
    view.args = (x, [size, 3, 1])
    before = graph_text(graph).replace(str(size.meta["val"]), "s0")
    apply(EliminateCommonSubexpressions(), graph)
    assert (
        before
        == """\
%w: f32[3] = attribute
%x: f32[s0, 3] = input
%y: f32[s0, 3] = input
%0: s0 = aten.sym_size.int(%y, 0)
%1: f32[s0, 3] = aten.relu(%x)
%2: f32[s0, 3] = aten.add.Tensor(%1, 1)
%3: f32[s0, 3] = aten.relu(%x)
%4: f32[s0, 3] = aten.mul.Tensor(%3, %w)
%5: f32[s0, 3, 1] = aten.view(%y, [%0, 3, 1])
%6: f32[] = aten.sum(%5)
%7: f32[s0, 3] = aten.add.Tensor(%4, %6)
%8: s0 = aten.sym_size.int(%x, 0)
%9: f32[s0, 3, 1] = aten.view(%x, [%8, 3, 1])
%10: f32[s0, 3, 1] = aten.mul.Tensor(%9, 2)
return (%2, %7, %10)"""
    )
    assert (
        graph_text(graph).replace(str(size.meta["val"]), "s0")
        == """\
%w: f32[3] = attribute
%x: f32[s0, 3] = input
%y: f32[s0, 3] = input
%0: s0 = aten.sym_size.int(%y, 0)
%1: f32[s0, 3] = aten.relu(%x)
%2: f32[s0, 3] = aten.add.Tensor(%1, 1)
%3: f32[s0, 3] = aten.mul.Tensor(%1, %w)
%4: f32[s0, 3, 1] = aten.view(%y, [%0, 3, 1])
%5: f32[] = aten.sum(%4)
%6: f32[s0, 3] = aten.add.Tensor(%3, %5)
%7: f32[s0, 3, 1] = aten.view(%x, [%0, 3, 1])
%8: f32[s0, 3, 1] = aten.mul.Tensor(%7, 2)
return (%2, %6, %8)"""
    )
    assert run(graph, torch.randn(5, 3), torch.randn(5, 3))[2].shape == (5, 3, 1)


SHARED = "the same as sin, but two outputs would share memory"
LEFT_ALONE = {
    "other numbers": (lambda self, x: x.sin() * 1 + x.sin() * 1.0, 1, None),
    "minus zero": (lambda self, x: torch.cos(x + 0.0) + torch.cos(x + -0.0), 0, None),
    "other order": (lambda self, x: (x - self.w) * (self.w - x), 0, None),
    "two outputs": (lambda self, x: (x.sin(), x.sin()), 0, SHARED),
    "views of two": (lambda self, x: (x.sin()[0], x.sin()[1]), 0, SHARED),
    "a size at run time": (
        lambda self, x: torch.nonzero(x > 0).sum() + torch.nonzero(x > 0).sum(), 1,
        "the same as nonzero, but the size of its result is known only at run time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, rewrites, reason = LEFT_ALONE[case]
    x = torch.randn(3, 3)
    record = check(EliminateCommonSubexpressions(), graph_of(function, x, w=torch.randn(3, 3)), x, rewrites=rewrites)
    assert [r.reason for r in record.refusals] == ([] if reason is None else [reason])


def test_two_draws_are_two_values() -> None:
    x = torch.randn(64)
    graph = graph_of(lambda self, x: torch.rand_like(x) - torch.rand_like(x), x)
    record = apply(EliminateCommonSubexpressions(), graph)
    assert [r.reason for r in record.refusals] == ["the same as rand_like, but random: two draws are two values"]
    assert graph(x)[0].abs().max() > 0


def test_a_buffer_before_and_after_a_write() -> None:
    def function(self, x):
        before = self.calls * 2
        self.calls += 1
        return x + before, self.calls * 2 + self.calls * 2

    graph = graph_of(function, torch.randn(3), calls=torch.zeros(3))
    (write,) = graph.graph.find_nodes(op="call_function", target=aten.copy_.default)
    multiplications = graph.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    with graph.graph.inserting_after(write):
        again = graph.graph.node_copy(multiplications[0], lambda node: node)
    output = graph.graph.output_node()
    output.args = ((*output.args[0], again),)
    graph.recompile()
    (before,) = run(graph, torch.zeros(3))[2:]
    apply(EliminateCommonSubexpressions(), graph)
    assert graph_text(graph).count("aten.mul.Tensor") == 3  # before, of the new value, and after; not the doubled one
    assert torch.equal(run(graph, torch.zeros(3))[2], before + 2)


def test_what_is_written_to_is_not_shared() -> None:
    x = torch.randn(3)
    graph = graph_of(lambda self, x: (x.exp() + 1) * x.exp(), x)
    (addition,) = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    addition.target = aten.add_.Tensor
    graph.recompile()
    assert refused(EliminateCommonSubexpressions(), graph, x) == ["the same as exp, but one of them is written to"]


def test_tied_weights_under_two_names() -> None:
    weight = nn.Parameter(torch.randn(3))
    x = torch.randn(3)
    graph = graph_of(lambda self, x: (x * self.a).sin() + x * self.a, x, a=weight)
    graph.register_parameter("b", weight)
    node = graph.graph.find_nodes(op="get_attr")[0]
    with graph.graph.inserting_after(node):
        other = graph.graph.get_attr("b")
    other.meta = dict(node.meta)
    graph.graph.find_nodes(op="call_function", target=aten.mul.Tensor)[1].args = (
        graph.graph.find_nodes(op="placeholder")[0], other,
    )  # fmt: skip
    graph.recompile()
    check(EliminateCommonSubexpressions(), graph, x, rewrites=2)
    assert "%b" not in graph_text(graph)


@quick
@hypothesis.given(shapes, dtypes)
def test_numbers(shape: list[int], dtype: torch.dtype) -> None:
    def function(self, x):
        return (x + self.w) * (x + self.w), x.transpose(0, -1) + x.transpose(0, -1), x.sum() + x.sum(), x * 2

    check(
        EliminateCommonSubexpressions(),
        graph_of(function, x := values(shape, dtype), w=values([1], dtype)),
        x,
        rewrites=3,
    )
