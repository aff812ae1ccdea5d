"""What fp16 products are summed in: as TensorRT likes where that is accurate enough, else the longest sums in float32.

    as it likes  ->  sums of more than 2048 terms  ->  layers that widen or narrow  ->  all linear layers
    the first engine whose error is within 90 % of what is allowed is taken: 1.8 times that of plain PyTorch

TensorRT 8.6 sums fp16 products in fp16 on GPUs where that is as fast, and its error grows with the number of terms; PyTorch
sums in float32. The bound that accelkit holds every result to is twice the error of the original model in plain PyTorch
(accelkit.accuracy), or `tolerance`; an engine of the whole graph is judged by that very bound (`Whole`), one of a part by the same
part in plain PyTorch (`Part`). Where no engine keeps it, the one with the smallest error is taken, and optimize()'s own
check decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.accuracy import YARDSTICK_FACTOR, OutputError, check_outputs, reference_outputs
from accelkit.backends.tensorrt.products import Product
from accelkit.errors import LoweringError
from accelkit.measure import interleaved
from accelkit.precision import Precision
from accelkit.rowwise import why_not_rowwise

ACCUMULATE = ("auto", "fp32", "fp16")
MARGIN = 1.8 / YARDSTICK_FACTOR
"""Of the error that is allowed: another example, or the whole model around a piece, may be a little worse."""
LONG = 2048
"""Terms: float16 has 11 bits, so that a sum of as many terms of one size is off by as much as a term."""
_ROWS = 2
_TIMED_SECONDS = 0.1


class Built(Protocol):
    """An engine: callable, and keeps sentences for the report."""

    def __call__(self, *inputs: torch.Tensor) -> Sequence[Any]:
        """Run."""
        ...

    def note(self, *sentences: str) -> None:
        """Keep sentences for the report."""
        ...


E = TypeVar("E", bound=Built)


@dataclass(frozen=True)
class Level:
    """Which products are summed in float32: `words` for the report, `nodes` of the ONNX model."""

    words: str
    nodes: tuple[str, ...]


AS_IT_LIKES = Level("sums as TensorRT likes", ())


def levels(products: Sequence[Product]) -> Iterator[Level]:
    """From none to all, each with more products than the one before."""
    yield AS_IT_LIKES
    before = 0
    long = {p.node for p in products if p.terms > LONG}
    uneven = long | {p.node for p in products if max(p.terms, p.columns) >= 2 * min(p.terms, p.columns)}
    for words, names in (
        (f"sums of more than {LONG} terms in float32", long),
        ("sums of layers that widen or narrow in float32", uneven),
        ("sums of all linear layers in float32", {p.node for p in products}),
    ):
        if len(names) > before:
            before = len(names)
            yield Level(words, tuple(p.node for p in products if p.node in names))


def everything(products: Sequence[Product]) -> Level:
    """All linear layers."""
    return Level("sums of all linear layers in float32", tuple(p.node for p in products))


class Judge(Protocol):
    """What says how far results are from float64."""

    beside: str
    """What the error is compared with, for the report."""

    def of(self, results: Sequence[Any]) -> list[OutputError]:
        """Of an engine's results on the whole example; those that are no numbers with a fraction do not count."""
        ...


class Whole:
    """The judge of a whole graph: what optimize()'s own check will find, computed once for both.

    Args:
        judge: the context's (backend_api.CompileContext).
    """

    beside = "plain PyTorch's"

    def __init__(self, judge: Callable[[Sequence[Any]], list[OutputError]]) -> None:
        self.judge = judge

    def of(self, results: Sequence[Any]) -> list[OutputError]:
        return [f for f, r in zip(self.judge(results), results, strict=True) if torch.is_floating_point(r)]


class Part:
    """The judge of a part of a graph: beside the same part in plain PyTorch, in the part's own precision.

    What the part's error makes of the whole model's is not known, so that the bound is optimize()'s, taken of the part.

    Args:
        graph: an accelkit graph. inputs: an example.
        precision: what was asked for.

    Raises:
        RuntimeError, NotImplementedError, TypeError: an operator has no float64 form, or the GPU has no memory for it.
    """

    beside = "this part's in plain PyTorch"

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], precision: Precision) -> None:
        few, self.rows = few_rows(graph, inputs)
        self.precision = precision
        with torch.no_grad():
            self.plain = [_copied(r) for r in graph(*few)]
        self.reference = reference_outputs(graph, few)

    def of(self, results: Sequence[Any]) -> list[OutputError]:
        """Of an engine's results on the whole example; those that are no numbers with a fraction do not count."""
        taken = [r[: self.rows] if self.rows is not None else r for r in results]
        names = [f"output {i}" for i in range(len(taken))]
        found = check_outputs(taken, self.reference, self.plain, names, self.precision, None)
        return [f for f, r in zip(found, self.reference, strict=True) if torch.is_floating_point(r)]


