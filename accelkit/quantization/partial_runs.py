"""Runs of graphs that differ from one graph in a few nodes: each begins where it first differs.

    graph:    a b c d e f            computed once
    variant:  a b c D E f            D E f, from the values that a b c left

Sound where no value is written to; a graph that writes is run as a whole each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs


class Runs:
    """All variants of a graph on the same inputs; what comes before a variant's first change is computed once."""

    def __init__(self, graph: fx.GraphModule, variants: Sequence[fx.GraphModule]) -> None:
        self.graph, self.variants = graph, variants
        self.laid_out = graphs.laid_out(graph)
        # a value that is written to is not what it was when a later variant reads it
        self.whole_only = bool(graphs.written_roots(graph.graph))
        order = [node.name for node in graph.graph.nodes]
        described = {node.name: _described(node) for node in graph.graph.nodes}
        self.starts: dict[str, list[int]] = {}
        for number, variant in enumerate(variants):
            same = {n.name for n in variant.graph.nodes if _described(n) == described.get(n.name)}
            start = next(
                name for name in order if name not in same and described[name][0] not in ("get_attr", "placeholder")
            )
            self.starts.setdefault(start, []).append(number)

    def of(self, inputs: Sequence[torch.Tensor]) -> Iterator[tuple[int, Sequence[Any], Sequence[Any]]]:
        """(number of the variant, its outputs, the float32 outputs)."""
        from accelkit.twin import clone_inputs, preserved

        if self.whole_only:
            outputs = []
            for one in (self.graph, *self.variants):
                with preserved(one):
                    outputs.append(one(*self.laid_out(clone_inputs(tuple(inputs)))))
            for number, results in enumerate(outputs[1:]):
                yield number, results, outputs[0]
            return
        given = tuple(self.laid_out(inputs))
        found: list[tuple[int, Sequence[Any]]] = []
        base = _Walk(self.graph, given)
        for node in self.graph.graph.nodes:
            for number in self.starts.get(node.name, ()):
                found.append((number, _Walk(self.variants[number], given, base).to_the_end()))
            base.step(node)
        for number, results in found:
            yield number, results, base.outputs


class _Walk:
    """One run of a graph, node by node; it may go on from where a run of a graph with the same first nodes is."""

    def __init__(self, graph: fx.GraphModule, given: Sequence[torch.Tensor], behind: _Walk | None = None) -> None:
        self.graph = graph
        self.values: dict[str, Any] = {} if behind is None else dict(behind.values)
        self.done: set[str] = set() if behind is None else set(behind.done)
        self.outputs: Sequence[Any] = ()
        self._given = iter(given) if behind is None else iter(())
        self._last = {used: node for node in graph.graph.nodes for used in node.all_input_nodes}

    def to_the_end(self) -> Sequence[Any]:
        for node in self.graph.graph.nodes:
            if node.name not in self.done:
                self.step(node)
        return self.outputs

    def step(self, node: fx.Node) -> None:
        self.done.add(node.name)
        if node.op == "placeholder":
            self.values[node.name] = next(self._given)
        elif node.op == "get_attr":
            return  # looked up where it is read
        elif node.op == "output":
            self.outputs = fx.node.map_arg(tuple(node.args[0]), self._value)  # type: ignore[arg-type]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            target: Any = node.target
            self.values[node.name] = target(*args, **kwargs)
        for used in node.all_input_nodes:
            if self._last[used] is node:
                self.values.pop(used.name, None)

    def _value(self, node: fx.Node) -> Any:
        return graphs.attribute(self.graph, str(node.target)) if node.op == "get_attr" else self.values[node.name]


def _described(node: fx.Node) -> Any:
    """What a node computes, in terms of the names of what it reads."""
    return node.op, str(node.target), str(node.args), str(node.kwargs)
