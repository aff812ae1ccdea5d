"""What is rewritten in an ONNX model just before ONNX Runtime gets it, where its own optimiser does not see it.

    1. MatMul(x, Transpose(weight))                       ->  FusedMatMul(x, weight, transB=1)
    2. SkipLayerNormalization(Add(x, bias), y, ...)       ->  SkipLayerNormalization(x, y, ..., bias)
    3. SkipLayerNormalization -> a, mean, variance, b     ->  only the results that something reads

1: ONNX Runtime folds Transpose(weight) when it creates the session: a copy of every weight at once, which is then packed
(a second one). Its own fused operator packs the weight as it is. 2: it does so for those that it made itself, from Add and
LayerNormalization. 3: each one that is named is computed and written.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from accelkit.onnx_integer_products import integer_products
from accelkit.onnx_weights import all_nodes

if TYPE_CHECKING:
    import onnx

_SKIP = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""ONNX Runtime's residual norms, with the place of their bias input."""

CPU_TYPES = (1,)
"""FusedMatMul's kernels, in ONNX's numbers for types: float on a CPU; float, float16 and bfloat16 on a GPU."""
CUDA_TYPES = (1, 10, 16)


def for_onnxruntime(model: onnx.ModelProto, types: tuple[int, ...] = CPU_TYPES, integers: bool = False) -> None:
    """All of them, in place.

    Args:
        types: of the weights that FusedMatMul has kernels for.
        integers: whether products of quantised values become products of integers (accelkit.onnx_integer_products).
    """
    if integers:
        integer_products(model)
    fused = multiply_transposed(model, types) + add_bias_in_norm(model)
    drop_unread_results(model)
    if fused and all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.add(domain="com.microsoft", version=1)


def multiply_transposed(model: onnx.ModelProto, types: tuple[int, ...] = CPU_TYPES) -> int:
    """Case 1; returns how many."""
    weights = {i.name for i in model.graph.initializer if i.data_type in types and len(i.dims) == 2}
    transposed = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in weights
    }  # fmt: skip
    fused = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and not node.domain and node.input[1] in transposed:
            node.op_type, node.domain = "FusedMatMul", "com.microsoft"
            node.input[1] = transposed[node.input[1]].input[0]
            node.attribute.add(name="transB", type=2, i=1)  # AttributeProto.INT
            fused += 1
    _remove_unread(model, transposed)
    return fused


def add_bias_in_norm(model: onnx.ModelProto) -> int:
    """Case 2; returns how many."""
    vectors = {i.name: i.dims[0] for i in model.graph.initializer if len(i.dims) == 1}
    readers = _readers(model)
    biased = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Add" and not node.domain and sum(i in vectors for i in node.input) == 1
        and readers[node.output[0]] == 1
    }  # fmt: skip
    fused = 0
    for node in model.graph.node:
        place = _SKIP.get(node.op_type) if node.domain == "com.microsoft" else None
        if place is None or len(node.input) > place:
            continue
        found = next((n for n, name in enumerate(node.input[:2]) if name in biased), None)
        if found is None:
            continue
        add = biased[node.input[found]]
        values, bias = sorted(add.input, key=lambda name: name in vectors)
        if vectors[bias] != vectors.get(node.input[2]):  # a vector of one element, stretched over the width
            continue
        node.input[found] = values
        node.input.extend([""] * (place - len(node.input)) + [bias])
        fused += 1
    _remove_unread(model, biased)
    return fused


def drop_unread_results(model: onnx.ModelProto) -> None:
    """Case 3."""
    readers = _readers(model)
    for node in model.graph.node:
        if node.domain == "com.microsoft" and node.op_type in _SKIP:
            kept = [name if place == 0 or readers[name] else "" for place, name in enumerate(node.output)]
            while len(kept) > 1 and not kept[-1]:
                kept.pop()
            del node.output[:]
            node.output.extend(kept)


def _readers(model: onnx.ModelProto) -> Counter[str]:
    names = [name for node in all_nodes(model.graph) for name in node.input]
    return Counter([*names, *(o.name for o in model.graph.output)])


def _remove_unread(model: onnx.ModelProto, nodes: dict[str, onnx.NodeProto]) -> None:
    readers = _readers(model)
    for output, node in nodes.items():
        if not readers[output]:
            model.graph.node.remove(node)
