"""Q/DQ around ONNX products become products of integers, with their bias; what ONNX Runtime has no fast kernel for is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import nn

from accelkit.onnx_export import export_onnx
from accelkit.onnx_integer_products import integer_products
from accelkit.testing import relative_error, run, trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
quantized = torch.ops.quantized_decomposed


class Layer(nn.Module):
    """A linear layer on rounded numbers."""

    def __init__(self, bias: str = "vector", unsigned: bool = True, per_channel: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bias_kind, self.per_channel = bias, per_channel
        self.grid = (0.02, 120, 0, 255, torch.uint8) if unsigned else (0.02, 0, -128, 127, torch.int8)
        self.register_buffer("weight", torch.randint(-127, 128, (6, 8), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(6) / 50 + 0.01)
        self.register_buffer("bias", torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *self.grid), *self.grid)
        if self.per_channel:
            weight = quantized.dequantize_per_channel(self.weight, self.scales, None, 0, -128, 127, torch.int8)
        else:
            weight = quantized.dequantize_per_tensor(self.weight, 0.013, 0, -128, 127, torch.int8)
        if self.bias_kind == "vector":
            return nn.functional.linear(x, weight, self.bias)
        y = nn.functional.linear(x, weight)
        return y if self.bias_kind == "none" else y + y.mean()


class Products(nn.Module):
    """Two activations, rounded, one transposed: attention's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = (0.02, 128, 0, 255, torch.uint8)
        x = quantized.dequantize_per_tensor(quantized.quantize_per_tensor(x, *grid), *grid)
        return torch.matmul(x, x.permute(0, 2, 1))


def operators(model: nn.Module, x: torch.Tensor) -> tuple[list[str], Any, Any]:
    """The operators afterwards, what was done, and the error of ONNX Runtime's result against PyTorch's."""
    import onnxruntime

    graph = trace(model, x)
    exported = export_onnx(graph, external_bytes=1 << 30)
    done = integer_products(exported)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exported.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    error = relative_error(torch.from_numpy(np.asarray(result)), run(graph, x)[0])
    return [node.op_type for node in exported.graph.node if node.op_type != "Constant"], done, error


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    ("shape", "bias", "expected"),
    [
        ((4, 8), "vector", ["QuantizeLinear", "Transpose", "MatMulIntegerToFloat"]),
        ((2, 4, 8), "vector", ["QuantizeLinear", "Transpose", "MatMulIntegerToFloat"]),
        ((2, 4, 8), "none", ["QuantizeLinear", "Transpose", "MatMulIntegerToFloat"]),
        (
            (2, 4, 8),
            "computed",
            ["QuantizeLinear", "Transpose", "MatMulIntegerToFloat", "ReduceMean", "Squeeze", "Add"],
        ),
    ],
)
def test_linear_layers(shape: tuple[int, ...], bias: str, per_channel: bool, expected: list[str]) -> None:
    found, done, error = operators(Layer(bias, per_channel=per_channel), torch.randn(shape))
    assert found == expected
    assert (done.integer, done.left) == (1, [])
    assert error < 1e-5


def test_attentions_products_are_transposed_as_integers() -> None:
    found, done, error = operators(Products(), torch.randn(2, 4, 8))
    assert found == ["QuantizeLinear", "Transpose", "MatMulIntegerToFloat"]
    assert done.integer == 1
    assert error < 1e-5


def test_signed_activations_are_left() -> None:
    found, done, error = operators(Layer(unsigned=False), torch.randn(4, 8))
    assert "MatMulIntegerToFloat" not in found
    assert (done.integer, len(done.left)) == (0, 1)
    assert error < 1e-5


def test_a_model_without_rounding_stays_as_it_is() -> None:
    exported = export_onnx(trace(nn.Linear(8, 4), torch.randn(2, 8)))
    before = exported.SerializeToString()
    assert integer_products(exported).integer == 0
    assert exported.SerializeToString() == before
