"""The fused operators in standard ONNX: `STANDARD`, by short name.

    attention               ->  Transpose, Mul, MatMul, (Add), Softmax, MatMul, Transpose
    residual_layer_norm     ->  Add, LayerNormalization
    residual_rms_norm       ->  Add, Pow, ReduceMean, Add, Sqrt, Div, Mul
    linear_activation       ->  Gemm or MatMul + Add, then Relu, x * Sigmoid(x), or GELU spelled with Erf or Tanh
    embedding_layer_norm    ->  Gather + Gather + ..., LayerNormalization

The spellings are those that TensorRT and ONNX Runtime look for: one scale, on the query's side; the softmax's result
straight into the second product; GELU as 0.5 x (1 + erf(x / sqrt 2)), for its own operator came with opset 20 only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelkit.onnx_translations import (
    TORCH_DTYPES,
    Mask,
    as_mask,
    number,
    operators,
    repeat_heads,
    visible,
    zeros_unless,
)


def attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Any:
    """[batch, length, heads, width] in and out."""
    seen = attention_mask(query, key, mask, causal)
    added = None if seen is None else seen.additive()
    result = attended(query, key, value, added, causal and seen is None, scale)
    if seen is not None:
        result = zeros_unless(seen.attends(), result, query.dtype)
    return operators().Transpose(result, perm=[0, 2, 1, 3])


def attended(query: Any, key: Any, value: Any, added: Any, causal: bool, scale: float | None) -> Any:
    """[batch, heads, length, width], of operands [batch, length, heads, width].

    Args:
        added: finite numbers of query's dtype that are added to the scores, or None.
        causal: query i attends to keys 0 to i.
    """
    op = operators()
    if scale is None:
        width = query.shape[3]
        if not isinstance(width, int):
            raise NotImplementedError("attention over heads of a dynamic width")
        scale = 1.0 / math.sqrt(width)
    rows = op.Mul(op.Transpose(query, perm=[0, 2, 1, 3]), number(scale, query.dtype))
    columns = op.Transpose(repeat_heads(query, key, 2), perm=[0, 2, 3, 1])
    values = op.Transpose(repeat_heads(query, value, 2), perm=[0, 2, 1, 3])
    scores = op.MatMul(rows, columns)
    if added is not None:
        scores = op.Add(scores, added)
    if causal:
        scores = op.Where(visible(query, 1, key, 1), scores, number(-math.inf, query.dtype))
    return op.MatMul(op.Softmax(scores, axis=-1), values)


def attention_mask(query: Any, key: Any, mask: Any, causal: bool) -> Mask | None:
    """The model's mask with the causal one in it; None where there is none but perhaps the causal one."""
    if mask is None:
        return None
    op, seen = operators(), as_mask(mask, query.dtype)
    if not causal:
        return seen
    earlier = visible(query, 1, key, 1)
    if seen.boolean:
        return seen._replace(value=op.And(seen.value, earlier))
    return seen._replace(value=op.Where(earlier, seen.value, number(-math.inf, query.dtype)))


def linear_activation(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str = "none",
    residual: Any = None,
    rows: Any = None,
) -> Any:
    """activation(x W^T + bias) + residual"""
    y = ACTIVATIONS[activation](linear(x, weight, bias), x.dtype)
    return plus(y, x.dtype, residual)


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """x W^T + bias"""
    op = operators()
    if len(x.shape) == 2:
        return op.Gemm(x, weight, bias, transB=1)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def plus(y: Any, dtype: Any, residual: Any) -> Any:
    """y, of this dtype, and the residual, where there is one, in the wider dtype of both."""
    if residual is None:
        return y
    wide = widest(dtype, residual.dtype)
    return operators().Add(cast(y, dtype, wide), cast(residual, residual.dtype, wide))