def few_rows(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int | None]:
    """The first rows of the example, where the graph computes each from itself alone, and how many; else all, and None.

    A graph of one fixed batch runs on that alone.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    sizes = [graphs.val(n).shape[0] for n in placeholders if graphs.val(n).dim()]
    symbols = {str(size) for size in sizes if isinstance(size, torch.SymInt)}
    if len(symbols) != 1 or why_not_rowwise(graph, symbol := next(iter(symbols))) is not None:
        return list(inputs), None
    few = [
        x[:_ROWS] if graphs.val(n).dim() and str(graphs.val(n).shape[0]) == symbol else x
        for n, x in zip(placeholders, inputs, strict=True)
    ]
    return few, _ROWS


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def most_accurate(
    tries: Sequence[Level],
    build: Callable[[Level], E],
    yardstick: Callable[[], Judge],
    inputs: Sequence[torch.Tensor],
    seconds: Callable[[E], float],
    first: int = 0,
) -> tuple[E, int]:
    """Build until an engine is accurate enough; it has a note of each try.

    Args:
        build: the engine of a level. A level after the first that TensorRT cannot build is noted and left out.
        yardstick: made after the first engine.
        seconds: that an engine took to build.
        first: the level to begin with: what a part of the same structure needed (`structure`).

    Returns:
        the engine, and its level's place in `tries`.

    Raises:
        LoweringError: the first level cannot be built.
    """
    best, place = build(tries[first]), first
    results = best(*inputs)
    try:
        judge = yardstick()
        found = judge.of(results)
    except (RuntimeError, NotImplementedError, TypeError) as failure:
        best.note(f"what fp16 products are summed in was not judged: {_first_line(failure)}")
        return best, place
    if not found:
        return best, place
    said = [f"{AS_IT_LIKES.words}: not tried, a part of the same structure was not accurate enough so"] if first else []
    said.append(_told(tries[first], found, judge.beside, best, inputs, seconds))
    error = share(found)
    for later in range(first + 1, len(tries)):
        if error <= MARGIN:
            break
        level = tries[later]
        try:
            engine = build(level)
        except LoweringError as failure:
            said.append(f"{level.words}: not built ({_first_line(failure)})")
            continue
        found = judge.of(engine(*inputs))
        said.append(_told(level, found, judge.beside, engine, inputs, seconds))
        if share(found) < error:
            best, place, error = engine, later, share(found)
        del engine  # its memory, before the next one is built
    if error > MARGIN:
        said.append(f"none of these is within {MARGIN:.0%} of the error that is allowed: the most accurate was taken")
    best.note(*said)
    return best, place


def share(errors: Sequence[OutputError]) -> float:
    """The worst output's error as a share of what is allowed; 0 without any."""
    return max(map(_share, errors), default=0.0)


def _share(one: OutputError) -> float:
    if one.error == 0.0:
        return 0.0
    return one.error / one.allowed if one.allowed else math.inf


def _told(
    level: Level,
    errors: Sequence[OutputError],
    than: str,
    engine: E,
    inputs: Sequence[torch.Tensor],
    seconds: Callable[[E], float],
) -> str:
    worst = max(errors, key=_share)
    device = next((t.device for t in inputs), torch.device("cpu"))
    timing = interleaved({"": lambda: engine(*inputs)}, seconds=_TIMED_SECONDS, device=device)[""]
    count = f" ({len(level.nodes)})" if level.nodes else ""
    beside = f", {worst.error / worst.yardstick:.2f} times {than}" if worst.yardstick else ""
    built = f"{timing.median_ms:.3g} ms, built in {seconds(engine):.3g} s"
    return f"{level.words}{count}: error {worst.error:.2e}{beside}, {built}"


def _first_line(error: Exception) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
