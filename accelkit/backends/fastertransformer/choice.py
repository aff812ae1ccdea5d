"""Which form of a graph runs: recorded side by side, replayed in turns, the fastest is kept.

    as the passes left it  |  layer norms folded into linear layers (fold_layer_norm)  |  linear layers split (split_linear)

No rule says where they pay: it depends on rows, widths and the GPU. Folding wants many rows, splitting few; between the two
limits below all forms are measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, fx

from accelkit import graph as graphs
from accelkit.backends.fastertransformer.fold_layer_norm import fold_layer_norms
from accelkit.backends.fastertransformer.obstacles import NotRecordable
from accelkit.backends.fastertransformer.prepare import own_copy, why_no_kernel
from accelkit.backends.fastertransformer.recording import Recorder, call_ms
from accelkit.backends.fastertransformer.split_linear import split_linears
from accelkit.ops import operator_of

PLAIN = "as fused by the passes"
FOLDED = "layer norms folded into linear layers"
SPLIT = "linear layers split between programs"
_FOLDED_FROM, _SPLIT_TO = 1024, 4096  # rows
_ROUNDS = 9


class Choice(NamedTuple):
    """The graph to run and why.

    Attributes:
        graph: the fastest form. name: which one it is.
        milliseconds: of each form that could be measured, by name; empty where there was only one.
    """

    graph: fx.GraphModule
    name: str
    milliseconds: Mapping[str, float]

    def note(self) -> str | None:
        """A sentence for the report; None where there was nothing to choose."""
        if not self.milliseconds:
            return None
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.milliseconds.items())
        return f"measured: {times}; runs {self.name}"


def choose(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    warmup: int,
    device: torch.device,
    arithmetic: Callable[[], AbstractContextManager[None]],
) -> Choice:
    """The fastest form of a prepared graph for these inputs; measures on a GPU where there are several."""
    forms = {PLAIN: graph}
    rows = _rows(graph) if device.type == "cuda" else 0
    for name, rewrite, wanted in (
        (FOLDED, fold_layer_norms, rows >= _FOLDED_FROM),
        (SPLIT, split_linears, 0 < rows <= _SPLIT_TO),
    ):
        form = own_copy(graph) if wanted else graph
        if not wanted or not rewrite(form) or _without_kernel(form):
            continue
        form.graph.lint()
        form.recompile()
        forms[name] = form
    if len(forms) == 1:
        return Choice(graph, PLAIN, {})
    times = _measure(forms, inputs, warmup, device, arithmetic)
    name = min(times, key=lambda n: times[n]) if times else PLAIN
    return Choice(forms[name], name, times)


def _rows(graph: fx.GraphModule) -> int:
    """Of the linear layers before residual norms: the most, by the examples' sizes."""
    norms = [n for n in graph.graph.nodes if (o := operator_of(n)) is not None and o.name == "residual_layer_norm"]
    sizes = [math.prod(size_hint(size) for size in graphs.val(n.args[0]).shape[:-1]) for n in norms]
    return max(sizes, default=0)


def size_hint(size: int | torch.SymInt) -> int:
    """A size, or what it was in the example."""
    return size if isinstance(size, int) else int(size.node.hint)


def _without_kernel(graph: fx.GraphModule) -> bool:
    nodes = [n for n in graph.graph.nodes if (o := operator_of(n)) is not None and o.name == "folded_linear"]
    return any(why_no_kernel(node) is not None for node in nodes)


def _measure(
    forms: Mapping[str, fx.GraphModule],
    inputs: Sequence[Tensor],
    warmup: int,
    device: torch.device,
    arithmetic: Callable[[], AbstractContextManager[None]],
) -> dict[str, float]:
    recordings = {}
    for name, form in forms.items():
        try:
            with arithmetic():
                recordings[name] = Recorder(device).record(form.forward, inputs, warmup)
        except (NotRecordable, torch.OutOfMemoryError):
            continue  # the engine meets the same obstacle, and reports it
    if len(recordings) < 2:
        return {}
    times: dict[str, list[float]] = {name: [] for name in recordings}
    for _ in range(_ROUNDS):  # in turns: the clocks drift
        for name, recording in recordings.items():
            times[name].append(call_ms(recording.replay, device, repeats=3))
    return {name: statistics.median(found) for name, found in times.items()}
