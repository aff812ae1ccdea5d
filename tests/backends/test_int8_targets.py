"""INT8 on the CPU targets: their integer kernels really run, and are as wrong as the emulation, not more."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accelkit
from accelkit import Dim, Int8, LoweringError
from accelkit.backends.inductor import Inductor
from accelkit.testing import relative_error

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quantization"))
models = importlib.import_module("models")

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")  # tiny models gain nothing
WIDE = 64  # weights of 16 KiB: outside of ONNX models


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelkit.checks.TIMING_SECONDS", 0.0)


def int8(model: nn.Module, example: Any, calibration: Any, target: Any, precision: Any = "int8", **options: Any):
    return accelkit.optimize(
        model, example, target=target, precision=precision, calibration=calibration, cache=False, **options
    )


def facts(fast: accelkit.CompiledModel) -> Any:
    ((piece,),) = (v.pieces for v in fast.report().variants)
    return piece.facts


def operators_that_run(fast: accelkit.CompiledModel, graph: Any, tmp_path: Path) -> list[str]:
    """The operators of ONNX Runtime's own optimised model."""
    import onnx
    import onnxruntime

    from accelkit.backends.onnxruntime import OnnxRuntime
    from accelkit.backends.onnxruntime.engine import BLOB
    from accelkit.backends.onnxruntime.session import _ort_value
    from accelkit.onnx_export import external_weights

    ((piece,),) = ((p for p in v.lowered.pieces) for v in fast._built.variants)  # type: ignore[union-attr]
    data = piece.engine.serialize()[BLOB]
    weights = external_weights(onnx.ModelProto.FromString(data), OnnxRuntime()._prepared(graph)[1])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    options.add_external_initializers(list(weights), [_ort_value(t) for t in weights.values()])
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize(
    ("make", "scheme", "products"),
    [
        # a layer: q, k and v apart, attention's output, up, down; then the head
        (models.vit, "qdq", 6 + 1),
        # attention's two products besides, the head not
        (models.vit, "ft1", 6 + 2),
        # ft2 rounds products before their bias, so that qkv stays whole
        (models.bert, "ft2", 4 + 2),
    ],
)
def test_onnxruntime_runs_integer_kernels(make: Any, scheme: str, products: int, tmp_path: Path) -> None:
    model, batches = make(layers=1)
    fast, emulated = (
        int8(model, batches[0], batches, target, Int8(scheme, activations="u8")) for target in ("onnxruntime", "eager")
    )
    example = _tuple(batches[1])
    for ours, plain in zip(_tuple(fast(*example)), _tuple(emulated(*example)), strict=True):
        assert relative_error(ours, plain) < 0.02  # a rounding the other way here and there
    assert facts(fast).precisions["int8"] == products
    graph = fast._built.variants[0].lowered.graph  # type: ignore[union-attr]
    from accelkit.ops.decompose import decomposed_for

    graph, _ = decomposed_for("onnxruntime", accelkit.backends.onnxruntime.OnnxRuntime.fused_operators, graph, [])
    running = operators_that_run(fast, graph, tmp_path)
    assert running.count("MatMulIntegerToFloat") == products
    kept = 0 if scheme == "qdq" else 1  # head and pooler
    assert sum(running.count(kind) for kind in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")) == kept


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("make", "scheme", "layers"), [(models.vit, "ft2", 4)])
def test_inductor_runs_onednns_integer_kernels(make: Any, scheme: str, layers: int) -> None:
    if (why := Inductor().unavailable()) is not None:
        pytest.skip(why)
    model, batches = make(layers=1)
    fast, emulated = (
        int8(model, batches[0], batches, target, Int8(scheme, activations="u8")) for target in ("inductor", "eager")
    )
    example = _tuple(batches[1])
    given = [t.clone() for t in example]
    for ours, plain in zip(_tuple(fast(*given)), _tuple(emulated(*example)), strict=True):
        assert relative_error(ours, plain) < 0.02
    # Inductor adds residuals in place, the model's input among them
    assert all(torch.equal(t, before) for t, before in zip(given, example, strict=True))
    assert facts(fast).precisions["int8"] == layers
    assert f"{layers} of {layers} quantised layers are oneDNN's products of 8-bit integers" in facts(fast).notes


