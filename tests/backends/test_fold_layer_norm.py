"""fold_layer_norms: which norms fold away, which stay and are left as they were, and what it costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from fused_graphs import Case, body, copied, encoder, fused_graph, operators, with_random_vectors
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from accelkit import Dim
from accelkit import graph as graphs
from accelkit.backends.fastertransformer.fold_layer_norm import fold_layer_norms
from accelkit.pass_runner import fake_mode_of
from accelkit.testing import float64_reference, relative_error, run

fused = torch.ops.accelkit
WIDTH = 128


def folded(graph: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy with its norms folded, and how many were; well formed, its fakes those that inference gives."""
    copy = copied(graph)
    count = fold_layer_norms(copy)
    copy.graph.lint()
    copy.recompile()
    mode = fake_mode_of(copy)
    for node in copy.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), graphs.val)
            inferred = graphs.inferred(node.target, args, kwargs, mode)
            assert graphs.describe_value(inferred) == graphs.describe_value(graphs.val(node)), node.format_node()
    return copy, count


def assert_left_alone(graph: fx.GraphModule) -> None:
    text = str(graph.graph)
    attributes = set(dict(graph.named_parameters()) | dict(graph.named_buffers()))
    assert fold_layer_norms(graph) == 0
    assert str(graph.graph) == text
    assert set(dict(graph.named_parameters()) | dict(graph.named_buffers())) == attributes


def graph_of(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> fx.GraphModule:
    return fused_graph(with_random_vectors(Case(function, **options)), *inputs)


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, WIDTH)))


# --- what it makes


def test_a_post_norm_layer_before_and_after() -> None:
    """The first norm folds away; the second, whose rows are returned, is a layer norm of its own behind the sum."""
    graph = fused_graph(encoder(1), x())
    assert body(graph, first=8) == [
        "%8: f32[2, 5, 128] = aten.reshape(%7, [2, 5, 128])",
        "%9: f32[2, 5, 128] = accelkit.linear_activation(%8, %0.out.weight, %0.out.bias, none)",
        "%10: (f32[2, 5, 128], f32[2, 5, 128]) = accelkit.residual_layer_norm(%9, %input, %0.first.weight, %0.first.bias, 1e-05)",
        "%11: f32[2, 5, 128] = getitem(%10, 0)",
        "%12: f32[2, 5, 256] = accelkit.linear_activation(%11, %0.up.weight, %0.up.bias, gelu)",
        "%13: f32[2, 5, 128] = accelkit.linear_activation(%12, %0.down.weight, %0.down.bias, none)",
        "%14: (f32[2, 5, 128], f32[2, 5, 128]) = accelkit.residual_layer_norm(%13, %11, %0.second.weight, %0.second.bias, 1e-05)",
        "%15: f32[2, 5, 128] = getitem(%14, 0)",
        "return (%15)",
    ]
    after, count = folded(graph)
    assert count == 1
    assert body(after, first=8) == [
        "%8: f32[2, 5, 128] = aten.reshape(%7, [2, 5, 128])",
        "%9: (f32[2, 5, 128], f32[2, 5, 2, 2]) = accelkit.folded_linear(%8, %0.out.weight, %0.out.bias, none, statistics=True, "
        "residual=%input)",
        "%10: f32[2, 5, 128] = getitem(%9, 0)",
        "%11: f32[2, 5, 2, 2] = getitem(%9, 1)",
        "%12: f32[2, 5, 2] = accelkit.row_moments(%11, 1e-05)",
        "%13: (f32[2, 5, 256], f32[2, 5, 0, 2]) = accelkit.folded_linear(%10, %_0_up_weight_folded, %_0_up_weight_offset, gelu, "
        "statistics=False, moments=%12, column_sums=%_0_up_weight_sums)",
        "%14: f32[2, 5, 256] = getitem(%13, 0)",
        "%15: (f32[2, 5, 128], f32[2, 5, 0, 2]) = accelkit.folded_linear(%14, %0.down.weight, %0.down.bias, none, "
        "statistics=False, residual=%10, residual_moments=%12, residual_weight=%0.first.weight, residual_bias=%0.first.bias)",
        "%16: f32[2, 5, 128] = getitem(%15, 0)",
        "%17: f32[2, 5, 128] = aten.layer_norm(%16, [128], %0.second.weight, %0.second.bias, 1e-05)",
        "return (%17)",
    ]


