"""The forms that TensorRT fuses: before and after, what is left alone, and the same numbers, rows that see nothing included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from accelkit import Dim, ops
from accelkit.backends.tensorrt import masks
from accelkit.backends.tensorrt.forms import FORMS, rewritten
from accelkit.backends.tensorrt.masks import finite_masks, hides_no_row
from accelkit.backends.tensorrt.outputs import name_outputs
from accelkit.backends.tensorrt.patches import patches_as_rows
from accelkit.graph import graph_text
from accelkit.onnx_export import export_onnx
from accelkit.testing import run, trace

onnx = pytest.importorskip("onnx")

attention = ops.attention.OPERATOR.overload
patch_embedding = ops.patch_embedding.OPERATOR.overload


class Of(nn.Module):
    def __init__(self, function: Any, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def body(graph: Any) -> list[str]:
    return [line for line in graph_text(graph).splitlines() if "= input" not in line and "= attribute" not in line]


# --- patches


def test_patches_become_rows() -> None:
    weight, bias = torch.randn(8, 3, 4, 2), torch.randn(8)
    model = Of(lambda m, x: patch_embedding(x, m.weight, m.bias), weight=weight, bias=bias)
    x = torch.randn(2, 3, 9, 6)
    graph = trace(model, x)
    after = patches_as_rows(graph)
    assert body(after) == [
        "%0: f32[2, 3, 8, 6] = aten.slice.Tensor(%inputs_0, 2, 0, 8)",
        "%1: f32[2, 3, 2, 4, 3, 2] = aten.reshape(%0, [2, 3, 2, 4, 3, 2])",
        "%2: f32[2, 2, 3, 3, 4, 2] = aten.permute(%1, [0, 2, 4, 1, 3, 5])",
        "%3: f32[2, 6, 24] = aten.reshape(%2, [2, 6, 24])",
        "%4: f32[2, 6, 8] = aten.linear(%3, %weight_rows, %bias)",
        "return (%4)",
    ]
    torch.testing.assert_close(run(after, x)[0], run(graph, x)[0])
    assert patches_as_rows(after) is after
    assert after.weight_rows.data_ptr() == graph.weight.data_ptr(), "the weight is in memory twice"


def test_patches_of_a_dynamic_batch() -> None:
    model = Of(lambda m, x: patch_embedding(x, m.weight, None), weight=torch.randn(8, 3, 4, 4))
    graph = trace(model, torch.randn(2, 3, 8, 8), dynamic_shapes={"inputs": ({0: Dim("batch", max=8)},)})
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(run(patches_as_rows(graph), x)[0], run(graph, x)[0])


def test_patches_of_an_image_of_any_size_stay_a_convolution() -> None:
    model = Of(lambda m, x: patch_embedding(x, m.weight, m.bias), weight=torch.randn(8, 3, 4, 4), bias=torch.randn(8))
    shapes = {"inputs": ({2: Dim("rows", min=8, max=64)},)}
    x = torch.randn(2, 3, 16, 8)
    graph = trace(model, x, dynamic_shapes=shapes)
    assert patches_as_rows(graph) is graph
    assert_onnx_computes(export_onnx(graph, opset=18, translations=FORMS), {"inputs_0": x}, run(graph, x), graph)


# --- masks


def masked(build: Any, **tensors: torch.Tensor) -> Of:
    return Of(lambda m, q, k, v, *mask: attention(q, k, v, build(m, *mask)), **tensors)


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 5, 4, 8).to(dtype) for _ in range(3)]


def test_a_mask_of_keys_is_one_factor() -> None:
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    graph = trace(masked(lambda m, mask: mask), *operands(), mask)
    after = finite_masks(graph)
    assert body(after) == [
        "%0: b1[2, 1, 1, 5] = aten.logical_not(%inputs_3)",
        "%1: f32[2, 1, 1, 5] = aten.to.dtype(%0, torch.float32)",
        "%2: f32[2, 1, 1, 5] = aten.mul.Tensor(%1, -1.7014117331926443e+38)",
        "%3: b1[2, 1, 1, 1] = aten.any.dim(%inputs_3, -1, True)",
        "%4: f32[2, 1, 1, 1] = aten.to.dtype(%3, torch.float32)",
        "%5: f32[2, 5, 4, 8] = accelkit.attention(%inputs_0, %inputs_1, %inputs_2, %2, False, None, auto)",
        "%6: f32[2, 5, 4, 8] = aten.mul.Tensor(%5, %4)",
        "return (%6)",
    ]
    assert {n.name for n in after.graph.nodes if n.target is attention} == {"attention"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (5, 5), (1, 5)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "infinite", "finite"])
def test_rows_that_see_nothing_are_zeros(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask = torch.rand(shape) > 0.4
    mask[(0,) * (len(shape) - 1)] = False
    mask[..., -1, 0] = True
    given = mask
    if kind != "boolean":
        lowest = -math.inf if kind == "infinite" else -64.0
        given = torch.where(mask, torch.randn(shape), torch.tensor(lowest)).to(dtype)
    inputs = [*operands(dtype), given]
    graph = trace(masked(lambda m, mask: mask), *inputs)
    after, expected = rewritten(graph), run(graph, *inputs)[0]
    assert after is not graph
    torch.testing.assert_close(run(after, *inputs)[0], expected)
    if len(shape) == 2 or dtype is torch.float32:
        return  # one of each kind through ONNX
    model = export_onnx(after, opset=18, translations=FORMS)
    assert_onnx_computes(model, dict(zip([i.name for i in model.graph.input], inputs, strict=True)), [expected], after)


def test_scores_far_below_zero_are_no_nan_in_a_hidden_row() -> None:
    q, k, v = torch.ones(1, 2, 1, 64).half() * 4, -torch.ones(1, 2, 1, 64).half() * 4, torch.randn(1, 2, 1, 64).half()
    mask = torch.zeros(1, 1, 1, 2, dtype=torch.bool)
    graph = trace(masked(lambda m, mask: mask), q, k, v, mask)
    assert run(finite_masks(graph), q, k, v, mask)[0].eq(0).all()


def test_layers_share_one_mask() -> None:
    def two(m: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        first = attention(q, k, v, mask.reshape(2, 1, 1, 5))
        return attention(first, k, v, mask.reshape(2, 1, 1, 5))

    graph = trace(Of(two), *operands(), torch.ones(2, 5, dtype=torch.bool))
    assert [str(n.target) for n in finite_masks(graph).graph.nodes].count("aten.any.dim") == 1


def chosen(m: Any, c: torch.Tensor) -> torch.Tensor:
    return torch.where(c, m.zero, m.low)[:, None, None]


HALF = torch.eye(5, dtype=torch.bool)
PROVED = {
    "a constant": (lambda m: m.mask, {"mask": HALF}, True),
    "a constant with a hidden row": (lambda m: m.mask, {"mask": HALF & (torch.arange(5) != 3)[:, None]}, False),
    "constant numbers": (lambda m: m.mask, {"mask": torch.zeros(5, 5)}, True),
    "chosen numbers": (chosen, {"zero": torch.zeros(()), "low": torch.tensor(-1e9)}, True),
    "chosen, infinite": (chosen, {"zero": torch.zeros(()), "low": torch.tensor(-math.inf)}, False),
    "filled": (lambda m, c: torch.zeros_like(c, dtype=torch.float32).masked_fill(~c, -1e9)[:, None, None], {}, False),
    "an input": (lambda m, c: c[:, None, None], {}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_what_provably_hides_no_row(name: str) -> None:
    build, tensors, expected = PROVED[name]
    inputs = [*operands(), *([torch.rand(2, 5) > 0.5] if build.__code__.co_argcount > 1 else [])]
    graph = trace(masked(build, **tensors), *inputs)
    (node,) = (n for n in graph.graph.nodes if n.target is attention)
    assert hides_no_row(graph, node.args[3]) is expected
    after = finite_masks(graph)
    assert any(n.target is torch.ops.aten.any.dim for n in after.graph.nodes) is not expected
    torch.testing.assert_close(run(after, *inputs)[0], run(graph, *inputs)[0])


def test_masks_beside_causal_attention_stay() -> None:
    model = Of(lambda m, q, k, v, mask: attention(q, k, v, mask, True))
    graph = trace(model, *operands(), torch.ones(2, 1, 1, 5, dtype=torch.bool))
    assert finite_masks(graph) is graph
    assert masks.ATTENTION is attention


# --- ONNX


def test_identities_are_names() -> None:
    helper = onnx.helper
    nodes = [
        helper.make_node(kind, [given], [made])
        for kind, given, made in (("Relu", "x", "a"), ("Identity", "a", "y"), ("Identity", "a", "b"), ("Neg", "b", "z"),
                                  ("Identity", "x", "w"), ("Identity", "z", "z2"))
    ]  # fmt: skip
    values = [helper.make_tensor_value_info(n, 1, [2]) for n in ("x", "y", "z", "w", "z2")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))
    name_outputs(model)
    assert [(n.op_type, *n.input, *n.output) for n in model.graph.node] == [
        ("Relu", "x", "y"), ("Neg", "y", "z"), ("Identity", "x", "w"), ("Identity", "z", "z2"),
    ]  # fmt: skip
    onnx.checker.check_model(model)


def assert_onnx_computes(model: Any, inputs: Any, expected: Any, graph: Any) -> None:
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    from accelkit.onnx_export import external_weights

    for name, tensor in external_weights(model, graph).items():
        (initializer,) = (i for i in model.graph.initializer if i.name == name)
        initializer.CopyFrom(numpy_helper.from_array(tensor.numpy(), name))
    results = ReferenceEvaluator(model).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    for result, wanted in zip(results, expected, strict=True):
        tolerance = 3e-2 if wanted.dtype is torch.float16 else 1e-5
        torch.testing.assert_close(torch.from_numpy(result), wanted, rtol=tolerance, atol=tolerance)
