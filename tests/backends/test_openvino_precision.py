"""OpenVINO's precisions: what the graph says is what runs, read back from the compiled model; int8 from Q/DQ nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers its operators
import torch.nn.functional as F
from torch import nn

import accelkit
from accelkit.backend_api import CompileContext
from accelkit.backends.openvino import OpenVINO
from accelkit.backends.openvino.proof import Layer, prove
from accelkit.errors import BackendUnavailableError, LoweringError
from accelkit.precision import BF16
from accelkit.testing import trace

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

quantized = torch.ops.quantized_decomposed
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")


def relative(result: torch.Tensor, wanted: torch.Tensor) -> float:
    result, wanted = result.detach(), wanted.detach()
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


def engine_of(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Any:
    return OpenVINO(**options).compile(trace(model, *inputs), inputs, CompileContext())


# --- bf16


@needs_bf16
def test_bf16_runs_in_bf16_and_what_is_kept_in_float32() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    x = torch.randn(8, 64)
    fast = accelkit.optimize(model, x, target="openvino", precision="bf16", cache=False, progress=False)
    result = fast(x)
    assert result.dtype == torch.float32
    assert 1e-4 < relative(result, model.double()(x.double())) < 2e-2
    model.float()
    assert " in bf16" in str(fast.report())
    graph = trace(nn.Linear(64, 32).bfloat16(), torch.randn(8, 64).bfloat16())
    assert OpenVINO().compile(graph, [torch.randn(8, 64).bfloat16()], CompileContext()).describe().precisions == {
        "bf16": 1
    }


@needs_bf16
def test_float32_products_beside_bf16_ones_stay_in_float32() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.wide = nn.Linear(64, 64).bfloat16(), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(self.low(x.bfloat16()).float())  # type: ignore[no-any-return]

    facts = engine_of(Both(), torch.randn(8, 64)).describe()
    assert facts.precisions["bf16"] == 1
    assert facts.precisions["fp32"] >= 1


@needs_bf16
def test_float32_graphs_run_in_bf16_only_where_asked() -> None:
    model, x = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)), torch.randn(8, 64)
    assert set(engine_of(model, x).describe().precisions) == {"fp32"}
    assert engine_of(model, x, inference_precision="bf16").describe().precisions["bf16"] == 2


@pytest.mark.parametrize("how", ["precision", "option"])
def test_a_cpu_without_bf16_is_an_error(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        available_devices = ("CPU",)

        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr("accelkit.backends.openvino.backend.core", Core)
    backend = OpenVINO(inference_precision="bf16") if how == "option" else OpenVINO()
    context = CompileContext(BF16) if how == "precision" else CompileContext()
    with pytest.raises(BackendUnavailableError, match=r"no bf16 on this CPU \(it has FP32, INT8\)"):
        backend.compile(trace(nn.Linear(8, 8), torch.randn(2, 8)), [torch.randn(2, 8)], context)


@pytest.mark.parametrize(
    ("dtype", "got", "reason"),
    [
        (torch.bfloat16, "fp32", r"runs 1 of 1 products in float32 where the graph says bfloat16 \(node_linear\)"),
        (torch.float32, "bf16", "runs 1 products in bfloat16 where the graph says float32"),
    ],
)
def test_a_precision_that_was_not_got_is_an_error(dtype: torch.dtype, got: str, reason: str) -> None:
    graph = trace(nn.Linear(8, 8).to(dtype), torch.randn(2, 8, dtype=dtype))
    with pytest.raises(LoweringError, match=reason):
        prove([Layer("FullyConnected", got, "node_linear"), Layer("MVN", "fp32", "norm")], graph)


# --- int8


def fake(x: torch.Tensor, scale: float, zero: int = 0, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    grid = (scale, zero, *((-128, 127) if dtype is torch.int8 else (0, 255)), dtype)
    return quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *grid), *grid)  # type: ignore[no-any-return]


class Quantised(nn.Module):
    """A weight with one scale an output channel (enough of them to stay outside the ONNX model)."""

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, *shape: int, folded: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / 8), nn.Parameter(torch.randn(shape[0]))
        self.register_buffer("scale", self.weight.detach().abs().flatten(1).amax(1) / 127)
        self.register_buffer("zero", torch.zeros(shape[0], dtype=torch.int64))
        if folded:
            grid = (self.scale, self.zero, 0, -128, 127, torch.int8)
            self.register_buffer("stored", quantized.quantize_per_channel(self.weight.detach(), *grid))
        self.folded = folded

    def forward(self) -> torch.Tensor:
        grid = (self.scale, self.zero, 0, -128, 127, torch.int8)
        stored = self.stored if self.folded else quantized.quantize_per_channel(self.weight, *grid)
        return quantized.dequantize_per_channel(stored, *grid)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, folded: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = Quantised(512, 64, folded=folded), Quantised(64, 512, folded=folded)
        self.grid = (0, torch.int8) if dtype is torch.int8 else (128, torch.uint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(F.linear(fake(x, 0.03, *self.grid), self.up(), self.up.bias))
        return F.linear(fake(x, 0.05, *self.grid), self.down(), self.down.bias)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = Quantised(512, 16, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(fake(x, 0.03), self.filters(), self.filters.bias, padding=1))


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = fake(x, 0.03) @ fake(x.flip(1), 0.03).transpose(-1, -2) * 0.125
        return fake(scores.softmax(-1), 1 / 127) @ fake(x * 2, 0.06)


@pytest.mark.parametrize("folded", [False, True], ids=["weights quantised in the graph", "int8 weights"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_linear_layers_run_in_int8(folded: bool, dtype: torch.dtype) -> None:
    model, x = Mlp(folded, dtype), torch.randn(2, 7, 64)
    engine = engine_of(model, x)
    assert engine.describe().precisions["int8"] == 2
    assert relative(engine(x)[0], model(x)) < 2e-3  # of some thousand values a few round to the neighbouring step
    assert "2 layers of products run in int8" in " ".join(engine.describe().notes)


def test_quantised_convolutions_run_in_int8() -> None:
    model, x = Convolution(), torch.randn(2, 16, 9, 9)
    engine = engine_of(model, x)
    assert engine.describe().precisions["int8"] == 1
    assert relative(engine(x)[0], model(x)) < 2e-3


def test_quantised_attention_runs_in_int8() -> None:
    model, x = Attention(), torch.randn(2, 4, 32, 64)
    engine = engine_of(model, x)
    assert engine.describe().precisions["int8"] == 1  # both products in one generated kernel
    assert relative(engine(x)[0], model(x)) < 2e-2  # scores beside a step of 1/127


def test_int8_models_on_disk_serve_other_weights() -> None:
    x = torch.randn(2, 7, 64)
    first, second = Mlp(False, torch.int8), Mlp(False, torch.int8)
    engine = engine_of(first, x)
    blobs = engine.serialize()
    assert len(blobs["model.onnx"]) < first.up.weight.numel()
    loaded = OpenVINO().load(blobs, trace(first, x), [x], CompileContext())
    assert torch.equal(loaded(x)[0], engine(x)[0])
    for own, other in ((second.up, first.up), (second.down, first.down)):
        if own.bias.nbytes < 1024:  # small tensors are part of the model
            own.bias, own.scale = other.bias, other.scale
    other_engine = OpenVINO().load(blobs, trace(second, x), [x], CompileContext())
    assert relative(other_engine(x)[0], second(x)) < 2e-3
    assert relative(other_engine(x)[0], first(x)) > 0.1


@pytest.mark.parametrize("scheme", ["qdq", "ft2"])
def test_calibrated_models_run_in_int8(scheme: str) -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    batches = [torch.randn(2, 16, 64) for _ in range(3)]
    fast = accelkit.optimize(
        model, batches[0], target="openvino", precision=accelkit.Int8(scheme=scheme), calibration=batches,
        cache=False, progress=False,
    )  # fmt: skip
    report = str(fast.report())
    assert " in int8" in report
    assert "layers of products run in int8" in report
    with torch.no_grad():
        assert relative(fast(batches[1]), model(batches[1])) < 0.1  # optimize() holds it to the emulation's own error


def test_int8_that_was_not_got_is_an_error() -> None:
    graph = trace(Mlp(False, torch.int8), torch.randn(2, 7, 64))
    found = [Layer("FullyConnected", "fp32", "a"), Layer("FullyConnected", "fp32", "b")]
    with pytest.raises(LoweringError, match=r"runs none of the graph's 2 quantised products in int8"):
        prove(found, graph)
    assert prove([found[0], Layer("FullyConnected", "int8", "b")], graph) == (
        "1 layers of products run in int8 (attention's two are one); the graph quantises 2 products",
    )