def test_without_freezing_inductor_has_no_integer_kernels() -> None:
    if (why := Inductor().unavailable()) is not None:
        pytest.skip(why)
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 8)).eval(), torch.randn(4, WIDE)
    with pytest.raises(
        LoweringError, match="integer products of none of the 2 quantised layers: that needs freezing=True"
    ):
        int8(model, x, [x], Inductor(freezing=False))


def test_ranges_at_run_time(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.GELU(), nn.Linear(WIDE, 8)).eval(), torch.randn(4, WIDE)
    fast, emulated = (int8(model, x, None, target, Int8("dynamic")) for target in ("onnxruntime", "eager"))
    assert relative_error(fast(3 * x), emulated(3 * x)) < 0.01
    assert relative_error(fast(3 * x), model(3 * x)) < 0.02
    running = operators_that_run(fast, fast._built.variants[0].lowered.graph, tmp_path)  # type: ignore[union-attr]
    assert running.count("DynamicQuantizeMatMul") == 2


def test_onnxruntimes_kernels_take_unsigned_activations() -> None:
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 8)).eval(), torch.randn(4, WIDE)
    assert facts(int8(model, x, [x], "onnxruntime")).precisions["int8"] == 2
    with pytest.raises(LoweringError, match=r"none of the 2 quantised products .*Int8\(activations='u8'\)"):
        int8(model, x, [x], "onnxruntime", Int8(activations="s8"))


def test_new_weights_without_a_new_engine() -> None:
    """int8 weights stay outside of the ONNX model: a refit with the same activations' ranges exports nothing."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDE, 8 * WIDE)).eval(), torch.randn(4, WIDE)
    fast = int8(model, x, [x], "onnxruntime")
    other = nn.Sequential(nn.Linear(WIDE, 8 * WIDE)).eval()
    fast.refit(other.state_dict())
    assert relative_error(fast(x), other(x)) < 0.02
    assert fast.report().variants[0].pieces[0].origin == "refitted"


@pytest.mark.parametrize("target", ["onnxruntime", "inductor"])
def test_dynamic_shapes(target: str) -> None:
    model = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 8)).eval()
    x = torch.randn(4, WIDE)
    batches = [torch.randn(16, WIDE) for _ in range(4)]
    fast = int8(model, x, batches, target, dynamic_shapes=({0: Dim("batch", min=1, max=16)},))
    assert facts(fast).precisions["int8"] == 2
    for rows in (1, 3, 7):
        x = torch.randn(rows, WIDE)
        assert relative_error(fast(x), model(x)) < 0.05


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, WIDE, 4, 4), nn.Linear(WIDE, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(x)).flatten(2).transpose(1, 2))


def test_convolutions_run_quantised_or_are_listed() -> None:
    torch.manual_seed(0)
    model, x = Convolved().eval(), torch.randn(2, 3, 16, 16)
    on_ort, on_inductor = (int8(model, x, [x], target) for target in ("onnxruntime", "inductor"))
    assert "convolutions run in float32, with rounded weights: conv2d" in facts(on_ort).notes
    assert facts(on_ort).precisions["int8"] == 1
    assert facts(on_inductor).precisions["int8"] == 2
    assert relative_error(on_ort(x), model(x)) < 0.02
    assert relative_error(on_inductor(x), model(x)) < 0.02


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(WIDE, WIDE), nn.ReLU(), nn.Linear(WIDE, 8)).eval(), torch.randn(4, WIDE)
    fast = int8(model, x, [x], "onnxruntime")
    fast.save(tmp_path / "two.accel")
    again = accelkit.load(tmp_path / "two.accel", cache=False)
    assert again.report().variants[0].pieces[0].origin == "artifact"
    assert torch.equal(again(x), fast(x))


def test_openvino_takes_the_same_graph() -> None:
    pytest.importorskip("openvino")
    model, batches = models.bert(layers=1)
    seen = accelkit.quantization.Calibration.collect(model, batches, progress=False)
    fast, emulated = (int8(model, batches[0], seen, target) for target in ("openvino", "eager"))
    assert facts(fast).precisions["int8"] >= 5
    assert relative_error(fast(*batches[1])[0], emulated(*batches[1])[0]) < 0.02