def test_the_last_norm_of_a_pre_norm_model_stays() -> None:
    after, count = folded(fused_graph(encoder(2, pre_norm=True), x()))
    assert count == 3  # all but the first, which has no linear layer before it, and the last, whose rows are returned
    assert operators(after) == [
        "layer_norm", "linear_activation", "attention",
        "folded_linear", "row_moments", "folded_linear",
        "folded_linear", "row_moments", "folded_linear", "attention",
        "folded_linear", "row_moments", "folded_linear",
        "linear_activation", "residual_layer_norm",
    ]  # fmt: skip


def test_a_second_run_finds_nothing() -> None:
    for pre_norm in (False, True):
        after, _ = folded(fused_graph(encoder(2, pre_norm=pre_norm), x()))
        assert_left_alone(after)


def test_a_dynamic_batch() -> None:
    shapes = {"input": {0: Dim("batch", min=1, max=64)}}
    graph = fused_graph(encoder(1), x(4, 5, WIDTH), dynamic_shapes=shapes)
    env = fake_mode_of(graph).shape_env
    assert env is not None
    guards = len(env.guards)
    after, count = folded(graph)
    assert count == 1
    assert len(env.guards) == guards
    for batch in (1, 3, 7):
        given = x(batch, 5, WIDTH)
        assert relative_error(run(after, given)[0], run(graph, given)[0]) < 1e-6


# --- numbers


def bert() -> tuple[nn.Module, Tensor]:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=256, vocab_size=100
    )
    return with_random_vectors(transformers.BertModel(config)), torch.randint(0, 100, (2, 16))


def vit() -> tuple[nn.Module, Tensor]:
    config = transformers.ViTConfig(
        num_hidden_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=2,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
    )
    return with_random_vectors(transformers.ViTForImageClassification(config)), torch.randn(2, 3, 32, 32)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int]] = {
    "post-norm": (lambda: (encoder(2), x()), 3),
    "pre-norm": (lambda: (encoder(2, pre_norm=True), x()), 3),
    "bert": (bert, 3),
    "vit": (vit, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_in_float32(name: str) -> None:
    make, norms = MODELS[name]
    model, given = make()
    graph = fused_graph(model, given)
    after, count = folded(graph)
    assert count == norms
    for result, before in zip(run(after, given), run(graph, given), strict=True):
        assert relative_error(result, before) < 1e-6


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_in_half_precision(name: str, precision: str) -> None:
    model, given = MODELS[name][0]()
    graph = fused_graph(model, given, precision=precision)
    after, count = folded(graph)
    assert count == MODELS[name][1]
    truths = float64_reference(model, given)
    for result, before, truth in zip(run(after, given), run(graph, given), truths, strict=True):
        assert relative_error(result, truth) <= 2 * relative_error(before, truth)


@hypothesis.settings(deadline=None, max_examples=15, derandomize=True, database=None)
@hypothesis.given(
    groups=st.integers(1, 3),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 3.0]),
    bias=st.booleans(),
)
def test_numbers_over_sizes(groups: int, leading: list[int], scale: float, offset: float, bias: bool) -> None:
    model = with_random_vectors(Case(two_readers, width=64 * groups))
    if not bias:
        model.b.bias = None  # type: ignore[union-attr]
    given = scale * torch.randn(*leading, 64 * groups) + offset
    graph = fused_graph(model, given)
    after, count = folded(graph)
    assert count == 1
    (result,), (before,) = run(after, given), run(graph, given)
    (truth,) = float64_reference(model, given)
    # the mean is subtracted after the product instead of before it: its rounding grows with mean over deviation
    assert relative_error(result, truth) <= 4 * relative_error(before, truth) + 1e-6


def apart(layer: nn.Linear, given: Tensor) -> Tensor:
    """A linear layer that no pass merges with others of the same input."""
    result: Tensor = fused.linear_activation(given, layer.weight, layer.bias)
    return result


