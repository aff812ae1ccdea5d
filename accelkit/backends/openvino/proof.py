"""Which precision each layer of a compiled model really got, and an error where that is not what the graph says.

    CompiledModel --get_runtime_model--> layers: kind, precision, the operators that it was made of --prove--> Layers

OpenVINO decides the precision of a layer when it compiles: from the types in the graph, the inference precision hint, and
what the CPU has. It says nothing when it computes bfloat16 in float32, or leaves a quantised product in float32; the
runtime model tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.errors import LoweringError

aten = torch.ops.aten
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64", "u8": "int8", "i8": "int8"}
"""OpenVINO's words for the types that products run in, in accelkit's."""
_PRODUCTS = frozenset({"FullyConnected", "MatMul", "Convolution", "Deconvolution", "RNNCell", "RNNSeq"})
_NO_ARITHMETIC = frozenset({
    "Const", "Input", "Output", "Reorder", "Reshape", "Split", "Transpose", "Concatenation", "StridedSlice", "Gather",
    "Broadcast", "Tile", "ShapeOf", "Convert", "Pad", "SpaceToDepth", "DepthToSpace", "FakeQuantize",
})  # fmt: skip
_GRAPH_PRODUCTS = frozenset({
    "linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "conv1d", "conv2d", "conv3d", "convolution",
    "linear_activation", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
})  # fmt: skip


class Layer(NamedTuple):
    """One layer of the runtime model: OpenVINO's name of its kind, accelkit's of its precision, and its place."""

    kind: str
    precision: str
    made_of: str

    @property
    def product(self) -> bool:
        return _is_product(self.kind, self.precision, self.made_of)


def layers(compiled: Any) -> list[Layer]:
    """The layers that compute."""
    found = []
    for operator in compiled.get_runtime_model().get_ops():
        info = operator.get_rt_info()
        kind, type_name, made_of = (
            str(info[key].value) if key in info else ""
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        precision = PRECISIONS.get(type_name)
        if kind in _NO_ARITHMETIC or precision is None:
            continue
        if precision == "int8" and not _is_product(kind, precision, made_of):  # masks and comparisons are bytes too
            continue
        found.append(Layer(kind, precision, made_of))
    return found


def prove(found: Sequence[Layer], graph: fx.GraphModule, low: str | None = None) -> tuple[str, ...]:
    """Notes for the report on what did not get the precision that the graph says.

    Args:
        found: the layers.
        graph: the graph that they were compiled from; its products' dtypes, and the dequantize nodes before them, are what was
            asked for.
        low: a precision that float32 products may have besides, because the user said so.

    Raises:
        LoweringError: bfloat16 products that run in float32; float32 ones that run in less; quantised ones of which none
            runs in int8.
    """
    wanted = wanted_products(graph)
    got = Counter(layer.precision for layer in found if layer.product)
    if got["fp32"] and not wanted["fp32"] and wanted["bf16"]:
        names = ", ".join(layer.made_of or layer.kind for layer in found if layer.product and layer.precision == "fp32")
        raise LoweringError(
            f"OpenVINO runs {got['fp32']} of {sum(got.values())} products in float32 where the graph says bfloat16 "
            f"({names[:300]}); a CPU with AVX-512 BF16 or AMX has bfloat16, target 'inductor' emulates it"
        )
    if wanted["fp32"] and not wanted["bf16"] and got["bf16"] and low != "bf16":
        raise LoweringError(f"OpenVINO runs {got['bf16']} products in bfloat16 where the graph says float32")
    if not wanted["int8"]:
        return ()
    if not got["int8"]:
        raise LoweringError(
            f"OpenVINO runs none of the graph's {wanted['int8']} quantised products in int8; it takes symmetric int8 weights, "
            "per tensor or per output channel, and activations quantised per tensor (PyTorch's quantized_decomposed nodes)"
        )
    return (
        f"{got['int8']} layers of products run in int8 (attention's two are one); the graph quantises {wanted['int8']} products",
    )


def wanted_products(graph: fx.GraphModule) -> Counter[str]:
    """Precision -> number of products that the graph says run in it."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    found: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if not is_product(node):
            continue
        factors = [i for i in node.all_input_nodes if isinstance(graphs.val(i), torch.Tensor)][:2]
        if len(factors) == 2 and all(map(_dequantised, factors)):
            found["int8"] += 1
        elif (name := names.get(graphs.val(node).dtype)) is not None:
            found[name] += 1
    return found


def is_product(node: fx.Node) -> bool:
    """Whether the node is one of the products that OpenVINO has layers of their own for."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _GRAPH_PRODUCTS


def _is_product(kind: str, precision: str, made_of: str) -> bool:
    """A layer of products, or a generated kernel ("Subgraph") with some in it, as attention is compiled into.

    Such a kernel's list of what it was made of may name neither product, and bytes are masks too: only attention's has
    a softmax.
    """
    whole = [name.lower() for name in made_of.split(",") if "/" not in name]  # "matmul/DequantizationMultiply" is none
    words = ("matmul", "softmax") if precision == "int8" else ("matmul",)
    return kind in _PRODUCTS or (kind == "Subgraph" and any(word in name for name in whole for word in words))


def _dequantised(node: fx.Node) -> bool:
    """Whether the value comes from a dequantize node, shape changes aside."""
    while node.op == "call_function" and len(node.all_input_nodes) >= 1:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return False
        if target.namespace == "quantized_decomposed":
            return target._opname.startswith("dequantize")
        if target._opname not in (
            "reshape",
            "view",
            "permute",
            "transpose",
            "t",
            "expand",
            "unsqueeze",
            "flatten",
            "slice",
        ):
            return False
        node = node.all_input_nodes[0]
    return False
