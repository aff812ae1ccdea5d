"""Which layers INT8 hurts: each quantised alone, and what that does to the model's outputs.

    found = sensitivity(model, x, Int8("ft2"), calibration=calibration)
    print(found)                                                  # a table, the worst first
    accelkit.optimize(model, x, precision=Int8("ft2", keep=found.keep(3)), calibration=calibration)

The model is captured once, and runs once in float32; a layer's run begins where it first differs from that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from accelkit import graph as graphs
from accelkit.errors import InputError
from accelkit.quantization.calibration import Calibration

if TYPE_CHECKING:
    from accelkit.precision import Precision
    from accelkit.quantization.sites import Site

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, or several that were measured together.

    Attributes:
        layers: their names. kinds: linear, convolution, attention, residual; in the same order.
        patterns: what `Int8(keep=...)` takes for exactly these.
        error: what quantising them alone does to the outputs; see Sensitivity.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    patterns: tuple[str, ...]
    error: float

    @property
    def name(self) -> str:
        """The layer's name; of several, what they have in common."""
        if len(self.layers) == 1:
            return self.layers[0]
        return f"{_shared(self.layers) or self.layers[0]} ({len(self.layers)} layers)"


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`.

    Attributes:
        precision: what was measured.
        layers: the worst first.
        together: the error with all of them quantised.
        measure: what an error is, in words.
        batches: over how many batches errors are means. evaluations: forwards made, most of them of a part of the model.
    """

    precision: str
    layers: tuple[LayerSensitivity, ...]
    together: float
    measure: str
    batches: int
    evaluations: int

    def keep(self, number: int | None = None, *, error: float | None = None) -> tuple[str, ...]:
        """Patterns for `Int8(keep=...)` that leave the worst layers in float32.

        Args:
            number: how many rows of the table. error: instead, as many as it takes for the others' errors to stay below this; they
                are taken to be independent of one another (the root of the sum of squares), so measure the result.

        Raises:
            InputError: neither or both are given, or out of range.
        """
        if (number is None) == (error is None):
            raise InputError("keep(3) keeps the three worst rows; keep(error=0.01) as many as it takes")
        if number is not None:
            if not 0 <= number <= len(self.layers):
                raise InputError(f"keep({number}): there are {len(self.layers)} rows")
            taken = number
        else:
            assert error is not None
            if not error >= 0:
                raise InputError(f"keep(error={error}): an error is at least 0")
            rest = [math.hypot(*(max(0.0, row.error) for row in self.layers[n:])) for n in range(len(self.layers) + 1)]
            taken = next(n for n, left in enumerate(rest) if left <= error)
        return tuple(pattern for row in self.layers[:taken] for pattern in row.patterns)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for json.dump."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.layers))
        lines = [f"{'layer':<{width}}  kind         error alone ({self.measure})"]
        largest = max((row.error for row in self.layers), default=0.0)
        for row in self.layers:
            bar = "#" * round(24 * max(0.0, row.error) / largest) if largest > 0 else ""
            lines.append(f"{row.name:<{width}}  {_kind(row):<11}  {row.error:9.2e}  {bar}".rstrip())
        lines.append(f"{'all together':<{width}}  {'':<11}  {self.together:9.2e}")
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.table import Table

        batches = f"{self.batches} batch{'' if self.batches == 1 else 'es'}"
        table = Table("layer", "kind", "error alone", title=f"{self.precision}: {self.measure}, {batches}")
        for row in self.layers:
            table.add_row(row.name, _kind(row), f"{row.error:.2e}")
        table.add_section()
        table.add_row("all together", "", f"{self.together:.2e}")
        return table

    def plot(self, path: str | Path | None = None, number: int = 40) -> Any:
        """Draw the worst `number` rows as bars; `path` is where to save the picture.

        Returns:
            matplotlib's Figure.

        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("plot() needs matplotlib, which is not installed; pip install matplotlib") from error
        rows = self.layers[:number]
        figure = Figure(figsize=(8, 1.2 + 0.25 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh([row.name for row in rows], [row.error for row in rows], color="tab:blue")
        axes.invert_yaxis()
        axes.axvline(self.together, color="tab:red", linestyle="--", label=f"all together: {self.together:.2e}")
        axes.set(title=f"{self.precision}, each layer alone", xlabel=self.measure)
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    precision: str | Precision = "int8",
    *,
    calibration: Calibration | Iterable[Any] | None = None,
    batches: Iterable[Any] | None = None,
    metric: Metric | None = None,
    limit: int = 400,
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> Sensitivity:
    """Rank a model's layers by the error that quantising each alone causes, in plain PyTorch (the emulation).

    Args:
        model, example_inputs, dynamic_shapes: as for `optimize`; the model is not changed.
        precision: "int8" or an Int8 value; what its `keep` names is left out.
        calibration: a Calibration, or batches to collect one from; None for a scheme that needs none.
        batches: what to measure on, each as `example_inputs`; None: the example.
        metric: of (quantised outputs, float32 outputs), both as the model returns them: a number that is larger where it is
            worse; None: the largest of the outputs' relative errors (Frobenius norm of the difference over that of float32).
        limit: of measured rows, at least 1: with more layers than that, those of one module are measured together.
        progress: show a progress line on a terminal.

    Raises:
        InputError: no calibration where one is needed, a model that is random in eval mode, or nothing to quantise.
        CaptureError: the model cannot be captured as one graph.
    """
    from accelkit.calibration import as_calibration
    from accelkit.capture import capture
    from accelkit.options import canonical_example, resolve_passes
    from accelkit.pass_runner import run_passes
    from accelkit.pipeline import copy_graph
    from accelkit.precision import Int8, as_precision
    from accelkit.progress import Progress
    from accelkit.quantization.partial_runs import Runs
    from accelkit.quantization.qat import unwrapped
    from accelkit.quantization.sites import find_sites
    from accelkit.tensor_hash import each_tensor_read_once
    from accelkit.twin import eval_twin, preserved, require_usable

    model, precision, calibration = unwrapped(model, precision, calibration)
    wanted = as_precision(precision)
    if not isinstance(wanted, Int8):
        raise InputError(f"sensitivity is of int8, not {wanted}: precision='int8' or an Int8 value")
    if not isinstance(limit, int) or limit < 1:
        raise InputError(f"limit={limit!r}: a number of rows, at least 1")
    if wanted.takes_calibration and calibration is None:
        raise InputError(f"{wanted} needs calibration data: sensitivity(..., calibration=batches)")
    args, kwargs = canonical_example(example_inputs)
    shown = Progress(progress)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration.collect(
            model, calibration, example_inputs, smooth=wanted.smooth, dynamic_shapes=dynamic_shapes, keep=wanted.keep,
            progress=progress,
        )  # fmt: skip
    with shown.running(f"sensitivity of {type(model).__name__}"), each_tensor_read_once(), torch.no_grad():
        program = capture(eval_twin(require_usable(model)), args, kwargs, dynamic_shapes)
        if random := [n.name for n in program.graph.graph.nodes if graphs.is_random(n)]:
            raise InputError(
                f"{type(model).__name__} is random by itself ({', '.join(random[:3])}): errors mean nothing"
            )
        graph = copy_graph(program.graph)
        passes, _ = resolve_passes(None, wanted)
        run_passes(graph, itertools.takewhile(lambda one: not one.calibrates, passes))
        (quantise,) = (one for one in passes if one.calibrates)
        whole, names, refusals = _quantised(graph, quantise, calibration)
        if not names:
            listed = "; ".join(f"{r.node}: {r.reason}" for r in refusals) or "it has no layers that a scheme knows"
            raise InputError(f"{wanted} quantises nothing of {type(model).__name__}: {listed}")
        sites = find_sites(graph)
        groups = _groups(names, limit)
        variants = [whole]
        for number, group in enumerate(groups, 1):
            shown.say(f"layer {number} of {len(groups)}")
            variants.append(_quantised(graph, dataclasses.replace(quantise, only=group), calibration)[0])  # type: ignore[type-var]
        runs = Runs(graph, variants)
        errors: list[list[float]] = [[] for _ in variants]
        given = as_calibration([example_inputs] if batches is None else batches)
        for inputs in given.through(program, program, {}):
            with preserved(graph) if runs.whole_only else contextlib.nullcontext():
                for index, results, exact in runs.of(inputs):
                    shown.say(f"batch {given.used}, {index} of {len(groups)}")
                    errors[index].append(_error(results, exact, metric, program.signature))
    rows = [
        LayerSensitivity(
            group,
            tuple(next(s.kind for s in sites if s.name == name) for name in group),
            tuple(_pattern(name, sites) for name in group),
            _mean(found),
        )
        for group, found in zip(groups, errors[1:], strict=True)
    ]
    rows.sort(key=lambda row: -row.error)
    measure = "relative error of the outputs" if metric is None else getattr(metric, "__name__", "metric")
    return Sensitivity(str(wanted), tuple(rows), _mean(errors[0]), measure, given.used, len(variants) * given.used)


def _quantised(
    graph: fx.GraphModule, quantise: Any, calibration: Calibration | None
) -> tuple[fx.GraphModule, list[str], Sequence[Any]]:
    """(a copy, what was quantised of it, what was not)."""
    from accelkit.pipeline import copy_graph
    from accelkit.quantization.collect import Source

    copied = copy_graph(graph)
    Source(copied, None, calibration).leave()
    result = quantise.run(copied)
    names = [name for name in result.rewrites if not name.endswith(" (smoothed)")]
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied, names, result.refusals


def _groups(names: Sequence[str], limit: int) -> list[tuple[str, ...]]:
    """One layer a group, where there are not too many; else those of one module, ever further out."""
    depth = max(name.count(".") for name in names) + 1
    while True:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(groups) <= limit:
            return [tuple(group) for group in groups.values()]
        if depth == 1:
            break
        depth -= 1
    size = math.ceil(len(names) / limit)
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]


def _pattern(name: str, sites: Sequence[Site]) -> str:
    """The name, where it is no module in which other sites lie as well."""
    (site,) = (s for s in sites if s.name == name)
    return name if not any(s.matches(name) for s in sites if s is not site) else f"{name}:{site.kind}"


def _error(results: Sequence[Any], exact: Sequence[Any], metric: Metric | None, signature: Any) -> float:
    from accelkit.accuracy import relative_error

    if metric is not None:
        return float(metric(signature.unflatten(results), signature.unflatten(exact)))
    return max(
        (
            relative_error(r, e)
            for r, e in zip(results, exact, strict=True)
            if isinstance(e, torch.Tensor) and e.is_floating_point()
        ),
        default=0.0,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _kind(row: LayerSensitivity) -> str:
    return row.kinds[0] if len(set(row.kinds)) == 1 else "several"


def _shared(names: Sequence[str]) -> str:
    parts = [name.split(".") for name in names]
    common = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in common)


__all__ = ["LayerSensitivity", "Sensitivity", "sensitivity"]
