"""OnnxOptimizer: same results, fewer nodes, a second run rewrites nothing, weights are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelkit.errors import PassError
from accelkit.onnx_export import export_onnx, external_weights
from accelkit.pass_runner import run_onnx_passes
from accelkit.testing import trace
from accelkit_passes.onnx_optimizer import OnnxOptimizer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxoptimizer")
helper = pytest.importorskip("onnx.helper")


def chain(*nodes: Any) -> Any:
    value = lambda name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3])  # noqa: E731
    graph = helper.make_graph(list(nodes), "g", [value("x")], [value("y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def node(kind: str, source: str, result: str, **attributes: Any) -> Any:
    return helper.make_node(kind, [source], [result], name=result, **attributes)


def run(model: Any, x: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_rewrites_are_told_and_a_second_run_has_none() -> None:
    def model() -> Any:
        return chain(
            node("Identity", "x", "a"), node("Transpose", "a", "b", perm=[1, 0]),
            node("Transpose", "b", "c", perm=[1, 0]),
            node("Relu", "c", "d"), node("Relu", "d", "y"), node("Sqrt", "x", "unused"),
        )  # fmt: skip

    x = torch.randn(2, 3)
    optimized, (record,) = run_onnx_passes(model(), [OnnxOptimizer()])
    assert [n.op_type for n in optimized.graph.node] == ["Relu"]
    assert any(r.startswith("eliminate_identity: removed a") for r in record.rewrites), record.rewrites
    assert (record.nodes_before, record.nodes_after) == (6, 1)
    assert torch.equal(run(optimized, x), run(model(), x))
    again, (record,) = run_onnx_passes(optimized, [OnnxOptimizer()])
    assert record.rewrites == ()
    assert again == optimized


def test_equal_looking_weights_stay_apart() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model = export_onnx(trace(layers, torch.randn(2, 32)))
    weights = {i.name for i in model.graph.initializer if i.data_location == i.EXTERNAL}
    everything = tuple(pytest.importorskip("onnxoptimizer").get_fuse_and_elimination_passes())
    for one in (OnnxOptimizer(), OnnxOptimizer(passes=everything)):
        optimized, _ = run_onnx_passes(onnx.ModelProto.FromString(model.SerializeToString()), [one])
        assert {i.name for i in optimized.graph.initializer if i.data_location == i.EXTERNAL} == weights
        assert len(external_weights(optimized, trace(layers, torch.randn(2, 32)))) == 3


def test_local_functions_are_refused() -> None:
    model = chain(node("Identity", "x", "a"), node("Relu", "a", "y"))
    function = helper.make_function(
        "local", "Twice", ["v"], ["w"], [node("Relu", "v", "w")], [helper.make_opsetid("", 18)]
    )
    model.functions.append(function)
    optimized, (record,) = run_onnx_passes(model, [OnnxOptimizer()])
    assert "1 local functions" in record.refusals[0].reason
    assert len(optimized.graph.node) == 2


def test_unknown_passes_are_an_error() -> None:
    with pytest.raises(PassError, match=r"no pass \['make_it_fast'\]; it has .*eliminate_identity"):
        OnnxOptimizer(passes=("make_it_fast",)).run(chain(node("Relu", "x", "y")))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxoptimizer", None)
    with pytest.raises(PassError, match=r'needs onnxoptimizer: pip install "accelkit\[cpu\]"'):
        OnnxOptimizer().run(chain(node("Relu", "x", "y")))
