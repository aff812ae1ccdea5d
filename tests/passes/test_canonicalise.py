"""Canonicalise: one form for graphs that mean the same."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from pass_checks import assert_same_bits, check, floats, graph_of, quick, refused, shapes, values

from accelkit.testing import apply, graph_text, run
from accelkit_passes.canonicalise import Canonicalise

aten = torch.ops.aten


def spellings(self, x, mask):
    y = (self.w + x.transpose(-1, -2).flatten(1)).view(x.shape[0], -1, 4)
    return torch.softmax(y, -1), aten.to.device(mask, "cpu", torch.float32), y[:, 1:9][-1], self.w.expand(2, 12)


def test_golden() -> None:
    graph = graph_of(spellings, torch.randn(2, 3, 4), torch.rand(2, 3) < 0.5, w=torch.randn(12))
    before = graph_text(graph)
    apply(Canonicalise(), graph)
    assert (
        before
        == """\
%w: f32[12] = attribute
%x: f32[2, 3, 4] = input
%mask: b1[2, 3] = input
%0: f32[2, 4, 3] = aten.transpose.int(%x, -1, -2)
%1: f32[2, 12] = aten.flatten.using_ints(%0, 1)
%2: f32[2, 12] = aten.add.Tensor(%w, %1)
%3: f32[2, 3, 4] = aten.view(%2, [2, -1, 4])
%4: f32[2, 3, 4] = aten.softmax.int(%3, -1)
%5: f32[2, 3] = aten.to.device(%mask, cpu, torch.float32)
%6: f32[2, 2, 4] = aten.slice.Tensor(%3, 1, 1, 9)
%7: f32[2, 4] = aten.select.int(%6, 0, -1)
%8: f32[2, 12] = aten.expand(%w, [2, 12])
return (%4, %5, %7, %8)"""
    )
    assert (
        graph_text(graph)
        == """\
