"""The linear products of an ONNX model, and the same model with some of them summed in float32.

    MatMul(x, w)  ->  Cast(MatMul(Cast(x, float32), Cast(w, float32)), float16)

This is how a strongly typed network asks for a float32 sum of float16 products: TensorRT runs the four as one kernel
(Torch-TensorRT's use_fp32_acc writes the same, pytorch/TensorRT pull request 3110). Where precision is a flag (8.6) the
products are held in float32 by name instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from accelkit.onnx_weights import all_nodes

if TYPE_CHECKING:
    import onnx

PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose"))
_FLOAT, _HALF = 1, 10  # TensorProto's


class Product(NamedTuple):
    """A product with a weight.

    Attributes:
        node: its ONNX node.
        terms: how many products one number of the result is the sum of. columns: numbers in a row of the result.
    """

    node: str
    terms: int
    columns: int


def linear_products(model: onnx.ModelProto) -> list[Product]:
    """The MatMul and Gemm of a half-precision weight, in order; the products of attention have none."""
    graph = model.graph
    sizes = {i.name: list(i.dims) for i in graph.initializer if i.data_type == _HALF and len(i.dims) == 2}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]][::-1]
    found = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm") and not node.domain and node.input[1] in sizes:
            terms, columns = sizes[node.input[1]]
            if any(a.name == "transB" and a.i for a in node.attribute):
                terms, columns = columns, terms
            found.append(Product(node.name, terms, columns))
    return found


def structure(model: onnx.ModelProto) -> str:
    """A hash of the operators, in order, and of the weights' sizes: the layers of a model that repeats one have it in common."""
    digest = hashlib.sha256()
    for node in model.graph.node:
        digest.update(node.op_type.encode() + b"".join(a.SerializeToString(deterministic=True) for a in node.attribute))
    digest.update(repr(sorted((i.data_type, *i.dims) for i in model.graph.initializer)).encode())
    for value in model.graph.input:
        digest.update(value.type.SerializeToString(deterministic=True))
    return digest.hexdigest()


def holds_products(model: onnx.ModelProto, nodes: tuple[str, ...]) -> bool:
    """Whether one of these nodes is a matrix product."""
    names = set(nodes)
    return any(node.op_type in PRODUCTS and node.name in names for node in all_nodes(model.graph))


def half_products(model: onnx.ModelProto, except_for: Collection[str]) -> tuple[str, ...]:
    """Names of all matrix products, attention's too, but for these."""
    found = (node.name for node in all_nodes(model.graph) if node.op_type in PRODUCTS and not node.domain)
    return tuple(name for name in found if name not in except_for)


def summed_in_float32(model: onnx.ModelProto, nodes: tuple[str, ...]) -> onnx.ModelProto:
    """A copy with casts around the products of these names."""
    from onnx import helper

    copied: onnx.ModelProto = type(model).FromString(model.SerializeToString())
    names, written = set(nodes), []
    for node in copied.graph.node:
        if node.name not in names:
            written.append(node)
            continue
        result = node.output[0]
        for place, name in enumerate(node.input):
            if name:
                wide = f"{node.name}_input_{place}"
                written.append(helper.make_node("Cast", [name], [wide], name=wide, to=_FLOAT))
                node.input[place] = wide
        node.output[0] = f"{node.name}_sum"
        written.append(node)
        written.append(helper.make_node("Cast", [node.output[0]], [result], name=f"{node.name}_half", to=_HALF))
    del copied.graph.node[:]
    copied.graph.node.extend(written)
    return copied
