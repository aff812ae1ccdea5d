"""What the fusion passes share: what they refuse, and how a fused operator takes the place of several.

    a -> b -> c, where nothing else reads a or b   ->   fused, where c stood

A fused operator reads its operands where it stands, so nothing may be written between the first operator that it
replaces and the last. It says that it comes from where the last one came from (`nn_module_stack`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops import Operator
from accelkit.pass_api import Refused

aten = torch.ops.aten

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints)


def require(condition: bool, reason: str) -> None:
    """Refuse with `reason` unless `condition` holds; the passes catch it and note it in their result."""
    if not condition:
        raise Refused(reason)


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments by the schema's names; empty for what is no operator."""
    return graphs.bound_arguments(node) or {}


def is_floating(node: Any) -> bool:
    """Whether the value is a floating-point tensor."""
    value = graphs.val(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def is_cast(node: Any) -> bool:
    """Whether the node casts one floating-point dtype to another."""
    return isinstance(node, fx.Node) and node.target is aten.to.dtype and all(map(is_floating, (node, node.args[0])))


def outside_users(node: fx.Node, inside: Collection[fx.Node]) -> list[str]:
    """Who else reads the node's result, by name."""
    return [user.name for user in node.users if user not in inside]


def only_used_by(node: fx.Node, *users: fx.Node) -> None:
    """Refuse where others than `users` need the value that would not be there any more."""
    others = outside_users(node, users)
    require(not others, f"{node.name} is also used by {', '.join(others)}")


def nothing_used_outside(graph: fx.GraphModule, inside: Collection[fx.Node], last: fx.Node) -> None:
    """Refuse where others need what the fused operator does not give: anything of `inside` but `last`."""
    for node in graph.graph.nodes:
        if node in inside and node is not last:
            only_used_by(node, *inside)


def nothing_written_between(graph: fx.GraphModule, first: fx.Node, last: fx.Node) -> None:
    """Refuse where an operand may change between where it was read and where the fused operator reads it."""
    nodes = list(graph.graph.nodes)
    between = nodes[nodes.index(first) : nodes.index(last)]
    writers = [node.name for node in between if graphs.is_mutating(node)]
    require(not writers, f"{', '.join(writers)} writes to memory between {first.name} and {last.name}")


def add_fused(graph: fx.GraphModule, operator: Operator, arguments: Sequence[Any], last: fx.Node) -> fx.Node:
    """A node of a fused operator, before `last`, with its origin and (until the runner infers it) its value; the caller
    lets it take `last`'s place."""
    with graph.graph.inserting_before(last):
        node = graph.graph.call_function(operator.overload, tuple(arguments))
    node.meta = metadata(last)
    return node


def metadata(node: fx.Node) -> dict[str, Any]:
    """A node's value, and which module and source line it comes from, for one that takes its place."""
    return {key: node.meta[key] for key in ("val", "nn_module_stack", "stack_trace") if key in node.meta}


def erase_unused(graph: fx.GraphModule, nodes: Collection[fx.Node]) -> None:
    """Erase those of `nodes` that nobody reads any more, users before what they use."""
    for node in reversed([n for n in graph.graph.nodes if n in nodes]):
        if not node.users:
            graph.graph.erase_node(node)


def constant(graph: fx.GraphModule, node: Any, what: str) -> torch.Tensor:
    """The real tensor of a parameter, buffer or constant that the graph never writes to.

    Raises:
        Refused: it is computed at run time, or written to.
    """
    require(node.op == "get_attr", f"{what} ({node.name}) is computed at run time")
    value = graphs.attribute(graph, str(node.target))
    require(not _is_written(graph, value), f"{what} ({node.name}) is written to by the graph")
    assert isinstance(value, torch.Tensor)
    return value.detach()


def _is_written(graph: fx.GraphModule, value: torch.Tensor) -> bool:
    storage = value.untyped_storage().data_ptr()
    for node in graph.graph.nodes:
        if not graphs.is_mutating(node):
            continue
        for root in {r for written in graphs.aliases(node) for r in graphs.storage_roots(written)}:
            if (
                root.op == "get_attr"
                and graphs.attribute(graph, str(root.target)).untyped_storage().data_ptr() == storage
            ):
                return True
    return False
