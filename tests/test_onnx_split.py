"""Packed products come apart again for ONNX Runtime, with views of the weights, and only where all readers are pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelkit import Dim
from accelkit.backend_api import CompileContext
from accelkit.backends.onnxruntime import OnnxRuntime
from accelkit.graph import graph_text
from accelkit.onnx_split import split_linears
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Packed(nn.Module):
    def __init__(self, read: Any, bias: bool = True) -> None:
        super().__init__()
        self.project, self.read = nn.Linear(8, 24, bias=bias), read

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(self.project(x))


def slices(y: torch.Tensor) -> Any:
    return y[..., :8] * 2, y[..., 8:16] + 1, y[..., 16:].relu()


def selects(y: torch.Tensor) -> Any:
    q, k, v = (y.reshape(*y.shape[:2], 3, 2, 4).select(2, i) for i in range(3))
    return q * 2, k + 1, v.relu()


TEXT = """\
%x: f32[2, 3, 8] = input
%project.weight: f32[24, 8] = attribute
%project.bias: f32[24] = attribute
%project_weight_rows_0: f32[8, 8] = attribute
%project_bias_rows_0: f32[8] = attribute
%0: f32[2, 3, 8] = aten.linear(%x, %project_weight_rows_0, %project_bias_rows_0)
%project_weight_rows_8: f32[8, 8] = attribute
%project_bias_rows_8: f32[8] = attribute
%1: f32[2, 3, 8] = aten.linear(%x, %project_weight_rows_8, %project_bias_rows_8)
%project_weight_rows_16: f32[8, 8] = attribute
%project_bias_rows_16: f32[8] = attribute
%2: f32[2, 3, 8] = aten.linear(%x, %project_weight_rows_16, %project_bias_rows_16)"""


def test_text_and_memory() -> None:
    graph = trace(Packed(slices), torch.randn(2, 3, 8))
    before = graph_text(graph)
    apart = split_linears(graph)
    apart.graph.lint()
    assert graph_text(graph) == before
    found = [line.split(" attribute ")[0] for line in graph_text(apart).splitlines()]
    lines = [line.removesuffix(" project.weight").removesuffix(" project.bias") for line in found]
    assert set(TEXT.splitlines()) <= set(lines), graph_text(apart)
    assert apart.project_weight_rows_8.untyped_storage()._cdata == graph.project.weight.untyped_storage()._cdata  # type: ignore[union-attr]
    assert split_linears(apart) is apart


@pytest.mark.parametrize("read", [slices, selects])
@pytest.mark.parametrize("bias", [True, False])
def test_numbers_at_dynamic_sizes(read: Any, bias: bool) -> None:
    model = Packed(read, bias).eval()
    graph = trace(model, torch.randn(2, 3, 8), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},))
    apart = split_linears(graph)
    apart.graph.lint()
    assert sum(n.target is torch.ops.aten.linear.default for n in apart.graph.nodes) == 3
    for sizes in ((2, 3), (1, 1), (4, 7)):
        x = torch.randn(*sizes, 8)
        for result, expected in zip(apart(x), graph(x), strict=True):
            torch.testing.assert_close(result, expected)  # a smaller product may add in another order


@pytest.mark.parametrize(
    "read",
    [
        lambda y: (y[..., :8], y[..., 8:].relu(), y.sum()),
        lambda y: y[..., ::2] * 2,
        lambda y: y[:, :1] * 2,
        lambda y: y.relu(),
        lambda y: y.reshape(2, 3, 3, 2, 4).select(3, 0) * 2,
        lambda y: y.reshape(2, 3, 3, 2, 4).select(2, 0) * y.mean(),
        lambda y: y.reshape(3, 2, 3, 2, 4).select(2, 0) * 2,
    ],
    ids=[
        "read as a whole too",
        "every second column",
        "rows",
        "no piece",
        "other dimension",
        "whole and piece",
        "other leading sizes",
    ],
)
def test_what_stays_whole(read: Any) -> None:
    graph = trace(Packed(read), torch.randn(2, 3, 8))
    assert split_linears(graph) is graph


def test_an_engine_and_the_same_model_with_other_weights() -> None:
    x, (one, other) = torch.randn(2, 3, 16), (Packed(slices, bias=False).eval() for _ in range(2))
    one.project, other.project = (nn.Linear(16, 96, bias=False) for _ in range(2))
    read = lambda y: (y[..., :32] * 2, y[..., 32:] + 1)  # noqa: E731
    one.read = other.read = read
    graphs = [trace(model, x) for model in (one, other)]
    engine = OnnxRuntime().compile(graphs[0], [x], CompileContext())
    model = onnx.ModelProto.FromString(engine.serialize()["model.onnx"])
    assert [n.op_type for n in model.graph.node].count("FusedMatMul") == 2
    assert not any(n.op_type == "Slice" for n in model.graph.node)
    loaded = OnnxRuntime().load(engine.serialize(), graphs[1], [x], CompileContext())
    for run, graph in ((engine, graphs[0]), (loaded, graphs[1])):
        for result, expected in zip(run(x), graph(x), strict=True):
            torch.testing.assert_close(result, expected)
