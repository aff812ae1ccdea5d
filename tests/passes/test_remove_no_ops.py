"""RemoveNoOps: what provably does nothing goes, what merely looks like it stays."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from pass_checks import assert_same_bits, check, dtypes, graph_of, quick, refused, shapes, values

from accelkit.testing import apply, graph_text, run
from accelkit_passes.remove_no_ops import RemoveNoOps

aten = torch.ops.aten


def nothing(self, x):
    y = (x * 1).to(torch.float32).clone() / 1 - 0
    z = aten.reshape.default(aten.reshape.default(torch.mm(self.w, self.w), [2, 8]), [16])
    p = aten.permute.default(aten.permute.default(x.exp(), [1, 0]), [1, 0])
    return y.relu(), z + 1, p.double().float().sin(), torch.cat([x.tan()]).detach() * 2


def test_golden() -> None:
    graph = graph_of(nothing, torch.randn(2, 3), w=torch.randn(4, 4))
    before = graph_text(graph)
    apply(RemoveNoOps(), graph)
    assert (
        before
        == """\
%w: f32[4, 4] = attribute
%x: f32[2, 3] = input
%0: f32[2, 3] = aten.mul.Tensor(%x, 1)
%1: f32[2, 3] = aten.to.dtype(%0, torch.float32)
%2: f32[2, 3] = aten.clone(%1)
%3: f32[2, 3] = aten.div.Tensor(%2, 1)
%4: f32[2, 3] = aten.sub.Tensor(%3, 0)
%5: f32[4, 4] = aten.mm(%w, %w)
%6: f32[2, 8] = aten.reshape(%5, [2, 8])
%7: f32[16] = aten.reshape(%6, [16])
%8: f32[2, 3] = aten.exp(%x)
%9: f32[3, 2] = aten.permute(%8, [1, 0])
%10: f32[2, 3] = aten.permute(%9, [1, 0])
%11: f32[2, 3] = aten.relu(%4)
%12: f32[16] = aten.add.Tensor(%7, 1)
%13: f64[2, 3] = aten.to.dtype(%10, torch.float64)
%14: f32[2, 3] = aten.to.dtype(%13, torch.float32)
%15: f32[2, 3] = aten.sin(%14)
%16: f32[2, 3] = aten.tan(%x)
%17: f32[2, 3] = aten.cat([%16])
%18: f32[2, 3] = aten.detach(%17)
%19: f32[2, 3] = aten.mul.Tensor(%18, 2)
return (%11, %12, %15, %19)"""
    )
    assert (
        graph_text(graph)
        == """\