def two_readers(self: Case, given: Tensor) -> Any:
    rows, total = self.normalised(self.a(given), given)
    return self.b(rows) + apart(self.c, rows) + total


def test_both_readers_and_the_sum() -> None:
    graph = graph_of(two_readers, given := x())
    after, count = folded(graph)
    assert count == 1
    assert operators(after).count("folded_linear") == 3
    assert relative_error(run(after, given)[0], run(graph, given)[0]) < 1e-6


def test_a_residual_that_is_normalised_after_its_linear_layer_has_run() -> None:
    """Branches side by side: the second norm's linear layer stands before the first norm in the graph."""

    def branches(self: Case, given: Tensor) -> Any:
        right = apart(self.b, given)
        rows, _ = self.normalised(self.a(given), given)
        rows, _ = self.normalised(right, rows, self.other)
        return self.c(rows)

    graph = graph_of(branches, given := x())
    after, count = folded(graph)
    assert count == 2
    assert relative_error(run(after, given)[0], run(graph, given)[0]) < 1e-6


def test_one_linear_layer_between_two_norms() -> None:
    def chain(self: Case, given: Tensor) -> Any:
        rows, _ = self.normalised(self.a(given), given)
        rows, _ = self.normalised(self.b(rows), rows, self.other)
        return self.c(rows)

    graph = graph_of(chain, given := x())
    after, count = folded(graph)
    assert count == 2
    assert operators(after) == ["folded_linear", "row_moments", "folded_linear", "row_moments", "folded_linear"]
    assert relative_error(run(after, given)[0], run(graph, given)[0]) < 1e-6


def test_a_norm_that_cannot_fold_behind_one_that_does() -> None:
    """The second norm cannot fold (its rows are returned) and reads folded rows through its own linear layer alone."""

    def chain(self: Case, given: Tensor) -> Any:
        rows, _ = self.normalised(self.a(given), given)
        return self.normalised(self.b(rows), given, self.other)[0]

    graph = graph_of(chain, given := x())
    after, count = folded(graph)
    assert count == 1
    assert operators(after) == ["folded_linear", "row_moments", "folded_linear", "residual_layer_norm"]
    assert relative_error(run(after, given)[0], run(graph, given)[0]) < 1e-6


def test_weights_of_the_model_are_left_alone() -> None:
    graph = fused_graph(encoder(1), x(), precision="fp16")
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    after, _ = folded(graph)
    assert graph.state_dict().keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(graph.state_dict()[name], value)
    reader = next(node for node in after.graph.nodes if "column_sums" in node.kwargs)
    weight, sums = (graphs.attribute(after, n.target) for n in (reader.args[1], reader.kwargs["column_sums"]))
    assert not any(weight.data_ptr() == other.data_ptr() for other in before.values())
    assert torch.equal(sums, weight.float().sum(1))  # of the rounded weights: else the mean would not cancel


# --- what is left alone


def rows_returned(self: Case, given: Tensor) -> Any:
    rows, _ = self.normalised(self.a(given), given)
    return self.b(rows), rows


def linear_read_twice(self: Case, given: Tensor) -> Any:
    product = self.a(given)
    return self.b(self.normalised(product, given)[0]), product


def linear_twice_in_one_sum(self: Case, given: Tensor) -> Any:
    product = self.a(given)
    return self.b(self.normalised(product, product)[0])


def activation_before_the_norm(self: Case, given: Tensor) -> Any:
    product = fused.linear_activation(given, self.a.weight, self.a.bias, "relu")
    return self.b(self.normalised(product, given)[0])


def linear_with_a_residual(self: Case, given: Tensor) -> Any:
    product = fused.linear_activation(given, self.a.weight, self.a.bias, "none", given)
    return self.b(self.normalised(product, given)[0])


def no_linear_before(self: Case, given: Tensor) -> Any:
    return self.b(self.normalised(torch.tanh(given), given)[0])


def rows_counted_by_the_norm(self: Case, given: Tensor, rows: Tensor) -> Any:
    return self.b(self.normalised(self.a(given), given, rows=rows)[0])


