"""Runs a graph on batches and counts the values of the tensors that a scheme quantises.

    graph, batch, batch, ...  --node by node-->  {"encoder.layer.0.output.dense.input": Histogram, ...}

The graph runs as it stands, in float32. What is inside of a fused operator (attention scores, a product before its bias) is
computed beside it, from the operator's own arguments. One batch is held at a time, and of each batch one value as long as
something reads it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from accelkit import graph as graphs
from accelkit.errors import InputError
from accelkit.quantization.histogram import Histogram
from accelkit.quantization.sites import Site, input_name
from accelkit.twin import clone_inputs, preserved


def observe(
    graph: fx.GraphModule,
    sites: Sequence[Site],
    wanted: frozenset[str],
    batches: Iterable[Sequence[torch.Tensor]],
    said: Callable[[int], None] = lambda number: None,
) -> tuple[dict[str, Histogram], int]:
    """Histograms of the sites' tensors over all batches, by `<site>.<quantiser>`, and the number of batches.

    Args:
        wanted: the quantisers (accelkit.quantization.schemes.QUANTISERS) to observe; weights need no data.
        batches: the graph's inputs, flat; taken one at a time.
        said: told each batch's number, for progress.

    Raises:
        InputError: the model fails on a batch, or gives NaN or infinity in one: the layer is named.
    """
    found: dict[str, Histogram] = {}

    def count(site: Site, name: str, values: torch.Tensor) -> None:
        found.setdefault(f"{site.name}.{name}", Histogram()).add(values)

    number = 0
    for number, _ in enumerate(_runs(graph, sites, wanted, batches, count), 1):
        said(number)
        for name, histogram in found.items():
            if histogram.non_finite:
                raise InputError(
                    f"calibration batch {number - 1} gives NaN or infinity in {name} ({histogram.non_finite} values). Look "
                    "at the batch, or keep the layer out of quantisation: keep=(...)"
                )
    return found, number


def observe_channels(
    graph: fx.GraphModule, sites: Sequence[Site], batches: Iterable[Sequence[torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], int]:
    """The largest magnitude of each input channel of the linear sites, [width] by site name, and the number of batches.

    Raises:
        InputError: as `observe`.
    """
    found: dict[str, torch.Tensor] = {}

    def count(site: Site, name: str, values: torch.Tensor) -> None:
        largest = values.reshape(-1, values.shape[-1]).abs().amax(0).float()
        found[site.name] = largest if site.name not in found else torch.maximum(found[site.name], largest)

    linear = [site for site in sites if site.kind == "linear"]
    number = 0
    for number, _ in enumerate(_runs(graph, linear, frozenset({"input"}), batches, count), 1):
        bad = [name for name, largest in found.items() if not bool(largest.isfinite().all())]
        if bad:
            raise InputError(
                f"calibration batch {number - 1} gives NaN or infinity in {bad[0]}.input. Look at the batch"
            )
    return {name: largest.cpu() for name, largest in found.items()}, number


def _runs(
    graph: fx.GraphModule,
    sites: Sequence[Site],
    wanted: frozenset[str],
    batches: Iterable[Sequence[torch.Tensor]],
    count: Callable[[Site, str, torch.Tensor], None],
) -> Iterator[None]:
    run = _Observer(graph, sites, wanted, count)
    for number, batch in enumerate(batches):
        try:
            run.once(batch)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise InputError(f"calibration: the model fails on the batch used as number {number}: {text}") from error
        yield


class _Observer(fx.Interpreter):
    """One forward after the other."""

    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[Site],
        wanted: frozenset[str],
        count: Callable[[Site, str, torch.Tensor], None],
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.extra_traceback = False
        self.observed, self.wanted, self.count = graph, wanted, count
        self.sites = {site.node: site for site in sites if not site.refusal}
        self.laid_out = graphs.laid_out(graph)
        self.written = graphs.written_roots(graph.graph)
        self.changes_state = bool(self.written) or any(graphs.is_random(n) for n in graph.graph.nodes)

    def once(self, inputs: Sequence[torch.Tensor]) -> None:
        with preserved(self.observed) if self.changes_state else contextlib.nullcontext(), torch.no_grad():
            self.run(*self.laid_out(clone_inputs(tuple(inputs)) if self.written else inputs))

    def run_node(self, n: fx.Node) -> Any:
        if (site := self.sites.get(n)) is not None:
            arguments = fx.node.map_arg(site.bound, lambda a: self.env[a])
            for name, values in tensors_of(site, arguments, self.wanted):
                self.count(site, name, values)
        return super().run_node(n)


def tensors_of(site: Site, arguments: dict[str, Any], wanted: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The site's tensors that are wanted, by quantiser, from its operator's arguments."""
    if site.kind in ("linear", "convolution"):
        first = arguments[input_name(site)]
        yield from [("input", first)] if "input" in wanted else []
        if site.kind == "linear" and "aftergemm" in wanted:
            yield "aftergemm", F.linear(first, arguments["weight"])
    elif site.kind == "residual":
        yield from [("residual_input", arguments["residual"])] if "residual_input" in wanted else []
    else:
        yield from _attention_tensors(arguments, wanted)


def _attention_tensors(arguments: dict[str, Any], wanted: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("query", "key", "value"):
        quantiser = f"matmul_{name[0]}_input"
        yield from [(quantiser, arguments[name])] if quantiser in wanted else []
    if wanted.isdisjoint({"softmax_input", "matmul_a_input"}):
        return
    scores = raw_scores(arguments["query"], arguments["key"])
    if "softmax_input" in wanted:
        yield "softmax_input", scores
    if "matmul_a_input" in wanted:
        yield "matmul_a_input", probabilities(scores, arguments["query"], arguments)


def raw_scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, heads, length, keys]: Q K^T without the scale, of operands [batch, length, heads, width]."""
    return torch.matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))


def probabilities(scores: torch.Tensor, query: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """softmax(scale * scores + mask), zeros in rows that see nothing; `arguments` are accelkit.attention's."""
    scale, mask = arguments["scale"], arguments["mask"]
    scores = scores * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if arguments["causal"]:
        rows = torch.arange(scores.shape[-2], device=scores.device).unsqueeze(1)
        seen = rows >= torch.arange(scores.shape[-1], device=scores.device)
        if mask is None:
            mask = seen
        else:
            mask = torch.logical_and(mask, seen) if mask.dtype is torch.bool else torch.where(seen, mask, -math.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype is torch.bool:
        return torch.where(mask, torch.softmax(torch.where(mask, scores, lowest), -1), 0.0)
    masked = scores + mask.to(scores.dtype).clamp(min=lowest)
    return torch.where(mask == -math.inf, 0.0, torch.softmax(masked, -1))
