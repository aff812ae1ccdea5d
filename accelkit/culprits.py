"""Which operators make a compilation fail: for compilers that say "no" without saying to what.

    graph -> operators that each fail when compiled alone, with the reason

Each operator is tried on inputs of its own, without its neighbours, so one trial answers for many operators at once:
all that work are cleared together, and only a failing set is split (n operators with k culprits take about k log n
trials). Operators that differ in nothing but their sizes share one trial.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs


def culprits(graph: fx.GraphModule, attempt: Callable[[fx.GraphModule], str | None]) -> dict[str, str]:
    """Names of the operators that fail alone, mapped to why.

    Args:
        graph: an accelkit graph that failed as a whole.
        attempt: compiles a graph; returns the reason of the failure, or None where it works.

    Returns:
        possibly nothing: then it is the combination that fails.
    """
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and not graphs.is_size(node):
            alike.setdefault(_kind(node), []).append(node)
    failing: dict[fx.Node, str] = {}
    _search(graph, [nodes[0] for nodes in alike.values()], attempt, failing)
    return {n.name: why for first, why in failing.items() for n in alike[_kind(first)]}


def _search(
    graph: fx.GraphModule,
    nodes: list[fx.Node],
    attempt: Callable[[fx.GraphModule], str | None],
    failing: dict[fx.Node, str],
) -> None:
    if not nodes or (why := attempt(_apart(graph, nodes))) is None:
        return
    if len(nodes) == 1:
        failing[nodes[0]] = why
        return
    half = len(nodes) // 2
    _search(graph, nodes[:half], attempt, failing)
    _search(graph, nodes[half:], attempt, failing)


def _kind(node: fx.Node) -> Any:
    """What decides whether a compiler knows the operator: the overload, dtypes and ranks, and arguments that are no
    sizes."""

    def described(argument: Any) -> str:
        value = graphs.val(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(value, torch.Tensor):
            return f"{value.dtype}/{value.dim()}"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return type(value).__name__
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(described(v) for v in value)}]"
        return repr(value)

    return (
        node.target,
        tuple(described(a) for a in node.args),
        tuple((k, described(v)) for k, v in node.kwargs.items()),
    )


def _apart(graph: fx.GraphModule, nodes: list[fx.Node]) -> fx.GraphModule:
    """A graph of just these operators, each on inputs of its own; their sizes are computed from inputs too."""
    alone = fx.Graph()
    inputs: dict[fx.Node, fx.Node] = {}

    def require(node: fx.Node) -> None:
        if graphs.is_size(node):
            for i in node.all_input_nodes:
                require(i)
        elif node not in inputs:
            inputs[node] = alone.placeholder(f"given_{node.name}")
            inputs[node].meta = {"val": graphs.val(node)}

    for node in nodes:
        for i in node.all_input_nodes:
            require(i)
    sizes: dict[fx.Node, fx.Node] = {}

    def copied(node: fx.Node) -> fx.Node:
        if not graphs.is_size(node):
            return inputs[node]
        if node not in sizes:
            sizes[node] = alone.node_copy(node, copied)
        return sizes[node]

    results: list[fx.Node] = []
    for node in nodes:
        copy = alone.node_copy(node, copied)
        value = graphs.val(node)
        if isinstance(value, torch.Tensor):
            results.append(copy)
            continue
        for index, item in enumerate(value if isinstance(value, (tuple, list)) else ()):
            if isinstance(item, torch.Tensor):
                part = alone.call_function(operator.getitem, (copy, index))
                part.meta["val"] = item
                results.append(part)
    alone.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), alone)