def rows_counted_by_the_linear_before(self: Case, given: Tensor, rows: Tensor) -> Any:
    product = fused.linear_activation(given, self.a.weight, self.a.bias, rows=rows)
    return self.b(self.normalised(product, given)[0])


def rows_counted_by_the_reader(self: Case, given: Tensor, rows: Tensor) -> Any:
    normalised, _ = self.normalised(self.a(given), given)
    return fused.linear_activation(normalised, self.b.weight, self.b.bias, rows=rows)


def norm_weight_computed(self: Case, given: Tensor, weight: Tensor) -> Any:
    return self.b(fused.residual_layer_norm(self.a(given), given, weight, self.norm.bias)[0])


def reader_weight_computed(self: Case, given: Tensor, weight: Tensor) -> Any:
    rows, _ = self.normalised(self.a(given), given)
    return fused.linear_activation(rows, weight.expand(WIDTH, WIDTH).contiguous(), None)


def reader_bias_computed(self: Case, given: Tensor, bias: Tensor) -> Any:
    rows, _ = self.normalised(self.a(given), given)
    return fused.linear_activation(rows, self.b.weight, bias)


def reader_adds_the_rows_too(self: Case, given: Tensor) -> Any:
    rows, _ = self.normalised(self.a(given), given)
    return fused.linear_activation(rows, self.b.weight, self.b.bias, "none", rows)


def rows_are_a_weight(self: Case, given: Tensor) -> Any:
    rows, _ = self.normalised(self.a(given), given)
    return fused.linear_activation(given, rows, None)


def rows_are_the_x_of_a_norm(self: Case, given: Tensor) -> Any:
    rows, _ = self.normalised(self.a(given), given)
    return self.normalised(rows, given, self.other)[0]


def rows_read_by_an_operator(self: Case, given: Tensor) -> Any:
    return torch.tanh(self.normalised(self.a(given), given)[0])


def rows_read_by_nobody(self: Case, given: Tensor) -> Any:
    return self.normalised(self.a(given), given)[1]


COUNT, VECTOR, SQUARE = torch.tensor([3], dtype=torch.int32), torch.randn(WIDTH), torch.randn(5, WIDTH)
LEFT_ALONE: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]] = {
    f.__name__: (f, inputs, {})
    for f, inputs in (
        (rows_returned, ()), (linear_read_twice, ()), (linear_twice_in_one_sum, ()), (activation_before_the_norm, ()),
        (linear_with_a_residual, ()), (no_linear_before, ()), (rows_counted_by_the_norm, (COUNT,)),
        (rows_counted_by_the_linear_before, (COUNT,)), (rows_counted_by_the_reader, (COUNT,)),
        (norm_weight_computed, (VECTOR,)), (reader_weight_computed, (VECTOR,)), (reader_bias_computed, (VECTOR,)),
        (reader_adds_the_rows_too, ()), (rows_are_the_x_of_a_norm, ()), (rows_read_by_an_operator, ()),
        (rows_read_by_nobody, ()),
    )
} | {
    "width_no_multiple_of_64": (two_readers, (), {"width": 96}),
    "norm_without_weights": (two_readers, (), {"affine": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    function, inputs, options = LEFT_ALONE[name]
    width = options.get("width", WIDTH)
    graph = graph_of(function, x(2, 5, width), *inputs, **options)
    assert "residual_layer_norm" in operators(graph)
    assert_left_alone(graph)


def test_rows_that_are_a_weight_are_left_alone() -> None:
    graph = graph_of(rows_are_a_weight, x(5, WIDTH))
    assert_left_alone(graph)


def test_a_residual_of_another_dtype_is_left_alone() -> None:
    def widened(self: Case, given: Tensor, residual: Tensor) -> Any:
        return self.b(self.normalised(self.a(given), residual)[0].float())

    assert_left_alone(graph_of(widened, x(), x().half()))


def test_a_norm_whose_results_are_read_at_once_is_left_alone() -> None:
    graph = graph_of(two_readers, x())
    norm = graph.graph.find_nodes(op="call_function", target=fused.residual_layer_norm.default)[0]
    output = graph.graph.output_node()
    output.args = ((*output.args[0], norm),)  # type: ignore[misc]
    graph.recompile()
    assert_left_alone(graph)
