"""fuse_residual_layer_norm: post-norm uses one result, pre-norm both; what is no residual sum is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import floats, quick, reasons, write_before
from torch import Tensor, nn
from torch.nn import functional as F

from accelkit import Dim
from accelkit.testing import (
    apply,
    assert_idempotent,
    assert_left_alone,
    assert_same_numbers,
    graph_text,
    relative_error,
    run,
    trace,
)  # fmt: skip
from accelkit_passes.fuse_residual_layer_norm import FuseResidualLayerNorm

fused_op = torch.ops.accelkit.residual_layer_norm.default


class Layer(nn.Module):
    """`body(self, x, y)` with a norm of its own."""

    def __init__(self, body: Callable[..., Any], width: int = 6, **norm: Any) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(width, **norm), body
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


def post_norm(self: Layer, x: Tensor, y: Tensor) -> Tensor:
    return self.norm(y.relu() + x)


def pre_norm(self: Layer, x: Tensor, y: Tensor) -> Tensor:
    x = x + y.relu()
    return x + self.norm(x).relu()


def upcast(self: Layer, x: Tensor, y: Tensor) -> Any:
    total = x + y  # float16, the norm's weights float32
    return self.norm(total.float()).to(x.dtype), total


def test_post_norm_before_and_after() -> None:
    graph = trace(Layer(post_norm), torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    record = apply(FuseResidualLayerNorm(), graph)
    assert graph_text(graph).splitlines()[2:] == [
        "%x: f32[2, 3, 6] = input",
        "%y: f32[2, 3, 6] = input",
        "%0: f32[2, 3, 6] = aten.relu(%y)",
        "%1: (f32[2, 3, 6], f32[2, 3, 6]) = accelkit.residual_layer_norm(%0, %x, %norm.weight, %norm.bias, 1e-05)",
        "%2: f32[2, 3, 6] = getitem(%1, 0)",
        "return (%2)",
    ]
    assert record.rewrites == ("add into layer_norm",)


def test_pre_norm_before_and_after() -> None:
    graph = trace(Layer(pre_norm), torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    apply(FuseResidualLayerNorm(), graph)
    assert graph_text(graph).splitlines()[4:] == [  # the newer operand is x, whichever way it was added
        "%0: f32[2, 3, 6] = aten.relu(%y)",
        "%1: (f32[2, 3, 6], f32[2, 3, 6]) = accelkit.residual_layer_norm(%0, %x, %norm.weight, %norm.bias, 1e-05)",
        "%2: f32[2, 3, 6] = getitem(%1, 0)",
        "%3: f32[2, 3, 6] = getitem(%1, 1)",
        "%4: f32[2, 3, 6] = aten.relu(%2)",
        "%5: f32[2, 3, 6] = aten.add.Tensor(%3, %4)",
        "return (%5)",
    ]


def test_norm_in_float32_between_casts_and_a_sum_that_is_an_output() -> None:
    graph = trace(Layer(upcast), torch.randn(2, 6).half(), torch.randn(2, 6).half())
    apply(FuseResidualLayerNorm(), graph)
    assert graph_text(graph).splitlines()[4:] == [
        "%0: (f16[2, 6], f16[2, 6]) = accelkit.residual_layer_norm(%y, %x, %norm.weight, %norm.bias, 1e-05)",
        "%1: f16[2, 6] = getitem(%0, 0)",
        "%2: f16[2, 6] = getitem(%0, 1)",
        "return (%1, %2)",
    ]


def norm_of(what: Callable[..., Any]) -> Layer:
    return Layer(lambda self, x, y: self.norm(what(x, y)))


LEFT_ALONE: dict[str, tuple[nn.Module, str]] = {
    "no sum": (norm_of(lambda x, y: x * y), "its input (mul) is no sum"),
    "an input": (norm_of(lambda x, y: x), "its input (x) is no sum"),
    "a number": (norm_of(lambda x, y: x + 1), "its input (add) adds a number, not a residual"),
    "scaled": (norm_of(lambda x, y: torch.add(x, y, alpha=2)), "alpha=2 scales the second operand of add"),
    "broadcast over the batch": (norm_of(lambda x, y: x + y[:1]), "slice_1 [1, 3, 6] is broadcast to [2, 3, 6] by add"),
    "broadcast over all": (norm_of(lambda x, y: y[0, 0] + x), "[6] is broadcast to [2, 3, 6] by add"),
    "integers added": (norm_of(lambda x, y: x + y.long()), "to, which add adds, is torch.int64"),
    "two dimensions": (
        Layer(lambda self, x, y: F.layer_norm(x + y, (3, 6))),
        "it normalises the last 2 dimensions, not the last one alone",
    ),
    "float64 inside": (
        Layer(lambda self, x, y: F.layer_norm((x + y).double(), (6,)).float()),
        "layer_norm computes in torch.float64, the sum is torch.float32",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, reason = LEFT_ALONE[case]
    assert_left_alone(FuseResidualLayerNorm(), model, torch.randn(2, 3, 6), torch.randn(2, 3, 6), reason=reason)


def test_result_that_is_read_in_float32_is_refused() -> None:
    model = Layer(lambda self, x, y: F.layer_norm((x + y).float(), (6,)) * 2)
    inputs = torch.randn(2, 6).half(), torch.randn(2, 6).half()
    reason = "mul reads the result in torch.float32, the sum is torch.float16"
    assert_left_alone(FuseResidualLayerNorm(), model, *inputs, reason=reason)


def test_second_norm_of_one_sum_stays_and_says_why() -> None:
    def parallel(self: Layer, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return self.norm(total) + F.layer_norm(total, (6,))

    graph = trace(Layer(parallel), torch.randn(2, 6), torch.randn(2, 6))
    record = apply(FuseResidualLayerNorm(), graph)
    assert record.rewrites == ("add into layer_norm",)
    reason = "its sum is computed by residual_layer_norm_default for another norm already"
    assert [refusal.reason for refusal in record.refusals] == [reason]


def test_weight_that_is_computed_after_the_sum_is_refused() -> None:
    def late(self: Layer, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return F.layer_norm(total, (6,), self.norm.weight * 2, self.norm.bias)

    reason = "its weight (mul) is computed after the sum (add)"
    assert_left_alone(FuseResidualLayerNorm(), Layer(late), torch.randn(2, 6), torch.randn(2, 6), reason=reason)


def test_weight_that_is_first_named_after_the_sum_is_moved() -> None:
    graph = trace(Layer(post_norm), torch.randn(2, 6), torch.randn(2, 6))
    (norm,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    for weight in graph.graph.find_nodes(op="get_attr"):
        norm.prepend(weight)
    assert len(apply(FuseResidualLayerNorm(), graph).rewrites) == 1


def test_write_in_between_is_refused() -> None:
    graph = trace(Layer(post_norm), torch.randn(2, 6), torch.randn(2, 6))
    write_before(graph, "layer_norm")
    assert reasons(FuseResidualLayerNorm(), graph) == ["add__tensor writes to memory between add and layer_norm"]


@pytest.mark.parametrize("body", [post_norm, pre_norm])
def test_second_run_finds_nothing_and_sizes_stay_dynamic(body: Any) -> None:
    dims = {0: Dim("batch", max=64), 1: Dim("length", max=99)}
    inputs = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    assert_idempotent(FuseResidualLayerNorm(), Layer(body), *inputs, dynamic_shapes={"x": dims, "y": dims})


def test_broadcast_over_a_dynamic_batch_is_refused() -> None:
    inputs, dims = (torch.randn(3, 5, 6), torch.randn(1, 5, 6)), {"x": {0: Dim("batch", max=64)}, "y": {}}
    reason = "y [1, 5, 6] is broadcast to [s"
    model = norm_of(lambda x, y: x + y)
    assert_left_alone(FuseResidualLayerNorm(), model, *inputs, reason=reason, dynamic_shapes=dims)


@quick
@given(
    body=st.sampled_from([post_norm, pre_norm]),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 9),
    affine=st.booleans(),
    dtype=floats,
    seed=st.integers(0, 2**31),
)
def test_numbers(body: Any, shape: list[int], width: int, affine: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = Layer(body, width, elementwise_affine=affine).to(dtype)
    x, y = (torch.randn(*shape, width, dtype=dtype) for _ in range(2))
    assert_same_numbers(FuseResidualLayerNorm(), model, x, y)
    x = torch.randn(width, *shape, dtype=dtype).movedim(0, -1)  # not contiguous
    assert_same_numbers(FuseResidualLayerNorm(), model, x, y, times=2, floor=torch.finfo(dtype).eps)


def test_numbers_between_casts() -> None:
    model = Layer(upcast)
    x, y = torch.randn(64, 6).half(), torch.randn(64, 6).half()
    graph = trace(model, x, y)
    before = run(graph, x, y)
    apply(FuseResidualLayerNorm(), graph)
    assert [relative_error(new, old) for new, old in zip(run(graph, x, y), before, strict=True)] == [0.0, 0.0]
