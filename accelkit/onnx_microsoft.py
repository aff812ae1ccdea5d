"""The fused operators in ONNX Runtime's own: `MICROSOFT`, by short name.

    attention               ->  MultiHeadAttention, the mask as an additive one of [., ., length, keys]
    residual_layer_norm     ->  SkipLayerNormalization, both results
    residual_rms_norm       ->  SkipSimplifiedLayerNormalization
    linear_activation       ->  MatMul, then BiasGelu, FastGelu, QuickGelu or Gelu
    embedding_layer_norm    ->  EmbedLayerNormalization, for two or three tables

Where its operator cannot (float64; a scale of 0, which it takes for "not given"; a causal triangle that is not square, which
it draws from the other corner), the standard form stands. MultiHeadAttention averages over all keys in a row that sees none,
where PyTorch gives zeros: such rows are put right afterwards. Its `key_padding_mask` is not used: on a GPU it leads to the
kernels that write the scores to memory, and an additive mask does not. Operators: onnxruntime/docs/ContribOperators.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from accelkit import onnx_fused as standard
from accelkit.onnx_translations import Mask, operators, repeat_heads, visible, zeros_unless

_DTYPES = ("FLOAT", "FLOAT16", "BFLOAT16")


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
    op = operators()
    heads, widths = query.shape[2], (query.shape[3], value.shape[3])
    if (
        query.dtype.name not in _DTYPES
        or scale == 0.0
        or not all(isinstance(size, int) for size in (heads, key.shape[2], *widths))
    ):
        return standard.attention(query, key, value, mask, causal, scale, kind)
    square = query.shape[1] == key.shape[1]
    seen = standard.attention_mask(query, key, mask, causal)
    bias = None if seen is None else _full(seen.additive(), mask, query, key)
    if seen is None and causal and not square:
        bias = _full(Mask(visible(query, 1, key, 1), True, query.dtype).additive(), None, query, key)
    flat = [op.Reshape(query, [0, 0, heads * widths[0]])]
    flat += [
        op.Reshape(repeat_heads(query, t, 2), [0, 0, heads * w]) for t, w in zip((key, value), widths, strict=True)
    ]
    attended = microsoft(
        "MultiHeadAttention", *flat, None, None, bias, num_heads=heads, scale=scale,
        unidirectional=int(causal and bias is None) or None,
    )  # fmt: skip
    result = op.Reshape(attended, [0, 0, heads, widths[1]])
    if seen is None:
        return result
    missing = 4 - max(len(mask.shape), 2 if causal else 0)
    attends = op.Unsqueeze(seen.attends(), list(range(missing))) if missing else seen.attends()
    return zeros_unless(op.Transpose(attends, perm=[0, 2, 1, 3]), result, query.dtype)


def _full(bias: Any, mask: Any, query: Any, key: Any) -> Any:
    """The additive mask as [1 or batch, 1 or heads, length, keys]: the operator broadcasts the first two dimensions only."""
    op = operators()
    if mask is not None and len(mask.shape) == 4 and mask.shape[2] == query.shape[1] and mask.shape[3] == key.shape[1]:
        return bias
    shape = op.Concat(
        op.Constant(value_ints=[1, 1]), op.Shape(query, start=1, end=2), op.Shape(key, start=1, end=2), axis=0
    )
    return op.Expand(bias, shape)


def linear_activation(
    x: Any,
    weight: Any,
    bias: Any,
    activation: str = "none",
    residual: Any = None,
    rows: Any = None,
) -> Any:
    """activation(x W^T + bias) + residual"""
    if activation not in ("gelu", "gelu_tanh", "silu") or x.dtype.name not in _DTYPES:
        return standard.linear_activation(x, weight, bias, activation, residual, rows)
    if activation == "silu":
        y = microsoft("QuickGelu", standard.linear(x, weight, bias), alpha=1.0)
    else:
        product = operators().MatMul(x, operators().Transpose(weight, perm=[1, 0]))
        name = "FastGelu" if activation == "gelu_tanh" else "Gelu" if bias is None else "BiasGelu"
        y = microsoft(name, product, *(() if bias is None else (bias,)))
    return standard.plus(y, x.dtype, residual)


def residual_layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float = 1e-5, rows: Any = None
) -> tuple[Any, Any]:
    """(normalised, sum)"""
    if not _takes(x, residual, weight, bias):
        return standard.residual_layer_norm(x, residual, weight, bias, eps, rows)
    scale = standard.ones_like_last(x, x.dtype) if weight is None else weight
    normalised, _, _, total = microsoft("SkipLayerNormalization", x, residual, scale, bias, results=4, epsilon=eps)
    return normalised, total


def residual_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6, rows: Any = None) -> tuple[Any, Any]:
    """(normalised, sum)"""
    if not _takes(x, residual, weight):
        return standard.residual_rms_norm(x, residual, weight, eps, rows)
    scale = standard.ones_like_last(x, x.dtype) if weight is None else weight
    normalised, _, _, total = microsoft(
        "SkipSimplifiedLayerNormalization", x, residual, scale, results=4, epsilon=eps
    )  # fmt: skip
    return normalised, total


def _takes(x: Any, *others: Any) -> bool:
    """The skip operators take [batch, length, width] or [rows, width], all of one dtype."""
    return (
        len(x.shape) in (2, 3)
        and x.dtype.name in _DTYPES
        and all(t is None or t.dtype == x.dtype for t in others)
        and list(others[0].shape) == list(x.shape)
    )


def embedding_layer_norm(
    indices: Sequence[Any], tables: Sequence[Any], weight: Any, bias: Any, eps: float = 1e-5
) -> Any:
    """layer_norm(table_0[indices_0] + table_1[indices_1] + ...)"""
    words = indices[0]
    fits = (
        len(tables) in (2, 3)
        and weight is not None
        and bias is not None
        and tables[0].dtype.name in ("FLOAT", "FLOAT16")
        and all(t.dtype == tables[0].dtype for t in (*tables, weight, bias))
        and len(words.shape) == 2
        and all(_fits(index, words, alone=place == 1) for place, index in enumerate(indices))
    )
    if not fits:
        return standard.embedding_layer_norm(indices, tables, weight, bias, eps)
    ids, positions, *types = (_int32(index) for index in indices)
    embedded = microsoft(
        "EmbedLayerNormalization", ids, *(types or [None]), tables[0], tables[1], *(tables[2:] or [None]), weight, bias,
        None, positions, results=2, epsilon=eps,
    )  # fmt: skip
    return embedded[0]


def _fits(index: Any, words: Any, alone: bool) -> bool:
    # positions may be one row for all of the batch; words and types have to be given for each
    shape, full = list(index.shape), list(words.shape)
    return shape == full or (alone and shape in ([1, full[1]], [full[1]]))


def _int32(index: Any) -> Any:
    import onnx_ir as ir

    row = operators().Reshape(index, [1, -1]) if len(index.shape) == 1 else index
    return standard.cast(row, index.dtype, ir.DataType.INT32)


# --- operators without a schema in the onnx package


def microsoft(name: str, *inputs: Any, results: int = 1, **attributes: Any) -> Any:
    """A call of `com.microsoft.<name>`; inputs may be None, attributes that are None are left out."""
    given = {key: value for key, value in attributes.items() if value is not None}
    kinds = tuple((key, type(value).__name__) for key, value in given.items())
    return _operator(name, len(inputs), results, kinds)(*inputs, **given)


@functools.cache
def _operator(name: str, inputs: int, results: int, attributes: tuple[tuple[str, str], ...]) -> Any:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
    types = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "int32")]
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=[
            OpSchema.FormalParameter(f"input_{i}", f"T{i}", param_option=OpSchema.FormalParameterOption.Optional)
            for i in range(inputs)
        ],
        outputs=[OpSchema.FormalParameter(f"output_{i}", "T0") for i in range(results)],
        type_constraints=[(f"T{i}", types, "") for i in range(max(inputs, 1))],
        attributes=[OpSchema.Attribute(key, kinds[kind], required=False) for key, kind in attributes],
    )
    return Op(Opset("com.microsoft", 1), name, schema)


MICROSOFT: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "embedding_layer_norm": embedding_layer_norm,
    "linear_activation": linear_activation,
    "residual_layer_norm": residual_layer_norm,
    "residual_rms_norm": residual_rms_norm,
}
"""By the operator's short name."""
