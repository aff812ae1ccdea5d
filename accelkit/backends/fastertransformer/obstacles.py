"""Why a graph cannot be recorded in a CUDA graph, before it is tried.

A recording replays the same kernels on the same addresses: what draws random numbers, decides by values, waits for the
GPU, or writes to the caller's memory would be another program the second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from accelkit import graph as graphs
from accelkit.backends.fastertransformer.prepare import why_no_kernel
from accelkit.ops import operator_of

aten = torch.ops.aten

_WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = frozenset(f"aten::{n}" for n in ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"))
_SIZES = (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default)


class NotRecordable(Exception):
    """An operator that a CUDA graph cannot hold; the message says which and why."""


def why_not_recordable(graph: fx.GraphModule, device: torch.device) -> str | None:
    """The first obstacle in the graph, in words, or None. Pure."""
    if written := graphs.written_roots(graph.graph):
        return f"it writes to {', '.join(sorted(n.name for n in written))}"
    constants: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(i in constants for i in node.all_input_nodes)):
            constants.add(node)
        reason = _of_operator(node) or _of_device(node, device, node in constants)
        if reason is not None:
            return f"{node.name} ({node.target}) {reason}"
    return None


def _of_operator(node: fx.Node) -> str | None:
    if node.op in ("call_module", "call_method"):
        return "is a module's own code, which nothing is known of"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "is control flow, decided anew at each call"
    if graphs.is_random(node):
        return "draws random numbers"
    if graphs.is_size(node) and node.target not in _SIZES and _reads_tensors(node):
        return "computes a Python number from tensor data"
    if isinstance(node.target, torch._ops.OpOverload) and _waits(node.target, fx.node.map_arg(node.args, graphs.val)):
        return "makes the processor wait for values on the GPU"
    operator = operator_of(node)
    if operator is not None and operator.name == "variable_length_attention" and (why := why_no_kernel(node)):
        return f"runs its plain definition, which reads lengths on the processor ({why})"
    return None


def _reads_tensors(node: fx.Node) -> bool:
    return any(isinstance(graphs.val(i), Tensor) for i in node.all_input_nodes)


def _of_device(node: fx.Node, device: torch.device, constant: bool) -> str | None:
    value = graphs.val(node)
    for one in value if isinstance(value, (tuple, list)) else (value,):
        # a constant number in a tensor goes into the recording as a number
        if isinstance(one, Tensor) and one.device != device and not (constant and one.ndim == 0):
            return f"is on {one.device}, the rest on {device}"
    return None


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises NotRecordable for operators that wait for the GPU, which composite operators hide from the graph.

    A failed recording costs PyTorch more than this does: it is better not to begin.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            if _waits(func, args):
                raise NotRecordable(f"{func} makes the processor wait for values on the GPU")
            if _crosses(func, args, kwargs):
                raise NotRecordable(f"{func} copies between the processor and the GPU")
        return func(*args, **kwargs)


def _waits(target: torch._ops.OpOverload, args: Any) -> bool:
    if target._schema.name in _INDEXING:  # tagged in any case, but only a mask is counted first
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return any(tag in target.tags for tag in _WAITS)


def _crosses(func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> bool:
    if func is aten.copy_.default:
        return bool(args[0].device.type != args[1].device.type)
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        return bool(torch.device(kwargs["device"]).type != args[0].device.type)
    return False