%w: f32[4, 4] = attribute
%x: f32[2, 3] = input
%0: f32[4, 4] = aten.mm(%w, %w)
%1: f32[2, 8] = aten.reshape(%0, [2, 8])
%2: f32[16] = aten.reshape(%0, [16])
%3: f32[2, 3] = aten.exp(%x)
%4: f32[3, 2] = aten.permute(%3, [1, 0])
%5: f32[2, 3] = aten.relu(%x)
%6: f32[16] = aten.add.Tensor(%2, 1)
%7: f64[2, 3] = aten.to.dtype(%3, torch.float64)
%8: f32[2, 3] = aten.sin(%3)
%9: f32[2, 3] = aten.tan(%x)
%10: f32[2, 3] = aten.mul.Tensor(%9, 2)
return (%5, %6, %8, %10)"""
    )


def counting(self, x):
    old = self.calls.clone()
    self.calls += 1
    return old * x


INFINITE = float("inf")
LEFT_ALONE = {
    "output would be the input": (lambda self, x: x.clone(), "an output would share memory with x"),
    "output would be a weight": (lambda self, x: (x + 1, self.w * 1), "an output would share memory with w"),
    "two outputs": (lambda self, x: (y := x.exp(), y.clone()), "two outputs would share memory"),
    "a view of another output": (lambda self, x: (y := x.exp(), y.clone()[0]), "two outputs would share memory"),
    "lays out anew": (lambda self, x: x.mT.clone(memory_format=torch.contiguous_format).sin(), "it lays out"),
    "the caller's layout, viewed": (lambda self, x: x.clone().view(-1).sin(), "view needs a layout, and that of x is"),
    "the caller's layout": (lambda self, x: aten.contiguous.default(x).sin(), "the layout of x is the caller's"),
    "reshape may copy": (
        lambda self, x: aten.reshape.default(aten.reshape.default(x, [9]), [1, 9]).sin(),
        "may be a copy",
    ),
    "not wider": (lambda self, x: x.bfloat16().float().sin(), "torch.bfloat16 does not hold every torch.float32"),
    "another dtype": (lambda self, x: x.sign().int() * 1.0, "it turns torch.int32 into torch.float32"),
    "bool": (lambda self, x: (x > 0) + 0, "it turns torch.bool into torch.int64"),
    "integers divided": (lambda self, x: x.sign().int() / 1, "it turns torch.int32 into torch.float32"),
    "complex": (lambda self, x: torch.complex(x, x) * 1, "complex arithmetic"),
    "minus zero": (lambda self, x: torch.sin(x + 0), "it turns -0.0 into 0.0"),
    "minus zero, minus": (lambda self, x: torch.sin(x - -0.0), "it turns -0.0 into 0.0"),
    "infinite alpha": (lambda self, x: torch.sin(torch.sub(x, 0, alpha=INFINITE)), "inf times 0 is NaN"),
    "x * 2": (lambda self, x: x * 2, None),
    "-x": (lambda self, x: -x, None),
    "half a slice": (lambda self, x: x[:2].sin(), None),
    "every second": (lambda self, x: x[:, :1][:, ::2].contiguous().sin(), None),
    "another shape": (lambda self, x: x.repeat(1, 2), None),
    "a true permute": (lambda self, x: x.permute(1, 0).sin(), None),
    "permutes that do not cancel": (
        lambda self, x: aten.permute(aten.permute(x[None], [1, 2, 0]), [1, 0, 2]).sin(),
        None,
    ),
    "two pieces": (lambda self, x: [p.sin() for p in x.split(2)], None),
    "channels last": (lambda self, x: x[None, None].to(memory_format=torch.channels_last).sin(), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, reason = LEFT_ALONE[case]
    x = torch.randn(3, 3)
    graph = graph_of(function, x, w=torch.randn(3, 3))
    reasons = refused(RemoveNoOps(), graph, x)
    assert (reasons == []) if reason is None else (len(reasons) == 1 and reason in reasons[0]), reasons


def test_a_copy_taken_before_a_write() -> None:
    graph = graph_of(counting, torch.randn(3), calls=torch.zeros(3))
    (multiplication,) = graph.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    (write,) = graph.graph.find_nodes(op="call_function", target=aten.copy_.default)
    write.append(multiplication)  # read the copy after the buffer has been written to
    record = apply(RemoveNoOps(), graph)
    assert [r.reason for r in record.refusals] == ["mul reads it after copy__default has written to calls"]
    assert "aten.clone" in graph_text(graph)
    assert torch.equal(run(graph, torch.ones(3))[0], torch.zeros(3))


def test_a_copy_read_before_the_write_goes() -> None:
    graph = graph_of(counting, torch.randn(3), calls=torch.zeros(3))
    assert apply(RemoveNoOps(), graph).rewrites == ("clone",)
    assert torch.equal(run(graph, torch.ones(3))[0], torch.zeros(3))


def test_a_copy_that_is_written_to() -> None:
    x = torch.randn(3)
    graph = graph_of(lambda self, x: (x.clone() * 2).sin(), x)
    (multiplication,) = graph.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    multiplication.target = aten.mul_.Tensor
    graph.recompile()
    assert refused(RemoveNoOps(), graph, x) == ["mul writes to it"]


def test_ignore_negative_zero() -> None:
    graph = graph_of(lambda self, x: torch.sin(x + 0), torch.randn(3))
    assert len(apply(RemoveNoOps(ignore_negative_zero=True), graph).rewrites) == 1


def test_a_caller_with_another_layout() -> None:
    """What stays because of the caller's layout is needed: a transposed input gives the same bits."""
    y = torch.randn(3, 3).t()
    for function in (
        lambda x: aten.contiguous.default(x).view(9).sin(),
        lambda x: x.clone().exp(),
        lambda x: (x * 1)[:2].cos(),
    ):
        graph = graph_of(lambda self, x, function=function: function(x), torch.randn(3, 3))
        apply(RemoveNoOps(), graph)
        assert_same_bits(run(graph, y)[0], function(y))


