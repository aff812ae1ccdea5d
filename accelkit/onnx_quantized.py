"""ONNX forms of `quantized_decomposed` operators: `QUANTIZED`, by operator overload.

    quantize_per_tensor(x, scale, zero point)        ->  QuantizeLinear
    dequantize_per_tensor, dequantize_per_channel    ->  DequantizeLinear
    choose_qparams(x)                                ->  DynamicQuantizeLinear's scale and zero point

The exporter has forms for the first two, with scales as they come: those that are chosen at run time are float64 and int64
in PyTorch, float32 and uint8 in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed

from accelkit.onnx_translations import operators

quantized = torch.ops.quantized_decomposed


def quantize_per_tensor(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any) -> Any:
    """round(input / scale) + zero_point, saturated to int8 or uint8."""
    return operators().QuantizeLinear(input, _float(scale), _zero_point(zero_point, quant_min))


def dequantize_per_tensor(
    input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any, *, out_dtype: Any = None
) -> Any:
    """(input - zero_point) * scale"""
    return operators().DequantizeLinear(input, _float(scale), _zero_point(zero_point, quant_min))


def dequantize_per_channel(
    input: Any,
    scales: Any,
    zero_points: Any,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: Any,
    *,
    out_dtype: Any = None,
) -> Any:
    """input * scales, along `axis`; without zero points where the graph has none."""
    import onnx_ir as ir

    op = operators()
    if zero_points is None:
        return op.DequantizeLinear(input, scales, axis=axis)
    kind = ir.DataType.INT8 if quant_min < 0 else ir.DataType.UINT8
    return op.DequantizeLinear(input, scales, op.Cast(zero_points, to=kind), axis=axis)


def choose_qparams(input: Any, quant_min: int, quant_max: int, eps: float, dtype: Any) -> tuple[Any, Any]:
    """(scale, zero point) of the tensor's own range, as PyTorch types them: float64 [1] and int64 [1]."""
    import onnx_ir as ir

    if (quant_min, quant_max) != (0, 255):
        raise NotImplementedError("ranges at run time are of uint8 in ONNX")
    op = operators()
    _, scale, zero = op.DynamicQuantizeLinear(input)
    one = op.Constant(value_ints=[1])
    return (
        op.Reshape(op.Cast(scale, to=ir.DataType.DOUBLE), one),
        op.Reshape(op.Cast(zero, to=ir.DataType.INT64), one),
    )


def quantize_at_run_time(input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: Any) -> Any:
    """`quantize_per_tensor` with a scale and zero point that were computed."""
    return operators().QuantizeLinear(input, *_computed(scale, zero_point, quant_min))


def dequantize_at_run_time(
    input: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: Any, *, out_dtype: Any = None
) -> Any:
    """`dequantize_per_tensor` with a scale and zero point that were computed."""
    return operators().DequantizeLinear(input, *_computed(scale, zero_point, quant_min))


def _computed(scale: Any, zero_point: Any, quant_min: int) -> tuple[Any, Any]:
    import onnx_ir as ir

    op, scalar = operators(), operators().Constant(value=ir.tensor([], dtype=ir.DataType.INT64))
    kind = ir.DataType.INT8 if quant_min < 0 else ir.DataType.UINT8
    return (
        op.Reshape(op.Cast(scale, to=ir.DataType.FLOAT), scalar),
        op.Reshape(op.Cast(zero_point, to=kind), scalar),
    )


def _float(value: float) -> Any:
    import onnx_ir as ir

    return operators().Constant(value=ir.tensor(value, dtype=ir.DataType.FLOAT))


def _zero_point(value: int, quant_min: int) -> Any:
    import onnx_ir as ir

    kind = ir.DataType.INT8 if quant_min < 0 else ir.DataType.UINT8
    return operators().Constant(value=ir.tensor(value, dtype=kind))


QUANTIZED: dict[Callable[..., Any], Callable[..., Any]] = {
    quantized.quantize_per_tensor.default: quantize_per_tensor,
    quantized.dequantize_per_tensor.default: dequantize_per_tensor,
    quantized.dequantize_per_channel.default: dequantize_per_channel,
    quantized.choose_qparams.tensor: choose_qparams,
    quantized.quantize_per_tensor.tensor: quantize_at_run_time,
    quantized.dequantize_per_tensor.tensor: dequantize_at_run_time,
}
"""By operator overload."""
