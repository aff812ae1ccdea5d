"""FoldConstants: what depends on weights and constants alone is computed once, and stays small."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from pass_checks import check, dtypes, graph_of, quick, refused, shapes, values
from torch import nn

from accelkit.testing import apply, graph_text, run
from accelkit_passes.fold_constants import FoldConstants

aten = torch.ops.aten


def positions(self, x):
    ids = torch.arange(3) + 1
    return x @ self.w.t() + self.table[ids], x.sum() + self.scale


def test_golden() -> None:
    weight = nn.Parameter(torch.randn(5, 4))
    graph = graph_of(positions, torch.randn(3, 4), w=weight, table=torch.randn(9, 5), scale=torch.tensor(2.0))
    before = graph_text(graph)
    apply(FoldConstants(), graph)
    assert (
        before
        == """\
%w: f32[5, 4] = attribute
%table: f32[9, 5] = attribute
%scale: f32[] = attribute
%x: f32[3, 4] = input
%0: i64[3] = aten.arange(3, device=cpu, pin_memory=False)
%1: i64[3] = aten.add.Tensor(%0, 1)
%2: f32[4, 5] = aten.t(%w)
%3: f32[3, 5] = aten.matmul(%x, %2)
%4: f32[3, 5] = aten.index.Tensor(%table, [%1])
%5: f32[3, 5] = aten.add.Tensor(%3, %4)
%6: f32[] = aten.sum(%x)
%7: f32[] = aten.add.Tensor(%6, %scale)
return (%5, %7)"""
    )
    assert (
        graph_text(graph)
        == """\
%scale: f32[] = attribute
%x: f32[3, 4] = input
%t_folded: f32[4, 5] = attribute
%0: f32[3, 5] = aten.matmul(%x, %t_folded)
%index_folded: f32[3, 5] = attribute
%1: f32[3, 5] = aten.add.Tensor(%0, %index_folded)
%2: f32[] = aten.sum(%x)
%3: f32[] = aten.add.Tensor(%2, %scale)
return (%1, %3)"""
    )
    assert graph.t_folded.data_ptr() == weight.data_ptr()  # a view of the weight, not a copy


OUTPUT = "an output would be the constant itself, which a caller could write to"
BIG = "4000 bytes, more than the 40 it is computed from and than limit_bytes=100"
LEFT_ALONE = {
    "a weight alone": (lambda self, x: x * self.w, []),
    "an input's": (lambda self, x: x.relu() * 2, []),
    "random": (lambda self, x: x + torch.rand(10), []),
    "uninitialised": (lambda self, x: aten.zeros_like(x) + torch.empty(10).fill_(0) * 0, []),
    "an output": (lambda self, x: (x + 1, self.w * 2), [OUTPUT]),
    "a view as an output": (lambda self, x: (x + 1, (self.w * 2)[:2]), [OUTPUT]),
    "blown up": (lambda self, x: x + self.w.expand(100, 10), [BIG]),
    "a factory": (lambda self, x: x[0] + torch.arange(1000), [BIG.replace("4000", "8000").replace("40 ", "0 ")]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, reasons = LEFT_ALONE[case]
    x = torch.randn(10)
    graph = graph_of(function, x, w=torch.randn(10))
    text = graph_text(graph)
    record = apply(FoldConstants(limit_bytes=100), graph)
    assert graph_text(graph) == text
    assert [r.reason for r in record.refusals] == reasons


def test_the_inputs_of_what_is_too_large_are_folded() -> None:
    x = torch.randn(10)
    graph = graph_of(lambda self, x: x + torch.exp(self.w * 2).expand(100, 10).clone(), x, w=torch.randn(10))
    record = check(FoldConstants(limit_bytes=100), graph, x, rewrites=1)
    assert [(r.node, r.reason) for r in record.refusals] == [("clone", BIG)]  # said once, not for expand as well
    assert "aten.expand(%exp_folded, [100, 10])" in graph_text(graph)


def test_a_piece_of_a_parameter_multiplies_in_the_same_order() -> None:
    x = torch.randn(2, 16, 32)
    weight = nn.Parameter(torch.randn(96, 32))

    def function(self, x):
        return nn.functional.linear(x.transpose(0, 1), self.w.split([32, 64])[1])

    graph = graph_of(function, x, w=weight)
    check(FoldConstants(), graph, x, rewrites=1)  # wrong in the last bits where the piece loses requires_grad
    (folded,) = graph.buffers()
    assert folded.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_what_is_no_larger_than_its_weights_has_no_limit() -> None:
    x = torch.randn(10)
    graph = graph_of(lambda self, x: x + self.w.sin(), x, w=torch.randn(100, 10))
    check(FoldConstants(limit_bytes=1), graph, x, rewrites=1)


def test_a_buffer_that_is_written_to() -> None:
    def counting(self, x):
        before = self.calls * 2
        self.calls += 1
        return x + before

    graph = graph_of(counting, torch.randn(3), calls=torch.zeros(3))
    tied = graph_of(counting, torch.randn(3), calls=torch.zeros(3))
    for_reading = tied.graph.find_nodes(op="get_attr")[0]  # the same memory under another name is no constant either
    tied.register_buffer("tied", tied.calls.view(3))
    with tied.graph.inserting_before(for_reading):
        other = tied.graph.get_attr("tied")
    other.meta = dict(for_reading.meta)
    (multiplication,) = tied.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    multiplication.args = (other, 2)
    tied.recompile()
    for one in (graph, tied):
        assert apply(FoldConstants(), one).rewrites == ()
        assert [run(one, torch.zeros(3))[0][0].item() for _ in range(3)] == [0, 2, 4]


def test_a_constant_that_is_written_to_is_made_anew() -> None:
    x = torch.randn(3)
    graph = graph_of(lambda self, x: x * (torch.zeros(3) + 1).sin(), x)
    (addition,) = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    addition.target = aten.add_.Tensor
    graph.recompile()
    assert refused(FoldConstants(), graph, x) == []


def test_several_results() -> None:
    x = torch.randn(3)

    def function(self, x):
        largest, index = (self.w * 2).max(0)
        return x * largest + index

    graph = graph_of(function, x, w=torch.randn(5, 3))
    check(FoldConstants(), graph, x, rewrites=2)
    assert "aten.max" not in graph_text(graph)


def test_dynamic_sizes_are_no_constants() -> None:
    x = torch.randn(3, 4)

    def function(self, x):
        return x + torch.arange(x.shape[0])[:, None] + self.w.expand(x.shape[0], 4) + torch.arange(4)

    graph = graph_of(function, x, batch=True, w=torch.randn(1, 4))
    check(FoldConstants(), graph, x, rewrites=1)
    assert "aten.arange(%0" in graph_text(graph)
    assert run(graph, torch.randn(7, 4))[0].shape == (7, 4)


def test_a_size_known_only_at_run_time() -> None:
    x = torch.randn(4)
    graph = graph_of(lambda self, x: x.sum() + torch.nonzero(self.w).sum(), x, w=torch.tensor([1, 0, 2]))
    record = check(FoldConstants(), graph, x, rewrites=0)
    assert record.refusals == ()


@quick
@hypothesis.given(shapes, dtypes)
def test_numbers(shape: list[int], dtype: torch.dtype) -> None:
    def function(self, x):
        a = self.w.flip(0).transpose(0, -1) * 3
        return x + a, (x * self.w.sum() + torch.full([1], 7, dtype=dtype)).sum(), self.w.cumsum(0) + x[:1]

    x = values(shape, dtype)
    check(FoldConstants(), graph_of(function, x, w=values([1] * len(shape), dtype)), x)