def _gelu(x: Any, dtype: Any) -> Any:
    op = operators()
    erf = op.Erf(op.Div(x, number(math.sqrt(2.0), dtype)))
    return op.Mul(op.Mul(x, op.Add(erf, number(1.0, dtype))), number(0.5, dtype))


def _gelu_tanh(x: Any, dtype: Any) -> Any:
    op = operators()
    cube = op.Mul(x, op.Mul(x, x))
    inner = op.Mul(op.Add(x, op.Mul(cube, number(0.044715, dtype))), number(math.sqrt(2.0 / math.pi), dtype))
    return op.Mul(op.Mul(x, op.Add(op.Tanh(inner), number(1.0, dtype))), number(0.5, dtype))


ACTIVATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda x, dtype: x,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x, dtype: operators().Relu(x),
    "silu": lambda x, dtype: operators().Mul(x, operators().Sigmoid(x)),
}
"""By the operator's names: (value, its dtype) -> value."""


def residual_layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float = 1e-5, rows: Any = None
) -> tuple[Any, Any]:
    """(normalised, sum)"""
    total, dtype = plus(x, x.dtype, residual), widest(x.dtype, residual.dtype)
    return layer_norm(total, dtype, weight, bias, eps), total


def layer_norm(x: Any, dtype: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Over the last dimension, in the widest dtype among x and the weights; the result has x's."""
    wide = widest(dtype, *(t.dtype for t in (weight, bias) if t is not None))
    scale = ones_like_last(x, wide) if weight is None else cast(weight, weight.dtype, wide)
    shift = None if bias is None else cast(bias, bias.dtype, wide)
    result, *_ = operators().LayerNormalization(cast(x, dtype, wide), scale, shift, axis=-1, epsilon=eps)
    return cast(result, wide, dtype)


def residual_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6, rows: Any = None) -> tuple[Any, Any]:
    """(normalised, sum); at least float32 inside."""
    import onnx_ir as ir

    op = operators()
    total, dtype = plus(x, x.dtype, residual), widest(x.dtype, residual.dtype)
    wide = widest(dtype, ir.DataType.FLOAT, *(t.dtype for t in (weight,) if t is not None))
    values = cast(total, dtype, wide)
    square = op.ReduceMean(op.Pow(values, number(2.0, wide)), [-1], keepdims=1)
    normalised = op.Div(values, op.Sqrt(op.Add(square, number(eps, wide))))
    if weight is not None:
        normalised = op.Mul(normalised, cast(weight, weight.dtype, wide))
    return cast(normalised, wide, dtype), total


def embedding_layer_norm(
    indices: Sequence[Any], tables: Sequence[Any], weight: Any, bias: Any, eps: float = 1e-5
) -> Any:
    """layer_norm(table_0[indices_0] + table_1[indices_1] + ...)"""
    op = operators()
    rows = [op.Gather(table, index) for index, table in zip(indices, tables, strict=True)]
    return layer_norm(functools.reduce(op.Add, rows), tables[0].dtype, weight, bias, eps)


# --- dtypes


def widest(*dtypes: Any) -> Any:
    """The ONNX data type that PyTorch promotes these to."""
    wide = functools.reduce(torch.promote_types, (TORCH_DTYPES[d.name] for d in dtypes))
    import onnx_ir as ir

    return ir.DataType[next(name for name, dtype in TORCH_DTYPES.items() if dtype is wide)]


def cast(value: Any, dtype: Any, wanted: Any) -> Any:
    return value if dtype == wanted else operators().Cast(value, to=wanted)


def ones_like_last(x: Any, dtype: Any) -> Any:
    """[width] of ones, for a norm without a weight."""
    op = operators()
    return op.Expand(number(1.0, dtype), op.Shape(x, start=-1))


STANDARD: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "embedding_layer_norm": embedding_layer_norm,
    "linear_activation": linear_activation,
    "residual_layer_norm": residual_layer_norm,
    "residual_rms_norm": residual_rms_norm,
}
"""By the operator's short name."""