def test_contiguous_whatever_the_caller_does() -> None:
    x = torch.randn(3, 3)
    graph = graph_of(lambda self, x: aten.contiguous.default(torch.mm(x, x)).exp(), x)
    check(RemoveNoOps(), graph, x, rewrites=1)


def test_dynamic_batch() -> None:
    x = torch.randn(3, 4)

    def function(self, x):
        y = x.view(x.shape[0], 4).expand(x.shape[0], 4)
        return y.sin(), x[: x.shape[0]].cos(), aten.slice.Tensor(x, 0, 0, 1).tan(), torch.cat([x], 0).exp()

    graph = graph_of(function, x, batch=True)
    check(RemoveNoOps(), graph, x)
    text = graph_text(graph)
    assert all(f"aten.{name}(%x)" in text for name in ("sin", "cos", "exp"))
    assert "aten.slice.Tensor(%x, 0, 0, 1)" in text
    assert run(graph, torch.randn(7, 4))[2].shape == (1, 4)


ONES = {
    "mul": lambda x: x * 1,
    "mul float": lambda x: x * 1.0,
    "div": lambda x: x / 1,
    "pow": lambda x: x**1,
    "sub": lambda x: x - 0,
    "sub float": lambda x: x - 0.0,
    "sub alpha": lambda x: torch.sub(x, 0, alpha=2),
    "add": lambda x: x + 0,
    "add -0.0": lambda x: x + -0.0,
    "add alpha": lambda x: torch.add(x, 0, alpha=2),
    "pad": lambda x: aten.pad(x, [0, 0]),
    "pad nd": lambda x: aten.constant_pad_nd(x, [0, 0]),
    "repeat": lambda x: x.repeat([1] * x.dim()),
    "clone": lambda x: x.clone(),
    "to copy": lambda x: x.to(x.dtype, copy=True),
    "_to_copy": lambda x: aten._to_copy(x),
    "type_as": lambda x: x.type_as(x),
    "double and back": lambda x: x.to(torch.float64).to(x.dtype),
    "half and back": lambda x: x.half().to(x.dtype),
    "squeeze": lambda x: x.squeeze(0),
    "view": lambda x: x.view(x.shape),
    "views": lambda x: x.view(1, *x.shape).view(x.shape),
    "expand": lambda x: x.expand_as(x),
    "slice": lambda x: aten.slice.Tensor(x, 0, 0, 99),
    "chunk": lambda x: x.chunk(1)[0],
    "permutes": lambda x: aten.permute(aten.permute(x, list(range(-1, x.dim() - 1))), [*range(1, x.dim()), 0]),
}


@hypothesis.settings(quick, max_examples=80)
@hypothesis.given(shapes, dtypes, st.sampled_from(sorted(ONES)), st.booleans())
def test_numbers(shape: list[int], dtype: torch.dtype, name: str, contiguous: bool) -> None:
    x = values(shape, dtype)
    x = x if contiguous else x.transpose(0, -1)
    check(RemoveNoOps(), graph_of(lambda self, x: (ONES[name](torch.relu(-x)) * 2, ONES[name](x)), x), x)


def test_most_of_these_do_nothing() -> None:
    x = torch.randn(3, 4)
    kept = []
    for name, function in ONES.items():
        graph = graph_of(lambda self, x, function=function: function(x.exp()) * 2, x)
        apply(RemoveNoOps(), graph)
        if "aten.mul.Tensor(%0, 2)" not in graph_text(graph):
            kept.append(name)
    assert kept == ["add", "add alpha", "half and back"]
