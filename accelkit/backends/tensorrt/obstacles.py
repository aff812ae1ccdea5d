"""What TensorRT cannot run, operator by operator, known before anything is built: `obstacle(node, version)`.

What is not listed here and the parser refuses all the same comes back from the build by name (see backend.py).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from accelkit import graph as graphs
from accelkit.backends.tensorrt.library import BFLOAT16_SINCE

DEVICE = "cuda"
MAX_DIMENSIONS = 8
"""TensorRT's `Dims` holds no more."""
_NAMESPACES = ("aten", "prims", "quantized_decomposed", "accelkit")
_COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "mv", "dot", "einsum", "conv1d", "conv2d", "conv3d", "convolution",
        "_convolution", "_int_mm",
    )
)  # fmt: skip
_NO_FLOAT64 = "TensorRT computes nothing in float64; a model in float32, fp16 or bf16 runs whole"
_INT32 = torch.iinfo(torch.int32)


def obstacle(node: fx.Node, version: tuple[int, int] | None) -> str | None:
    """Why the node must stay in PyTorch, or None.

    Args:
        node: of an accelkit graph.
        version: TensorRT's major and minor; None where it is not known: then nothing is said about what only some have.
    """
    if node.op != "call_function":
        return f"{node.op} nodes are not tensor operators"
    if node.target is operator.getitem:
        return obstacle(node.all_input_nodes[0], version)
    if graphs.is_size(node):
        return None
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "control flow stays in PyTorch"
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _NAMESPACES:
        return "no ONNX form is known"
    if graphs.is_mutating(node):
        return "writes into its argument; a TensorRT network has values only"
    if graphs.is_random(node):
        return "random: TensorRT would draw other numbers than PyTorch"
    values = [value for value, _ in _tensors(node)]
    if target._schema.name in _PRODUCTS and not any(v.is_floating_point() or v.is_complex() for v in values):
        return "a matrix product of integers; TensorRT multiplies floating-point matrices only"
    for value, constant in _tensors(node):
        # a Python number that became a constant is in the CPU's memory, and in the network like any other
        if value.device.type != DEVICE and not (constant and value.dim() == 0):
            return f"computes on {value.device.type}; TensorRT works in a GPU's memory"
        if (why := _value_obstacle(value, version)) is not None:
            return why
    return None


def beyond_int32(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> dict[str, str]:
    """The operators that read an int64 input or constant with values that int32 does not have, and why that is one too many.

    Of inputs only the example is known: what a later call brings beyond int32 wraps.
    """
    given = [*zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True), *graphs.tensor_attributes(graph)]
    found: dict[str, str] = {}
    for node, tensor in given:
        if not _too_large_for_int32(tensor):
            continue
        why = f"{node.target} holds integers beyond int32, from {tensor.min().item()} to {tensor.max().item()}"
        found.update(dict.fromkeys([user.name for user in node.users if user.op != "output"], why))
    return found


def _too_large_for_int32(tensor: torch.Tensor) -> bool:
    if tensor.dtype is not torch.int64 or tensor.numel() == 0:
        return False
    return bool(tensor.max() > _INT32.max) or bool(tensor.min() < _INT32.min)


def _value_obstacle(value: torch.Tensor, version: tuple[int, int] | None) -> str | None:
    if value.dtype is torch.float64:
        return _NO_FLOAT64
    if value.is_complex():
        return "TensorRT has no complex numbers"
    if value.dtype is torch.bfloat16 and version is not None and version < BFLOAT16_SINCE:
        return f"TensorRT {version[0]}.{version[1]} has no bfloat16; {BFLOAT16_SINCE[0]} and later have"
    if value.dtype not in _COMPUTED:
        return f"TensorRT computes nothing in {str(value.dtype).removeprefix('torch.')}"
    if value.is_sparse or value.layout != torch.strided:
        return f"{value.layout} tensors are not supported"
    if value.dim() > MAX_DIMENSIONS:
        return f"{value.dim()} dimensions; TensorRT has {MAX_DIMENSIONS} at most"
    if any(isinstance(size, int) and size == 0 for size in value.shape):
        return "a tensor without elements"
    if free_unbacked_symbols(value):
        return "its size depends on the data; an engine is built for a range of known sizes"
    return None


def _tensors(node: fx.Node) -> Iterator[tuple[torch.Tensor, bool]]:
    """Results and arguments, each with whether it is a constant."""
    for one in (node, *node.all_input_nodes):
        value = graphs.val(one)
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, torch.Tensor):
                yield item, one.op == "get_attr"
