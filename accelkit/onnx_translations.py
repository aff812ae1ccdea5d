"""ONNX forms of operators where the exporter's own are wrong or slower: `TRANSLATIONS`, by operator overload.

    scaled_dot_product_attention -> MatMul, Softmax, MatMul, and zeros for a row that sees nothing

The exporter (onnxscript's torchlib) replaces a false mask entry by the smallest number instead of minus infinity: a
row that is masked as a whole then averages all values, where PyTorch gives zeros; and its NaN guard turns a real NaN
into zero. It also passes twice over the scores, which are [batch, heads, length, length]; the form here keeps the
guard on the mask and the result.

Each function has the operator's own parameters; tensors are onnxscript's symbolic values with `shape` and `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """query [..., L, E], key [..., S, E], value [..., S, V] -> [..., L, V]; numerics as torch's math backend's."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18  # the functions take symbolic values and lists where their annotations say arrays
    if dropout_p != 0:
        raise NotImplementedError("attention with dropout on is random")

    def constant(number: float) -> Any:
        return op.Constant(value=ir.tensor(number, dtype=query.dtype))

    rank = len(key.shape)  # values computed here have no shape yet
    if enable_gqa:
        key, value = _repeat_heads(op, query, key), _repeat_heads(op, query, value)
    # PyTorch scales both factors by the root, so that half precision does not overflow in the product.
    if scale is None:
        width = query.shape[-1]
        if not isinstance(width, int):
            raise NotImplementedError("attention over heads of a dynamic width")
        scale = 1.0 / math.sqrt(width)
    if scale < 0:
        raise NotImplementedError("attention with a negative scale")
    root = constant(math.sqrt(scale))
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, root), op.Mul(op.Transpose(key, perm=order), root))
    if is_causal:
        # square lower triangle from the top left: a row always sees its first column
        rows = op.Unsqueeze(_positions(op, query, len(query.shape)), [1])
        visible = op.GreaterOrEqual(rows, _positions(op, key, rank))
        return op.MatMul(op.Softmax(op.Where(visible, scores, constant(-math.inf)), axis=-1), value)
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    lowest = constant(float(torch.finfo(_TORCH[query.dtype.name]).min))
    if attn_mask.dtype == ir.DataType.BOOL:
        allowed = op.Cast(op.ReduceMax(op.Cast(attn_mask, to=ir.DataType.INT32), [-1], keepdims=1), to=ir.DataType.BOOL)
        scores = op.Add(scores, op.Where(attn_mask, constant(0.0), lowest))
    else:
        allowed = op.Greater(op.ReduceMax(attn_mask, [-1], keepdims=1), constant(-math.inf))
        scores = op.Add(scores, op.Max(attn_mask, lowest))
    return op.Where(allowed, op.MatMul(op.Softmax(scores, axis=-1), value), constant(0.0))


_TORCH = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
}


def _positions(op: Any, tensor: Any, rank: int) -> Any:
    """0, 1, ... along the last but one of `rank` dimensions."""
    length = op.Squeeze(op.Shape(tensor, start=rank - 2, end=rank - 1), [0])
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Range(zero, length, one)


def _repeat_heads(op: Any, query: Any, tensor: Any) -> Any:
    """Grouped heads, [..., few, S, E] -> [..., many, S, E]: each of the few serves neighbouring heads of the query."""
    many, few = query.shape[-3], tensor.shape[-3]
    if not isinstance(many, int) or not isinstance(few, int):
        raise NotImplementedError("grouped attention over a dynamic number of heads")
    if many == few:
        return tensor
    rank = len(tensor.shape)
    repeats = [1] * (rank + 1)
    repeats[-3] = many // few
    tiled = op.Tile(op.Unsqueeze(tensor, [rank - 2]), op.Constant(value_ints=repeats))
    outer, inner = op.Shape(tensor, end=rank - 3), op.Shape(tensor, start=rank - 2)
    return op.Reshape(tiled, op.Concat(outer, op.Constant(value_ints=[many]), inner, axis=0), allowzero=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: scaled_dot_product_attention
}
