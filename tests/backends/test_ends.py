"""The ends of a recorded graph: casts that the copies make, last operators that run outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelkit import Dim
from accelkit.backends.fastertransformer.ends import split_end, without_casts
from accelkit.backends.fastertransformer.recording import Recording
from accelkit.testing import graph_text, trace

fused = torch.ops.accelkit


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def norm(self: Any, x: torch.Tensor, residual: torch.Tensor) -> Any:
    return fused.residual_layer_norm(x, residual, self.norm.weight, self.norm.bias)


def traced(function: Any, *inputs: torch.Tensor) -> Any:
    return trace(Function(function).eval(), *inputs)


X = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("function", "given", "end"),
    [
        (lambda s, x: norm(s, s.linear(x), x)[0], ["x", "linear"], "residual_layer_norm"),
        (lambda s, x: norm(s, s.linear(x), x), ["x", "linear"], "residual_layer_norm"),
        (lambda s, x: s.linear(x).half(), ["linear"], "aten.to.dtype"),
        (lambda s, x: (x * 2, norm(s, x * 2, x)[0]), ["mul", "mul_1", "x"], "aten.clone"),
        (lambda s, x: (fused.linear_activation(x, s.linear.weight, s.linear.bias, "relu"), x.half(), x.exp()), ["x", "exp"],
         "linear_activation"),
    ],
)  # fmt: skip
def test_the_end_runs_by_itself_and_gives_the_same(function: Any, given: list[str], end: str) -> None:
    graph = traced(function, X)
    before = graph_text(graph)
    split = split_end(graph)
    assert split is not None
    head, last = split
    assert end in graph_text(last)
    assert len(head.graph.output_node().args[0]) == len(given)
    x = torch.randn(2, 8)
    with torch.no_grad():
        static = head(x)
        results, expected = last(*static), graph(x)
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))
    theirs = {t.untyped_storage().data_ptr() for t in (*static, x)}
    assert not theirs & {r.untyped_storage().data_ptr() for r in results}
    assert graph_text(graph) == before
    assert split_end(head) is None or "linear" in graph_text(head)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.linear(x),  # cuBLAS gives it
        lambda s, x: norm(s, s.linear(x), x)[0].view(-1),  # may be a view
        lambda s, x: norm(s, s.linear(x), x)[0] + 1,
        lambda s, x: (lambda y: (y, y.exp()))(norm(s, s.linear(x), x)[0]),  # read by others too
        lambda s, x: x.float(),  # no copy
    ],
)
def test_ends_that_stay(function: Any) -> None:
    assert split_end(traced(function, X)) is None


def test_sizes_are_not_carried_over_the_cut() -> None:
    def function(self: Any, x: torch.Tensor) -> Any:
        return fused.linear_activation(x.reshape(x.shape[0], 8), self.linear.weight, self.linear.bias, "relu")

    graph = trace(Function(function).eval(), X, dynamic_shapes={"args": ({0: Dim("batch", max=64)},)})
    split = split_end(graph)
    assert split is not None
    head, last = split
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            assert torch.equal(last(*head(x))[0], graph(x)[0])


def test_casts_of_inputs_go_into_the_copy() -> None:
    def function(self: Any, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> Any:
        return x.half() * 2, x.half() + 1, y.half(), y * 2, z * 3

    inputs = X, X.clone(), X.clone()
    graph = traced(function, *inputs)
    before = graph_text(graph)
    own, dtypes = without_casts(graph)
    assert dtypes == (torch.float16, None, None), "y is read in float32 too"
    assert graph_text(graph) == before
    assert graph_text(own).count("aten.to.dtype") == 1
    recast = [i if d is None else i.to(d) for i, d in zip(inputs, dtypes, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(own(*recast), graph(*inputs), strict=True))
    nothing = traced(lambda s, x: s.linear(x), X)
    assert without_casts(nothing) == (nothing, (None,))


def test_a_recording_with_an_end_outside() -> None:
    static, middle = torch.zeros(4, 3, dtype=torch.float16), torch.zeros(4, 3)

    def replay() -> None:
        torch.mul(static.float(), 2, out=middle)

    recording = Recording((static,), (middle,), replay, lambda left: (left + 1,))
    x, y = torch.randn(4, 3), torch.randn(2, 3)
    assert torch.equal(recording.run([x])[0], x.half().float() * 2 + 1)
    (padded,) = recording.run_padded([y], (True,), 2)
    assert torch.equal(padded, y.half().float() * 2 + 1)
