"""Which form of a graph runs: recorded side by side, replayed in turns, the fastest that is right is kept.

    as the passes left it  |  layer norms folded into linear layers (fold_layer_norm)  |  linear layers split (split_linear)

No rule says where they pay: it depends on rows, widths and the GPU. Folding wants many rows, splitting few; between the two
limits below all forms are measured. A form that is less exact than the passes' own is passed over (`agreement`): folding
subtracts a row's mean after the matrix product, and loses digits where means are large beside the deviations.
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
from accelkit.backends.fastertransformer.agreement import Agreement
from accelkit.backends.fastertransformer.fold_layer_norm import fold_layer_norms
from accelkit.backends.fastertransformer.obstacles import NotRecordable
from accelkit.backends.fastertransformer.prepare import constants_of, own_copy, why_no_kernel
from accelkit.backends.fastertransformer.recording import Recorder, call_ms
from accelkit.backends.fastertransformer.split_linear import split_linears
from accelkit.ops import operator_of
from accelkit.precision import FP32, Precision

PLAIN = "as fused by the passes"
FOLDED = "layer norms folded into linear layers"
SPLIT = "linear layers split between programs"
_FOLDED_FROM, _SPLIT_TO = 1024, 4096  # rows
_ROUNDS = 9


class Choice(NamedTuple):
    """The graph to run and why.

    Attributes:
        graph: the fastest form that is right. name: which one it is.
        milliseconds: of each form that could be measured, by name; empty where there was only one.
        failures: forms that could not be had or measured, or are not exact enough, and why.
    """

    graph: fx.GraphModule
    name: str
    milliseconds: Mapping[str, float]
    failures: Mapping[str, str]

    def note(self) -> str | None:
        """A sentence for the report; None where there was nothing to choose."""
        if not self.milliseconds and not self.failures:
            return None
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.milliseconds.items())
        failed = "".join(f"; not {name}: {why}" for name, why in self.failures.items())
        return f"{f'measured: {times}; ' if times else ''}runs {self.name}{failed}"


def choose(
    graph: fx.GraphModule,
    inputs: Sequence[Tensor],
    warmup: int,
    device: torch.device,
    arithmetic: Callable[[], AbstractContextManager[None]],
    fold: bool = True,
    precision: Precision = FP32,
) -> Choice:
    """The fastest form of a prepared graph for these inputs; measures on a GPU where there are several.

    A form that fails, for want of memory too, or whose results on these inputs are not exact enough, is left out with the
    reason; where none can be measured the graph stays as it is.
    """
    forms = {PLAIN: graph}
    failures: dict[str, str] = {}
    rows = _rows(graph) if device.type == "cuda" else 0
    for name, rewrite, wanted in (
        (FOLDED, fold_layer_norms, fold and rows >= _FOLDED_FROM),
        (SPLIT, split_linears, 0 < rows <= _SPLIT_TO),
    ):
        if not wanted:
            continue
        try:
            if (form := _rewritten(graph, rewrite)) is not None:
                forms[name] = form
        except Exception as error:  # noqa: BLE001 - for speed only: the graph itself computes the same
            failures[name] = _why(error)
    if len(forms) == 1:
        return Choice(graph, PLAIN, {}, failures)
    times = _measure(forms, inputs, warmup, device, arithmetic, failures)
    agreement = Agreement(graph, inputs, precision, arithmetic)
    left = dict(times)
    while (name := _fastest(left)) != PLAIN:
        try:
            fault = agreement.fault(forms[name])
        except torch.OutOfMemoryError as error:
            fault = f"it cannot be compared, {_why(error)}"
        if fault is None:
            break
        failures[name] = fault
        del left[name]
    if name == PLAIN:  # where it cannot be recorded the engine finds the same reason, and reports it
        failures = {n: why for n, why in failures.items() if why != failures.get(PLAIN)}
    return Choice(forms[name], name, times, failures)


def _fastest(times: Mapping[str, float]) -> str:
    """The first within two per cent of the fastest: a near-tie must come out the same every time."""
    return next((n for n in times if times[n] <= 1.02 * min(times.values())), PLAIN)


def _rewritten(graph: fx.GraphModule, rewrite: Callable[[fx.GraphModule], int]) -> fx.GraphModule | None:
    """A copy in another form; None where there is nothing to rewrite, or a kernel does not take what comes of it."""
    form = own_copy(graph)
    if not rewrite(form) or _without_kernel(form):
        return None
    form.graph.lint()
    form.recompile()
    return form


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
    failures: dict[str, str],
) -> dict[str, float]:
    """Milliseconds of the forms that can be recorded and replayed; the others go to `failures`."""
    recordings = {}
    for name, form in forms.items():
        try:
            with arithmetic():
                recordings[name] = Recorder(device).record(form.forward, inputs, warmup, constants_of(form))
        except (NotRecordable, torch.OutOfMemoryError) as error:
            failures[name] = _why(error)
    times: dict[str, list[float]] = {name: [] for name in recordings}
    for _ in range(_ROUNDS):  # in turns: the clocks drift
        for name in list(times):
            try:
                times[name].append(call_ms(recordings[name].replay, device, repeats=3))
            except RuntimeError as error:  # a graph's first launch takes memory of the driver's own
                failures[name] = _why(error)
                del times[name], recordings[name]
    return {name: statistics.median(found) for name, found in times.items()}


def _why(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"out of memory ({first})" if isinstance(error, torch.OutOfMemoryError) else first
