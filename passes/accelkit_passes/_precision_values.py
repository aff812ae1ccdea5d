"""The values of a graph that set_precision rewrites: what each one is, and each one in one dtype or the other.

narrow(value), wide(value), natural(value)  ->  a cast made once, where it is first needed, or the value itself
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_api import PassResult
from accelkit_passes._mask_constants import MaskConstants, operator_name
from accelkit_passes._precision_rules import MOVES

aten = torch.ops.aten


class Kind(Enum):
    """What a node's value is to this pass."""

    OTHER = "not float32 and not of the low precision: integers, float64, complex, sizes"
    WAITING = "float32, not an activation (weights, buffers, what is made of integers): cast where it meets one"
    LOW = "an activation in the low precision"
    WIDE = "a float32 activation, because an operator stays in float32: cast where it next meets the low precision"
    AUTHOR = "a float32 activation, because the author says so: promotes what it meets"


def is_of(node: fx.Node, *dtypes: torch.dtype) -> bool:
    value = graphs.val(node)
    return isinstance(value, torch.Tensor) and value.dtype in dtypes


class Values:
    """The nodes of `graph`, which becomes one of precision `dtype`; what is rewritten is told to `result`."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype, result: PassResult) -> None:
        self.graph, self.dtype, self.result = graph, dtype, result
        self.original = {node: graphs.val(node) for node in graph.graph.nodes}
        self.kinds: dict[fx.Node, Kind] = {}
        self.weights: set[fx.Node] = set()  # made of parameters, and WAITING
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.before_cast: dict[fx.Node, fx.Node] = {}  # the author's upcast -> the low-precision value it was made of
        self.inferred: set[fx.Node] = set()
        self.masks = MaskConstants(graph, dtype, result.rewrote)
        self.saturating: set[fx.Node] = set()  # inputs whose cast clamps what is beyond the range
        tensors = [v for v in self.original.values() if isinstance(v, torch._subclasses.FakeTensor)]
        self.mode = tensors[0].fake_mode if tensors else None

    # --- values in one dtype or the other

    def natural(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The value as the low-precision graph has it."""
        return self.narrow(value, at) if value.op == "placeholder" and self.kinds.get(value) == Kind.LOW else value

    def narrow(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The float32 value in the low precision (others as they are), for a use at node `at`."""
        if self.kinds.get(value, Kind.OTHER) == Kind.OTHER or not is_of(value, torch.float32):
            return value
        if (value, self.dtype) in self.casts:
            return self.casts[value, self.dtype]
        if value in self.before_cast:
            return self.natural(self.before_cast[value], at)
        if value in self.weights and operator_name(value) in MOVES and len(value.all_input_nodes) == 1:
            return self.narrow_move(value, at)
        saturate = self.kinds[value] == Kind.WAITING and self.masks.prepare(value)
        saturate = saturate or value in self.saturating
        value = self.masks.replaced.get(value, value)
        source = value
        if saturate:
            with self.graph.graph.inserting_before(at):
                source = self.new_node(aten.clamp.default, (value, -self.masks.limit, self.masks.limit), at)
            self.kinds[source] = Kind.WAITING
        self.casts[value, self.dtype] = cast = self.cast(source, self.dtype, at)
        return cast

    def narrow_move(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """transpose(weight) in the low precision is transpose(weight in the low precision): the float32 weight is not
        needed."""
        inner = self.narrow(value.all_input_nodes[0], at)
        with self.graph.graph.inserting_before(at):
            arguments = fx.node.map_arg((value.args, value.kwargs), lambda _: inner)
            self.casts[value, self.dtype] = moved = self.new_node(value.target, arguments[0], at, arguments[1])
        return moved

    def wide(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The low-precision value in float32 (others as they are), for a use at node `at`."""
        if self.kinds.get(value) != Kind.LOW or not is_of(value, self.dtype):
            return value
        if value in self.original:
            return self.cast(value, torch.float32, at) if self.original[value].dtype == torch.float32 else value
        source = value.all_input_nodes[0]  # our own cast: what it was made of is still there
        return source if is_of(source, torch.float32) else self.cast(value, torch.float32, at)

    def cast(self, value: fx.Node, dtype: torch.dtype, at: fx.Node) -> fx.Node:
        if (value, dtype) not in self.casts:
            first = next(n for n in self.graph.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with self.graph.graph.inserting_before(first if value.op == "placeholder" else at):
                self.casts[value, dtype] = self.new_node(aten.to.dtype, (value, dtype), at)
        return self.casts[value, dtype]

    # --- mechanics

    def stand_in(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` take the place of a cast that has nothing to do."""
        node.replace_all_uses_with(value)
        self.graph.graph.erase_node(node)
        self.result.rewrote(node)

    def rearrange(self, node: fx.Node, change: Callable[[fx.Node], fx.Node]) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), change)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
            self.result.rewrote(node)

    def infer(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        values = fx.node.map_arg((args, kwargs), graphs.val)
        return graphs.inferred(node.target, *values, self.mode)

    def set_value(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        self.inferred.add(node)

    def new_node(self, target: Any, args: Any, at: fx.Node, kwargs: Any = None) -> fx.Node:
        node = self.graph.graph.call_function(target, args, kwargs or {})
        node.meta = {k: v for k, v in at.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.set_value(node, self.infer(node, node.args, node.kwargs))
        self.kinds[node] = Kind.LOW if is_of(node, self.dtype) else Kind.WIDE
        return node
