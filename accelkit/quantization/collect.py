"""Where a pass that quantises gets its calibration from: the batches that `optimize` was given, or a Calibration.

source = Source.taken_from(graph)     what optimize() left for the pass
source.smooth(graph, sites, 0.5)      SmoothQuant, where asked for
source.histograms(graph, sites, wanted)
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from accelkit import graph as graphs
from accelkit.errors import InputError
from accelkit.quantization.calibration import Calibration
from accelkit.quantization.histogram import Histogram
from accelkit.quantization.observe import observe, observe_channels
from accelkit.quantization.schemes import QUANTISERS
from accelkit.quantization.sites import Site, find_sites
from accelkit.quantization.smooth import Smoothed, smooth

KEY = "calibration"  # of GraphModule.meta

OBSERVED = QUANTISERS - {"weight", "layernorm_input", "local_input", "final_input"}
"""What `Calibration.collect` observes: all that some scheme quantises by what was seen (a final layer's input is an input)."""


def layers_digest(sites: Sequence[Site]) -> str:
    """SHA-256 of the sites' names, operators and weights' shapes: of a calibration that holds while the weights are trained."""
    shapes = [list(graphs.val(w).shape) if isinstance(w := site.bound.get("weight"), fx.Node) else "" for site in sites]
    lines = [f"{site.name} {site.node.target} {shape}" for site, shape in zip(sites, shapes, strict=True)]
    return "layers " + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_digest(graph: fx.GraphModule, sites: Sequence[Site]) -> str:
    """SHA-256 of the sites' names, operators and weights: the same for every batch size, scheme and target."""
    from accelkit.tensor_hash import contents

    weights = [
        graphs.attribute(graph, str(site.bound["weight"].target))
        for site in sites
        if site.kind in ("linear", "convolution") and isinstance(site.bound["weight"], fx.Node)
        and site.bound["weight"].op == "get_attr"
    ]  # fmt: skip
    lines = [f"{site.name} {site.node.target}" for site in sites]
    return hashlib.sha256("\n".join([*lines, *contents(weights)]).encode()).hexdigest()


@dataclass
class Source:
    """The calibration of one graph, for the pass that quantises it.

    Attributes:
        graph: that the passes rewrite.
        batches: gives all calibration inputs, flat; None where there are none.
        known: an earlier calibration; then no batch is taken.
        said: told what is going on, for progress.
        used: what the pass used, once it has. seconds: spent on collecting it.
    """

    graph: fx.GraphModule
    batches: Callable[[], Iterable[Sequence[torch.Tensor]]] | None = None
    known: Calibration | None = None
    said: Callable[[str], None] = lambda words: None
    used: Calibration | None = None
    seconds: float = 0.0
    _digest: str = ""
    _layers: str = ""
    _channels: dict[str, torch.Tensor] = field(default_factory=dict)
    _alpha: float | None = None

    def leave(self) -> None:
        """Put it where the pass that runs next finds it."""
        self.graph.meta[KEY] = self

    @staticmethod
    def taken_from(graph: fx.GraphModule) -> Source | None:
        """What was left for the pass, once; None where it runs outside of `optimize`."""
        found = graph.meta.pop(KEY, None)
        if not isinstance(found, Source):
            return None
        sites = find_sites(graph)
        found._digest, found._layers = model_digest(graph, sites), layers_digest(sites)
        return found

    def told(self) -> str:
        """Where the ranges are from, in words."""
        assert self.used is not None
        batches = f"{self.used.batches} batch{'' if self.used.batches == 1 else 'es'}"
        return f"a calibration of {batches} collected before" if self.known is not None else f"{batches} of calibration"

    def smooth(self, graph: fx.GraphModule, sites: Sequence[Site], alpha: float) -> Smoothed:
        """SmoothQuant, in place.

        Raises:
            InputError: no calibration data, or one that was collected otherwise.
        """
        self._require()
        self._alpha = alpha
        if self.known is not None:
            self._same_smoothing(alpha)
            self._channels, self.used = dict(self.known.channels), self.known
        else:
            started = time.perf_counter()
            self._channels, number = observe_channels(graph, sites, self._batches("channels"))
            self.seconds += time.perf_counter() - started
            self.used = Calibration(self._digest, {}, number, self._channels, alpha)
        return smooth(graph, sites, self._channels, alpha)

    def histograms(self, graph: fx.GraphModule, sites: Sequence[Site], wanted: frozenset[str]) -> dict[str, Histogram]:
        """By `<site>.<quantiser>`, of all tensors wanted.

        Raises:
            InputError: no calibration data, one of another model, or one that lacks a tensor.
        """
        self._require()
        if self.known is None:
            started = time.perf_counter()
            found, number = observe(graph, sites, wanted, self._batches("calibration"))
            self.seconds += time.perf_counter() - started
            self.used = Calibration(self._digest, found, number, self._channels, self._alpha)
            return found
        self._same_smoothing(self._alpha)
        self.used = self.known
        return dict(self.known.histograms)

    def _require(self) -> None:
        if self.known is None and self.batches is None:
            raise InputError("needs calibration data")
        if self.known is not None and self.known.model not in (self._digest, self._layers):
            raise InputError(
                "the calibration is of another model, or of other weights or passes, than the one that is being quantised: "
                "collect it again (Calibration.collect(model, batches))"
            )

    def _same_smoothing(self, alpha: float | None) -> None:
        assert self.known is not None
        if self.known.smooth != alpha:
            raise InputError(
                f"the calibration was collected with smooth={self.known.smooth}, the precision has smooth={alpha}: collect it "
                f"again with smooth={alpha}"
            )

    def _batches(self, what: str) -> Iterator[Sequence[torch.Tensor]]:
        assert self.batches is not None
        for number, batch in enumerate(self.batches(), 1):
            self.said(f"{what}, batch {number}")
            yield batch


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    example_inputs: Any,
    alpha: float | None,
    dynamic_shapes: Any,
    keep: tuple[str, ...],
    progress: bool,
) -> Calibration:
    """`Calibration.collect`."""
    from accelkit.calibration import as_calibration, one_shot
    from accelkit.capture import capture
    from accelkit.options import canonical_example, resolve_passes
    from accelkit.pass_runner import run_passes
    from accelkit.pipeline import copy_graph
    from accelkit.precision import as_precision
    from accelkit.progress import Progress
    from accelkit.twin import eval_twin, require_usable

    given = as_calibration(batches)
    if alpha is not None and one_shot(batches):
        raise InputError("smooth= goes through the batches twice, and this is an iterator: give a list or a DataLoader")
    if example_inputs is None:
        rest = iter(given.batches)
        example_inputs = next(rest, None)
        if example_inputs is None:
            raise InputError("calibration is empty: it gave no batch")
        if one_shot(batches):
            given.batches = itertools.chain([example_inputs], rest)
    args, kwargs = canonical_example(example_inputs)
    shown = Progress(progress)
    with shown.running(f"calibrating {type(model).__name__}"):
        program = capture(eval_twin(require_usable(model)), args, kwargs, dynamic_shapes)
        graph = copy_graph(program.graph)
        passes, _ = resolve_passes(None, as_precision("int8"))
        run_passes(graph, itertools.takewhile(lambda one: not one.calibrates, passes))
        source = Source(graph, lambda: given.through(program, program, {}), None, shown.say)
        source.leave()
        Source.taken_from(graph)
        sites = [s for s in find_sites(graph) if not any(s.matches(pattern) for pattern in keep)]
        if alpha is not None:
            source.smooth(graph, sites, alpha)
        source.histograms(graph, sites, OBSERVED)
    assert source.used is not None
    return source.used
