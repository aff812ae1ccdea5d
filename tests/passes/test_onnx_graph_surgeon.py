"""OnnxGraphSurgeon: small constants folded, large ones and weights not, unread nodes removed, idempotent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelkit.errors import PassError
from accelkit.onnx_export import export_onnx
from accelkit.pass_runner import run_onnx_passes
from accelkit.testing import trace
from accelkit_passes.onnx_graph_surgeon import OnnxGraphSurgeon

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_graphsurgeon")
pytest.importorskip("onnxruntime")
helper = pytest.importorskip("onnx.helper")
FLOAT = 1


def model(length: int, data_type: int = FLOAT) -> Any:
    """y = x + (c * c), with an unread Sqrt; c has `length` elements."""
    value = lambda name: helper.make_tensor_value_info(name, data_type, [length])  # noqa: E731
    constant = helper.make_tensor("c", data_type, [length], torch.randn(length).tolist())
    nodes = [
        helper.make_node("Mul", ["c", "c"], ["square"], name="multiply"),
        helper.make_node("Sqrt", ["x"], ["unread"], name="root"),
        helper.make_node("Add", ["x", "square"], ["y"], name="add"),
    ]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], [constant])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(built: Any, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_small_constants_fold_and_unread_nodes_go() -> None:
    built, x = model(8), torch.randn(8)
    expected = run(built, x)
    cleaned, (record,) = run_onnx_passes(built, [OnnxGraphSurgeon()])
    assert [n.op_type for n in cleaned.graph.node] == ["Add"]
    assert set(record.rewrites) == {"folded multiply", "removed root"}
    torch.testing.assert_close(run(cleaned, x), expected)
    again, (record,) = run_onnx_passes(cleaned, [OnnxGraphSurgeon()])
    assert record.rewrites == ()
    assert again == cleaned


def test_large_constants_are_not_folded() -> None:
    cleaned, (record,) = run_onnx_passes(model(500), [OnnxGraphSurgeon(limit_bytes=1000)])
    assert record.rewrites == ("removed root",)
    assert [n.op_type for n in cleaned.graph.node] == ["Mul", "Add"]


def test_weights_keep_their_place() -> None:
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    exported = export_onnx(
        trace(layers, torch.randn(2, 3, 32))
    )  # MatMul(x, Transpose(weight)): constant but for its value
    before = {i.name: i.SerializeToString() for i in exported.graph.initializer if i.data_location == i.EXTERNAL}
    assert any(n.op_type == "Transpose" for n in exported.graph.node)
    cleaned, _ = run_onnx_passes(exported, [OnnxGraphSurgeon(limit_bytes=1 << 20)])
    after = {i.name: i.SerializeToString() for i in cleaned.graph.initializer if i.data_location == i.EXTERNAL}
    assert after == before
    assert any(n.op_type == "Transpose" for n in cleaned.graph.node)


def test_types_that_numpy_lacks_are_refused() -> None:
    built = model(8, onnx.TensorProto.BFLOAT16)
    kept, (record,) = run_onnx_passes(built, [OnnxGraphSurgeon()])
    assert record.refusals[0].reason == "has bfloat16 constants, which onnx-graphsurgeon does not read"
    assert len(kept.graph.node) == 3


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx_graphsurgeon", None)
    with pytest.raises(PassError, match=r'needs onnx-graphsurgeon: pip install "accelkit\[cpu\]"'):
        OnnxGraphSurgeon().run(model(8))