%w: f32[12] = attribute
%x: f32[2, 3, 4] = input
%mask: b1[2, 3] = input
%0: f32[2, 4, 3] = aten.permute(%x, [0, 2, 1])
%1: f32[2, 12] = aten.reshape(%0, [2, 12])
%2: f32[2, 12] = aten.add.Tensor(%1, %w)
%3: f32[2, 3, 4] = aten.reshape(%2, [2, 3, 4])
%4: f32[2, 3, 4] = aten.softmax.int(%3, 2)
%5: f32[2, 3] = aten.to.dtype(%mask, torch.float32)
%6: f32[2, 2, 4] = aten.slice.Tensor(%3, 1, 1)
%7: f32[2, 4] = aten.select.int(%6, 0, 1)
%8: f32[2, 12] = aten.expand(%w, [2, -1])
return (%4, %5, %7, %8)"""
    )


def test_arguments_are_positional_and_defaults_dropped() -> None:
    x = torch.randn(2, 4)
    graph = graph_of(lambda self, x: torch.layer_norm(x, [4]), x)
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    node.args, node.kwargs = (), {"normalized_shape": [4], "input": node.args[0], "eps": 1e-5, "cudnn_enable": False}
    graph.recompile()
    check(Canonicalise(), graph, x, rewrites=1)
    assert "aten.layer_norm(%x, [4], None, None, 1e-05, False)" in graph_text(graph)
    node.args = (*node.args[:-1], True)
    graph.recompile()
    check(Canonicalise(), graph, x, rewrites=1)
    assert "aten.layer_norm(%x, [4])" in graph_text(graph)


LEFT_ALONE = {
    "alpha": (lambda self, x: torch.add(self.w, x, alpha=2), "alpha=2 scales the second operand only"),
    "layout": (
        lambda self, x: aten.add.Tensor(x, torch.exp(x.permute(1, 0))),
        "could change the result's memory layout",
    ),
    "unsafe view": (lambda self, x: aten._unsafe_view.default(x, [9]).exp(), "_unsafe_view of x, which is not"),
    "scalar": (lambda self, x: x * 2, None),
    "order": (lambda self, x: torch.relu(x) + x, None),
    "same dtype": (lambda self, x: aten._to_copy.default(x, dtype=torch.float32), None),
    "half to float by layout": (lambda self, x: x.to(torch.float64, memory_format=torch.contiguous_format), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, reason = LEFT_ALONE[case]
    x = torch.randn(3, 3)
    reasons = refused(Canonicalise(), graph_of(function, x, w=torch.randn(3, 3)), x)
    assert (reasons == []) if reason is None else (len(reasons) == 1 and reason in reasons[0]), reasons


def test_residual_is_second_however_it_was_written() -> None:
    x, expected = torch.randn(2, 8), None
    for function in (lambda self, x: x + torch.relu(x), lambda self, x: torch.relu(x) + x):
        graph = graph_of(function, x)
        apply(Canonicalise(), graph)
        expected = expected or graph_text(graph)
        assert graph_text(graph) == expected
    assert "aten.add.Tensor(%0, %x)" in expected


@pytest.mark.parametrize(
    "spell",
    [
        lambda x: x.transpose(0, 2), lambda x: x.swapaxes(0, -1), lambda x: x.movedim(0, 2), lambda x: x.movedim((0, 1),
        (2, 0)), lambda x: x.mT, lambda x: x[0].t(), lambda x: x[0, 0].t(), lambda x: aten.numpy_T(x), lambda x:
        x.permute(-1, 0, 1),
    ],
)  # fmt: skip
def test_permutes(spell) -> None:
    x = torch.randn(2, 3, 4)
    graph = graph_of(lambda self, x: spell(x).exp(), x)
    check(Canonicalise(), graph, x)
    assert "aten.permute" in graph_text(graph)


def test_dynamic_sizes() -> None:
    """One unknown size becomes -1 and two are refused; called with another batch."""
    x = torch.randn(3, 4, 6)
    graph = graph_of(
        lambda self, x: (
            x.view(x.shape[0], 24), x.flatten(1), x.flatten(0, 1).unflatten(0, (-1, 4)), self.w.expand(x.shape[0], 6),
            x.unflatten(2, (2, 3)),
        ), x, batch=True, w=torch.randn(1, 6),
    )  # fmt: skip
    check(Canonicalise(), graph, x)
    text = graph_text(graph)
    assert text.count("aten.reshape(%x, [-1, 24])") == 2
    assert "aten.reshape(%x, [-1, 4, 2, 3])" in text
    assert ", [%0, -1])" in text  # the expanded size cannot be known, the kept one can
    y = torch.randn(5, 4, 6)
    results = run(graph, y)
    for result, expected in zip(results, (y.view(5, 24), y.view(5, 24), y), strict=False):
        assert_same_bits(result, expected)


def test_two_unknown_sizes_are_refused() -> None:
    x = torch.randn(3, 4)
    graph = graph_of(lambda self, x: (x[None] * x[:, None]).flatten(2), x, batch=True)
    (refusal,) = check(Canonicalise(), graph, x).refusals
    assert refusal.reason.endswith("has several sizes that are known only at run time")
    assert "aten.flatten.using_ints" in graph_text(graph)


@quick
@hypothesis.given(shapes, floats, st.data())
def test_numbers(shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    x, dim = values(shape, dtype), data.draw(st.integers(-len(shape), len(shape) - 1))
    start, end = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))

    def function(self, x):
        y = self.w + x.transpose(0, dim)
        narrow = aten.slice.Tensor(y, dim, start, end)
        return y * x.flatten()[0], aten.softmax.int(y, dim), narrow, y.unsqueeze(dim), y.select(dim, -1), x.mean((dim,))

    other = data.draw(st.sampled_from([[1], [1] * len(shape)]))
    check(Canonicalise(), graph_of(function, x, w=values(other, dtype)), x)
