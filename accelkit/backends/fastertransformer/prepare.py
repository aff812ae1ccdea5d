"""What is decided per node when a graph is compiled: kernels, and the operators that have them.

    aten.linear(x, weight, bias)  ->  accelkit.linear_activation(x, weight, bias, "none")       where its kernel takes the operands

Each step is a function in STEPS; it gets the copy of the graph that this backend owns, and rewrites it in place.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.ops import OPERATORS, operator_of

Step = Callable[[fx.GraphModule, Sequence[torch.Tensor], CompileContext], None]


def prepare(graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> fx.GraphModule:
    """A copy of the graph, its nodes rewritten for the device that `inputs` (examples) are on; tensors are shared."""
    own = own_copy(graph)
    if any(i.is_cuda for i in inputs):
        for step in STEPS:
            step(own, inputs, context)
        own.graph.lint()
        own.recompile()
    return own


def own_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes can be rewritten; tensors are shared."""
    return fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)


def constants_of(graph: fx.GraphModule) -> tuple[torch.Tensor, ...]:
    """The tensors that the graph has and never writes to."""
    written = {graphs.attribute(graph, str(n.target)) for n in graphs.written_roots(graph.graph) if n.op == "get_attr"}
    touched = {tensor.untyped_storage()._cdata for tensor in written}
    found = (tensor for _, tensor in graphs.tensor_attributes(graph))
    return tuple(tensor for tensor in found if tensor.untyped_storage()._cdata not in touched)


def plain_linears(graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> None:
    """A linear layer that no pass has fused with its neighbours takes the same kernels as those that were."""
    operator = OPERATORS["linear_activation"]
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        bound = graphs.bound_arguments(node) or {}
        arguments = (bound["input"], bound["weight"], bound["bias"], "none")
        with graph.graph.inserting_before(node):
            fused = graph.graph.call_function(operator.overload, arguments)
        fused.meta = dict(node.meta)
        if why_no_kernel(fused) is not None:
            graph.graph.erase_node(fused)
            continue
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)


STEPS: tuple[Step, ...] = (plain_linears,)


def why_no_kernel(node: fx.Node) -> str | None:
    """Why a fused operator's plain definition runs here instead of its kernel; None where the kernel does."""
    operator = operator_of(node)
    if operator is None:
        return f"{node.target} is no fused operator"
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), graphs.val)
    value = graphs.val(node)
    fake = value[0] if isinstance(value, (tuple, list)) else value
    env = fake.fake_mode.shape_env if isinstance(fake, FakeTensor) else None
    with env.suppress_guards() if env is not None else contextlib.nullcontext():
        return operator.refusal(*args, **kwargs)
