"""ONNX forms of operators where the exporter's own are wrong or slower: `translations(dialect)`, by operator overload.

    scaled_dot_product_attention -> MatMul, Softmax, MatMul, and zeros for a row that sees nothing
    quantized_decomposed.* -> QuantizeLinear, DequantizeLinear: see accelkit.onnx_quantized
    accelkit.* (fused operators) -> ONNX operators, or ONNX Runtime's own: see accelkit.onnx_fused, accelkit.onnx_microsoft

The exporter (onnxscript's torchlib) replaces a false mask entry by the smallest number instead of minus infinity: a
row that is masked as a whole then averages all values, where PyTorch gives zeros; and its NaN guard turns a real NaN
into zero. It also passes twice over the scores, which are [batch, heads, length, length]; the form here keeps the
guard on the mask and the result.

Each function has the operator's own parameters; tensors are onnxscript's symbolic values with `shape` and `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten

Translations = Mapping[Callable[..., Any], Callable[..., Any]]

DIALECTS = ("standard", "com.microsoft")
"""`standard`: ONNX operators only. `com.microsoft`: ONNX Runtime's own where they say more."""


def translations(dialect: str = "standard") -> Translations:
    """ONNX forms by operator overload, as `torch.onnx.export(custom_translation_table=...)` takes them."""
    from accelkit.onnx_fused import STANDARD
    from accelkit.onnx_microsoft import MICROSOFT
    from accelkit.onnx_quantized import QUANTIZED

    table = MICROSOFT if dialect == "com.microsoft" else STANDARD
    overloads: dict[Callable[..., Any], Callable[..., Any]] = {
        getattr(torch.ops.accelkit, name).default: form for name, form in table.items()
    }
    return {aten.scaled_dot_product_attention.default: scaled_dot_product_attention} | QUANTIZED | overloads


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
    op = operators()
    if dropout_p != 0:
        raise NotImplementedError("attention with dropout on is random")
    rank = len(key.shape)  # values computed here have no shape yet
    if enable_gqa:
        key, value = repeat_heads(query, key, -3), repeat_heads(query, value, -3)
    # PyTorch scales both factors by the root, so that half precision does not overflow in the product.
    if scale is None:
        width = query.shape[-1]
        if not isinstance(width, int):
            raise NotImplementedError("attention over heads of a dynamic width")
        scale = 1.0 / math.sqrt(width)
    if scale < 0:
        raise NotImplementedError("attention with a negative scale")
    root = number(math.sqrt(scale), query.dtype)
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, root), op.Mul(op.Transpose(key, perm=order), root))
    if is_causal:
        scores = op.Where(visible(query, -2, key, -2), scores, number(-math.inf, query.dtype))
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    mask = as_mask(attn_mask, query.dtype)
    scores = op.Add(scores, mask.additive())
    return zeros_unless(mask.attends(), op.MatMul(op.Softmax(scores, axis=-1), value), query.dtype)


# --- pieces that the forms of attention share


def operators() -> Any:
    """The standard operators; they take symbolic values and lists where their annotations say arrays."""
    from onnxscript import opset18

    return opset18


def number(value: float, dtype: Any) -> Any:
    """A constant of an ONNX data type."""
    import numpy as np
    import onnx_ir as ir

    if dtype.name == "DOUBLE":  # from a Python number, onnx_ir goes by way of float32
        return operators().Constant(value=ir.tensor(np.array(value, np.float64)))
    return operators().Constant(value=ir.tensor(value, dtype=dtype))


def visible(query: Any, query_dim: int, key: Any, key_dim: int) -> Any:
    """[L, S], lower triangle from the top left: whether a query sees a key under causal attention. Every query sees the
    first key."""
    op = operators()
    rows = op.Unsqueeze(_positions(query, query_dim), [1])
    return op.GreaterOrEqual(rows, _positions(key, key_dim))


class Mask(NamedTuple):
    """A mask over [..., L, S], in the dtype of the scores: boolean (True: attend) or added to them."""

    value: Any
    boolean: bool
    dtype: Any

    def additive(self) -> Any:
        """As finite numbers that are added to the scores."""
        op, lowest = operators(), number(float(torch.finfo(TORCH_DTYPES[self.dtype.name]).min), self.dtype)
        if self.boolean:
            return op.Where(self.value, number(0.0, self.dtype), lowest)
        return op.Max(self.value, lowest)

    def attends(self) -> Any:
        """[..., L, 1]: whether a query sees any key at all."""
        import onnx_ir as ir

        op = operators()
        if self.boolean:
            any_seen = op.ReduceMax(op.Cast(self.value, to=ir.DataType.INT32), [-1], keepdims=1)
            return op.Cast(any_seen, to=ir.DataType.BOOL)
        return op.Greater(op.ReduceMax(self.value, [-1], keepdims=1), number(-math.inf, self.dtype))


def as_mask(value: Any, dtype: Any) -> Mask:
    """A model's mask for scores of this dtype."""
    if value.dtype.name == "BOOL":
        return Mask(value, True, dtype)
    return Mask(value if value.dtype == dtype else operators().Cast(value, to=dtype), False, dtype)


def zeros_unless(seen: Any, result: Any, dtype: Any) -> Any:
    """The result, and zeros in the rows of queries that see nothing."""
    return operators().Where(seen, result, number(0.0, dtype))


TORCH_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
}
"""By the names of ONNX's data types."""


def _positions(tensor: Any, dim: int) -> Any:
    """0, 1, ... along a dimension."""
    op, dim = operators(), dim % len(tensor.shape)
    length = op.Squeeze(op.Shape(tensor, start=dim, end=dim + 1), [0])
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Range(zero, length, one)


def repeat_heads(query: Any, tensor: Any, dim: int) -> Any:
    """Grouped heads along `dim`, few -> many: each of the few serves neighbouring heads of the query."""
    op = operators()
    many, few = query.shape[dim], tensor.shape[dim]
    if not isinstance(many, int) or not isinstance(few, int):
        raise NotImplementedError("grouped attention over a dynamic number of heads")
    if many == few:
        return tensor
    rank = len(tensor.shape)
    dim %= rank
    repeats = [1] * (rank + 1)
    repeats[dim + 1] = many // few
    tiled = op.Tile(op.Unsqueeze(tensor, [dim + 1]), op.Constant(value_ints=repeats))
    parts = [op.Shape(tensor, end=dim)] if dim else []
    parts += [op.Constant(value_ints=[many])]
    parts += [op.Shape(tensor, start=dim + 1)] if dim + 1 < rank else []
    return op.Reshape(tiled, op.Concat(*parts, axis=0), allowzero=1)
