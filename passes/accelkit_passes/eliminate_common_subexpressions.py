"""What is computed twice is computed once.

    a = relu(x); b = relu(x)                                  ->  a; uses of b read a
    attribute lm_head.weight is attribute embed.weight        ->  one of them (tied weights under two names)
    sym_size(x, 0), sym_size(mask, 0), the same dynamic size  ->  one of them

Why: captured models compute their masks and position ids anew in every layer; and two reads of one weight that look
alike let later passes see that the products share an operand.

Two draws of random numbers are two values, and so are a buffer before and after the graph writes to it. Where two
outputs would become one tensor, both are computed: a caller may write to one of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.graph import attribute, bound_arguments, is_pure, is_random, memory_family, val
from accelkit.pass_api import GraphPass, PassResult
from accelkit_passes._proofs import output_families, written_memory


@dataclass(frozen=True)
class EliminateCommonSubexpressions(GraphPass):
    """Compute what is computed twice once."""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        writes, done = written_memory(graph), 0
        written = frozenset[fx.Node]().union(*writes.values())
        first: dict[Hashable, fx.Node] = {}
        for node in list(graph.graph.nodes):
            done += node in writes
            key = _key(graph, node)
            if key is None:
                continue
            if writes and any(not memory_family(i).isdisjoint(written) for i in node.all_input_nodes):
                key = (done, key)  # what it reads may differ after each write
            twin = first.setdefault(key, node)
            if twin is node:
                continue
            if reason := _reason(graph, node, twin, written):
                result.refused(node, f"the same as {twin.name}, but {reason}")
                continue
            node.replace_all_uses_with(twin)
            graph.graph.erase_node(node)
            result.rewrote(node)
        return result


def _key(graph: fx.GraphModule, node: fx.Node) -> Hashable | None:
    """Equal for nodes that compute the same from the same."""
    if node.op == "get_attr":
        return "get_attr", id(attribute(graph, str(node.target)))
    if node.op != "call_function" or not (is_pure(node) or is_random(node)):
        return None
    value = val(node)
    if isinstance(value, torch.SymInt) and not node.meta.get("unbacked_bindings"):
        return "size", str(value)
    bound = bound_arguments(node)
    if bound is not None:
        return node.target, _frozen(list(bound.values()))
    return (node.target, _frozen(node.args)) if _is_plain(node) and not node.kwargs else None


def _is_plain(node: fx.Node) -> bool:
    # getitem, and arithmetic on sizes; a higher-order operator (cond, a checkpoint) is not looked into
    return getattr(node.target, "__module__", None) in ("_operator", "builtins", "math", "torch")


def _frozen(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, fx.Node):
        return value
    return type(value), repr(value)  # 1, 1.0 and True are three numbers, so are 0.0 and -0.0


def _reason(graph: fx.GraphModule, node: fx.Node, twin: fx.Node, written: frozenset[fx.Node]) -> str | None:
    if node.op == "get_attr":
        return None
    if is_random(node):
        return "random: two draws are two values"
    if node.meta.get("unbacked_bindings"):
        return "the size of its result is known only at run time"
    if node in written or twin in written:
        return "one of them is written to"
    families = output_families(graph)
    mine = [family for family in families if node in family]
    if mine and any(node not in family and twin in family for family in families):
        return "two outputs would share memory"
    return None
