"""Dropout back into a graph whose fusions it would have prevented: each where the same value is.

    model in training:  ... y = gelu(linear(x)); dropout(y, 0.1) ...       captured with dropout on
    fused, quantised:   ... y' = gelu(linear(x')) ...                      ->  dropout(y', 0.1)

A dropout's input and the value it belongs to are recognised by computing both graphs on the example: equal numbers are the same
value. Then both are run once more with the same fixed masks, and have to agree; so a wrong place is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from accelkit import graph as graphs
from accelkit.errors import warn
from accelkit.twin import clone_inputs

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

_SAME = 1e-4
"""Largest distance, relative to the value's norm, of the projections of two float32 values that count as one: rounding in
another order gives about 1e-6, another value about 1."""
_AGREE = 1e-3
"""Largest relative difference of the outputs under the same masks: a mask in a wrong place gives about its own size."""


@dataclass(frozen=True)
class Random:
    """The dropout of a model in training.

    Attributes:
        places: node and probability; the node is a dropout or an attention with dropout inside.
        others: random operators that are no dropout, by name.
    """

    places: dict[fx.Node, float] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def attention(self) -> bool:
        """Whether attention probabilities may be dropped."""
        return any(node.target is SDPA or graphs.val(node).dim() == 4 for node in self.places)


@dataclass(frozen=True)
class _Print:
    """What a value is recognised by."""

    size: int
    projection: float
    norm: float

    @staticmethod
    def of(value: torch.Tensor) -> _Print:
        flat = value.detach().double().reshape(-1)
        return _Print(flat.numel(), float(flat @ _noise(flat.numel(), 0, flat.device)), float(flat.norm()))

    def same(self, other: _Print) -> bool:
        near = _SAME * max(self.norm, other.norm)
        return (
            self.size == other.size
            and abs(self.projection - other.projection) <= near
            and abs(self.norm - other.norm) <= near
        )


def random_places(trained: Any) -> Random:
    """What is random in a program that was captured with dropout on."""
    places: dict[fx.Node, float] = {}
    others = []
    for node in trained.graph.graph.nodes:
        bound = graphs.bound_arguments(node) if node.op == "call_function" else None
        if bound is None:
            continue
        if node.target is aten.dropout.default and bound["train"]:
            places |= {node: float(bound["p"])} if bound["p"] else {}
        elif node.target is SDPA:
            places |= {node: float(bound["dropout_p"])} if bound["dropout_p"] else {}
        elif graphs.is_random(node):
            others.append(node.name)
    return Random(places, tuple(others))


def put_back(graph: fx.GraphModule, trained: Any, random: Random, inputs: Sequence[torch.Tensor]) -> list[str]:
    """Insert dropout, on where the graph's new last input `training` is true.

    Args:
        graph: trainable, in place. trained: the program with dropout. inputs: the example's.

    Returns:
        what of the model's randomness has no place in the graph, in words; a warning lists it as well.
    """
    with graph.graph.inserting_after(list(graph.graph.find_nodes(op="placeholder"))[-1]):
        training = graph.graph.placeholder("training")
    silent = [f"{name}: random, and no dropout" for name in random.others]
    placed: dict[fx.Node, fx.Node] = {}  # of the model in training -> of the graph
    if random.places:
        wanted = _prints(trained.graph, random, inputs)
        placed = _found(graph, wanted, inputs)
        for place in list(placed):
            if place.target is not SDPA and len(place.all_input_nodes[0].users) > 1:
                silent.append(f"{place.name}: its input is also read as it is")
                del placed[place]
        silent += [
            f"{p.name}: its input is no value of the fused graph"
            for p in wanted
            if p not in placed and p.name not in str(silent)
        ]
        if placed and not _agree(graph, trained, random, placed, inputs):
            warn(
                "dropout in quantisation-aware training is not where the model has it; training goes on without dropout"
            )
            return [*silent, *(f"{place.name}: not at the model's place" for place in placed)]
    for place, node in placed.items():
        with graph.graph.inserting_after(node):
            dropped = graph.graph.call_function(F.dropout, (node, random.places[place], training))
        dropped.meta = dict(node.meta)
        node.replace_all_uses_with(dropped)
        dropped.update_arg(0, node)
    if silent:
        warn(f"quantisation-aware training runs without: {'; '.join(silent)}")
    return silent


# --- both graphs in float32, without randomness


class _Model(fx.Interpreter):
    """The model in training; `at(node, value)` stands for each dropout."""

    def __init__(
        self, graph: fx.GraphModule, random: Random, at: Callable[[fx.Node, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.random, self.at = random, at

    def run_node(self, n: fx.Node) -> Any:
        if n.target is aten.dropout.default:
            value = self.env[n.all_input_nodes[0]]
            return self.at(n, value) if n in self.random.places else value
        if n in self.random.places:
            bound = fx.node.map_arg(graphs.bound_arguments(n) or {}, lambda a: self.env[a])
            return _attention(bound, lambda p: self.at(n, p))
        return super().run_node(n)


def _attention(bound: dict[str, Any], at: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    from accelkit.quantization.observe import probabilities

    query, key, value = (bound[name] for name in ("query", "key", "value"))
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    arguments = {"scale": bound["scale"], "mask": bound["attn_mask"], "causal": bound["is_causal"]}
    return torch.matmul(at(probabilities(query @ key.transpose(-1, -2), query, arguments)), value)


class _Fused(fx.Interpreter):
    """The trainable graph with nothing rounded; `after(node, value)` may replace a value."""

    def __init__(self, graph: fx.GraphModule, after: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.after = after

    def run_node(self, n: fx.Node) -> Any:
        from accelkit.quantization.training_graph import passed_through, rounded

        if n.target in (rounded, passed_through):
            return self.env[n.all_input_nodes[0]]
        return self.after(n, super().run_node(n))


def _prints(graph: fx.GraphModule, random: Random, inputs: Sequence[torch.Tensor]) -> dict[fx.Node, _Print]:
    found: dict[fx.Node, _Print] = {}

    def note(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        found[node] = _Print.of(value)
        return value

    with torch.no_grad():
        _Model(graph, random, note).run(*clone_inputs(tuple(inputs)))
    return found


def _found(
    graph: fx.GraphModule, wanted: dict[fx.Node, _Print], inputs: Sequence[torch.Tensor]
) -> dict[fx.Node, fx.Node]:
    """The first node of the graph that has each wanted value; each node once, in the graph's order."""
    sizes = {one.size for one in wanted.values()}
    placed: dict[fx.Node, fx.Node] = {}

    def look(node: fx.Node, value: Any) -> Any:
        computed = node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()
        if computed and value.numel() in sizes:
            seen = _Print.of(value)
            place = next((p for p, one in wanted.items() if p not in placed and one.same(seen)), None)
            if place is not None:
                placed[place] = node
        return value

    with torch.no_grad():
        _Fused(graph, look).run(*clone_inputs(tuple(inputs)), False)
    return placed


def _agree(
    graph: fx.GraphModule,
    trained: Any,
    random: Random,
    placed: dict[fx.Node, fx.Node],
    inputs: Sequence[torch.Tensor],
) -> bool:
    """Whether both graphs compute the same under the same fixed masks."""
    from accelkit.accuracy import relative_error

    numbers = {place: number for number, place in enumerate(placed, 1)}
    of_node = {node: numbers[place] for place, node in placed.items()}

    def mask(number: int | None, value: Any) -> Any:
        if number is None:
            return value
        kept = 2.0 * (_noise(value.numel(), number, value.device) > 0)
        return value * kept.reshape(value.shape).to(value.dtype)

    with torch.no_grad():
        theirs = _Model(trained.graph, random, lambda n, v: mask(numbers.get(n), v)).run(*clone_inputs(tuple(inputs)))
        ours = _Fused(graph, lambda n, v: mask(of_node.get(n), v)).run(*clone_inputs(tuple(inputs)), False)
    pairs = zip(ours, theirs, strict=True)
    return all(relative_error(a, b) < _AGREE for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point())


def _noise(size: int, seed: int, device: torch.device) -> torch.Tensor:
    """Standard normal numbers, the same for the same seed and size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device)
