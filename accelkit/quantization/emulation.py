"""The graph with its rounded tensors, run by plain PyTorch: what every target's INT8 result is held to.

    graph before, graph after, inputs  --node by node, side by side-->  each layer's signal-to-noise ratio

Why it is the yardstick: docs/decisions/0014-int8-is-held-to-its-emulation.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.twin import clone_inputs

LAYER = "quantised"
"""Key of node.meta: the layer's name, of a node whose result is a quantised layer's."""

NOISY = 0.1
"""Relative error of an output from which on `optimize` warns: a signal-to-noise ratio of 20 dB. Chosen, not measured: the
schemes' own errors on encoders are a few percent (docs/decisions/0014)."""


@dataclass(frozen=True)
class Emulation:
    """What a pass that quantises did to a graph.

    Attributes:
        by: the pass with its options.
        before, after: copies of the graph; tensors are shared.
    """

    by: str
    before: fx.GraphModule
    after: fx.GraphModule


@dataclass(frozen=True)
class LayerNoise:
    """How much of a layer's result is left, with this and all earlier layers quantised.

    Attributes:
        layer: its name, as `keep` takes it.
        snr_db: 10 log10 of the ratio of powers, result over error, on the example; infinite where nothing differs.
    """

    layer: str
    snr_db: float


def outputs_of(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The graph's outputs in plain PyTorch."""
    with torch.no_grad():
        return tuple(graph(*graphs.laid_out(graph)(clone_inputs(tuple(inputs)))))


def layer_noise(emulation: Emulation, inputs: Sequence[torch.Tensor]) -> list[LayerNoise]:
    """Each quantised layer's signal-to-noise ratio, in the graph's order; one value of each graph is held at a time."""
    from accelkit.quantization.sites import find_sites

    before = {site.node: site.name for site in find_sites(emulation.before)}
    after = {node: str(node.meta[LAYER]) for node in emulation.after.graph.nodes if LAYER in node.meta}
    both = set(before.values()) & set(after.values())
    runs = (
        _values(graph, inputs, {node: layer for node, layer in wanted.items() if layer in both})
        for graph, wanted in ((emulation.before, before), (emulation.after, after))
    )
    return [LayerNoise(name, signal_to_noise_db(exact, q)) for (name, exact), (_, q) in zip(*runs, strict=True)]


def signal_to_noise_db(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """10 log10(|exact|^2 / |exact - rounded|^2)."""
    signal = float(exact.double().square().sum())
    noise = float((exact.double() - rounded.double()).square().sum())
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _values(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], wanted: dict[fx.Node, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(layer, its first result) of the wanted nodes, each as soon as it is there."""
    values: dict[fx.Node, Any] = {}
    given = iter(graphs.laid_out(graph)(clone_inputs(tuple(inputs))))
    last = {used: node for node in graph.graph.nodes for used in node.all_input_nodes}
    for node in graph.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = graphs.attribute(graph, str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            target: Any = node.target
            with torch.no_grad():
                values[node] = target(*args, **kwargs)
        for used in node.all_input_nodes:
            if last[used] is node:
                del values[used]
        if node in wanted:
            value = values[node]
            yield wanted[node], value[0] if isinstance(value, (tuple, list)) else value
