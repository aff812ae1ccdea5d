"""What nobody reads goes.

    y = relu(x), no user                            ->  (gone)
    w = attribute weight, no user                   ->  (gone), and the attribute itself where no other node names it
    dropout that is on, copy_ into a buffer, inputs ->  stay

Why: fusions leave the weights that they replaced behind; a graph that still names them keeps them in memory and in
every engine. fx's own elimination keeps every dropout, even one that is off. A random operator stays although its
result is not read: without it the others would draw other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from accelkit.graph import is_pure, is_random
from accelkit.pass_api import GraphPass, PassResult


@dataclass(frozen=True)
class EliminateDeadCode(GraphPass):
    """Remove operators without users, weights without users, and attributes that no node names."""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in reversed(list(graph.graph.nodes)):
            if node.users or node.op not in ("call_function", "get_attr"):
                continue
            if is_pure(node):
                result.rewrote(node)
                graph.graph.erase_node(node)
            elif is_random(node):
                result.refused(node, "it is random: without it, the random operators after it would draw other numbers")
        for name in _unnamed_attributes(graph):
            owner, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(owner), attribute)
            result.rewrote(f"attribute {name}")
        return result


def _unnamed_attributes(graph: fx.GraphModule) -> list[str]:
    named = {str(node.target) for node in graph.graph.nodes if node.op in ("get_attr", "call_module")}
    tensors = [name for name, _ in graph.named_parameters(remove_duplicate=False)]
    tensors += [name for name, _ in graph.named_buffers(remove_duplicate=False)]
    # a named submodule (the branch of a cond, say) needs everything below it
    return [t for t in tensors if not any(t == name or t.startswith(f"{name}.") for name in _prefixes(t) & named)]


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
