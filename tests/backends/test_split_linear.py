"""split_linears: a linear layer and the residual norm behind it become one operator, wherever its kernel takes them.

What the kernel takes is asked of the operator, which looks at dtypes and sizes alone, so that this runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from fused_graphs import Case, body, copied, encoder, fused_graph, operators, with_random_vectors
from hypothesis import strategies as st
from torch import Tensor, fx

from accelkit import Dim
from accelkit.backends.fastertransformer.split_linear import split_linears
from accelkit.ops import linear_residual_layer_norm
from accelkit.pass_runner import fake_mode_of
from accelkit.testing import run

fused = torch.ops.accelkit


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_residual_layer_norm, "without_triton", lambda: None)


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, 64)))


def split(graph: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    copy = copied(graph)
    count = split_linears(copy)
    copy.graph.lint()
    copy.recompile()
    return copy, count


def graph_of(function: Callable[..., Any], *inputs: Tensor, precision: str = "fp16") -> fx.GraphModule:
    return fused_graph(with_random_vectors(Case(function, width=64)), *inputs, precision=precision)


def test_a_layer_before_and_after() -> None:
    graph = fused_graph(encoder(1, width=64), x(), precision="fp16")
    assert body(graph, first=9) == [
        "%9: f16[2, 5, 64] = aten.reshape(%8, [2, 5, 64])",
        "%10: f16[2, 5, 64] = accelkit.linear_activation(%9, %to_dtype_3_folded, %to_dtype_4_folded, none)",
        "%11: (f16[2, 5, 64], f16[2, 5, 64]) = accelkit.residual_layer_norm(%10, %0, %to_dtype_5_folded, %to_dtype_6_folded, "
        "1e-05)",
        "%12: f16[2, 5, 64] = getitem(%11, 0)",
        "%13: f16[2, 5, 128] = accelkit.linear_activation(%12, %to_dtype_7_folded, %to_dtype_8_folded, gelu)",
        "%14: f16[2, 5, 64] = accelkit.linear_activation(%13, %to_dtype_9_folded, %to_dtype_10_folded, none)",
        "%15: (f16[2, 5, 64], f16[2, 5, 64]) = accelkit.residual_layer_norm(%14, %12, %to_dtype_11_folded, %to_dtype_12_folded, "
        "1e-05)",
        "%16: f16[2, 5, 64] = getitem(%15, 0)",
        "%17: f32[2, 5, 64] = aten.to.dtype(%16, torch.float32)",
        "return (%17)",
    ]
    after, count = split(graph)
    assert count == 2
    assert body(after, first=9) == [
        "%9: f16[2, 5, 64] = aten.reshape(%8, [2, 5, 64])",
        "%10: (f16[2, 5, 64], f16[2, 5, 64]) = accelkit.linear_residual_layer_norm(%9, %to_dtype_3_folded, %to_dtype_4_folded, "
        "%0, %to_dtype_5_folded, %to_dtype_6_folded, 1e-05)",
        "%11: f16[2, 5, 64] = getitem(%10, 0)",
        "%12: f16[2, 5, 128] = accelkit.linear_activation(%11, %to_dtype_7_folded, %to_dtype_8_folded, gelu)",
        "%13: (f16[2, 5, 64], f16[2, 5, 64]) = accelkit.linear_residual_layer_norm(%12, %to_dtype_9_folded, %to_dtype_10_folded, "
        "%11, %to_dtype_11_folded, %to_dtype_12_folded, 1e-05)",
        "%14: f16[2, 5, 64] = getitem(%13, 0)",
        "%15: f32[2, 5, 64] = aten.to.dtype(%14, torch.float32)",
        "return (%15)",
    ]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_a_second_run_finds_nothing_and_numbers_are_the_same(precision: str, pre_norm: bool) -> None:
    graph = fused_graph(encoder(2, width=64, pre_norm=pre_norm), given := x(), precision=precision)
    after, count = split(graph)
    assert count == 4
    assert "residual_layer_norm" not in operators(after)
    assert torch.equal(run(after, given)[0], run(graph, given)[0])
    text = str(after.graph)
    assert split_linears(after) == 0
    assert str(after.graph) == text


def test_a_dynamic_batch() -> None:
    shapes = {"input": {0: Dim("batch", min=1, max=64)}}
    graph = fused_graph(encoder(1, width=64), x(4, 5, 64), precision="fp16", dynamic_shapes=shapes)
    env = fake_mode_of(graph).shape_env
    assert env is not None
    guards = len(env.guards)
    after, count = split(graph)
    assert count == 2
    assert len(env.guards) == guards
    for batch in (1, 7):
        given = x(batch, 5, 64)
        assert torch.equal(run(after, given)[0], run(graph, given)[0])


def reader(self: Case, given: Tensor) -> Any:
    normalised, total = self.normalised(self.a(given), given)
    return self.b(normalised) + total


@hypothesis.settings(deadline=None, max_examples=12, derandomize=True, database=None)
@hypothesis.given(
    width=st.integers(1, 70),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    affine=st.booleans(),
    bias=st.booleans(),
    precision=st.sampled_from(["fp16", "bf16"]),
)
def test_numbers_over_sizes(width: int, leading: list[int], affine: bool, bias: bool, precision: str) -> None:
    model = Case(reader, width=width, affine=affine)
    if not bias:
        model.a.bias = None  # type: ignore[assignment]
    graph = fused_graph(with_random_vectors(model), given := x(*leading, width), precision=precision)
    after, count = split(graph)
    assert count == 1
    assert torch.equal(run(after, given)[0], run(graph, given)[0])


# --- what is left alone


def linear_read_twice(self: Case, given: Tensor) -> Any:
    product = self.a(given)
    return self.normalised(product, given)[0], product


def linear_twice_in_one_sum(self: Case, given: Tensor) -> Any:
    product = self.a(given)
    return self.normalised(product, product)[0]


def no_linear_before(self: Case, given: Tensor) -> Any:
    return self.normalised(torch.tanh(given), given)[0]


def activation_before_the_norm(self: Case, given: Tensor) -> Any:
    return self.normalised(torch.relu(self.a(given)), given)[0]


def linear_with_a_residual(self: Case, given: Tensor) -> Any:
    product = fused.linear_activation(given, self.a.weight, self.a.bias, "none", given)
    return self.normalised(product, given)[0]


def rows_counted_by_the_norm(self: Case, given: Tensor, rows: Tensor) -> Any:
    return self.normalised(self.a(given), given, rows=rows)[0]


def rows_counted_by_the_linear(self: Case, given: Tensor, rows: Tensor) -> Any:
    product = fused.linear_activation(given, self.a.weight, self.a.bias, rows=rows)
    return self.normalised(product, given)[0]


COUNT = torch.tensor([3], dtype=torch.int32)
LEFT_ALONE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "linear read twice": (linear_read_twice, ()),
    "linear twice in one sum": (linear_twice_in_one_sum, ()),
    "no linear before": (no_linear_before, ()),
    "activation before the norm": (activation_before_the_norm, ()),
    "linear with a residual": (linear_with_a_residual, ()),
    "rows counted by the norm": (rows_counted_by_the_norm, (COUNT,)),
    "rows counted by the linear": (rows_counted_by_the_linear, (COUNT,)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    function, inputs = LEFT_ALONE[name]
    graph = graph_of(function, x(), *inputs)
    assert "residual_layer_norm" in operators(graph)
    text = str(graph.graph)
    assert split_linears(graph) == 0
    assert str(graph.graph) == text


def test_a_norm_whose_results_are_read_at_once_is_left_alone() -> None:
    graph = graph_of(reader, x())
    norm = graph.graph.find_nodes(op="call_function", target=fused.residual_layer_norm.default)[0]
    output = graph.graph.output_node()
    output.args = ((*output.args[0], norm),)  # type: ignore[misc]
    assert split_linears(graph) == 0


def test_what_no_kernel_takes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32 = graph_of(reader, x(), precision="fp32")
    assert split_linears(in_float32) == 0
    assert "linear_residual_layer_norm" not in operators(in_float32)
    graph = graph_of(reader, x())
    monkeypatch.setattr(linear_residual_layer_norm, "without_triton", lambda: "Triton is not installed")
    assert split_linears(graph) == 0
    assert "linear_residual_layer_norm" not in operators(graph)
