"""Measure a model as it is beside accelkit's targets, in interleaved rounds.

One row for every target, precision and batch size that exists, and one for plain PyTorch in each precision (the model's
`to(dtype)`). Errors are relative, against a float64 run; a speed-up that is smaller than the spread is marked with ~.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import accelkit
from accelkit import plugins
from accelkit.cli.optimize import add_model, require_inputs
from accelkit.cli.output import batch_sizes, comma_list, complain, mebibytes, output_path, positive, print_table
from accelkit.cli.targets import available, missing
from accelkit.compiled import CompiledModel
from accelkit.errors import AccelkitError, BackendUnavailableError
from accelkit.measure import Timing, interleaved, peak_memory, provenance, write_json
from accelkit.models import Inputs, load_model
from accelkit.precision import as_precision
from accelkit.progress import Progress

HELP = "measure a model beside accelkit's targets"
EXAMPLES = (
    "accelkit bench bert-base-128 --target onnxruntime,inductor --precision fp32,bf16 --batch 1,8 --json bert.json",
    "accelkit bench my_package.models:make --target onnxruntime",
)
PYTORCH = "pytorch"
"""The name of the rows that are the model itself, uncompiled."""
COLUMNS = (
    "batch", "target", "precision", "median ms", "spread ms", "items/s", "speed-up", "error", "build s", "engine holds",
    "build peak",
)  # fmt: skip


@dataclass
class Row:
    """One measured candidate; None where a number could not be had.

    Attributes:
        timing: of a call; None where it could not be built.
        speedup: median of plain PyTorch in fp32 over this one's; `no_difference` where it is within the spread.
        error, allowed_error: largest relative error over the outputs, against float64, and what counts as right.
        build_seconds: optimize(), checks included.
        origin: whether its engines were compiled or came from the cache.
        engine_bytes: weights that the engines hold themselves, beside the model's own.
        build_peak_bytes: highest resident memory while it was built, beyond what was resident before.
        failure: why it could not be built.
    """

    batch: int
    target: str
    precision: str
    timing: Timing | None = None
    speedup: float | None = None
    no_difference: bool = False
    error: float | None = None
    allowed_error: float | None = None
    build_seconds: float | None = None
    origin: str | None = None
    engine_bytes: int | None = None
    build_peak_bytes: int | None = None
    failure: str | None = None

    @property
    def items_per_second(self) -> float | None:
        return None if self.timing is None else self.batch * 1e3 / self.timing.median_ms

    def to_json(self) -> dict[str, Any]:
        timing = None if self.timing is None else self.timing.to_json()
        return {**asdict(self), "timing": timing, "items_per_second": self.items_per_second}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--target", type=comma_list, metavar="A,B", help="targets (default: all that can run here)")
    parser.add_argument(
        "--precision", type=comma_list, default=["fp32"], metavar="A,B", help="precisions (default: fp32)"
    )
    parser.add_argument("--batch", type=batch_sizes, default=[1], metavar="N,M", help="batch sizes (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, machine and versions as JSON")
    parser.add_argument(
        "--seconds", type=positive(float), default=5.0, help="time for the timed rounds of one batch size (default: 5)"
    )
    parser.add_argument("--no-cache", action="store_true", help="compile anew and keep nothing in the engine cache")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON. Exit code 1 where something could not be built."""
    json_path = output_path(options.json)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("--device cuda: PyTorch sees no CUDA device here")
    pairs, skipped = choose_pairs(options.target, options.precision, options.device)
    for sentence in skipped:
        complain(f"skipped: {sentence}")
    rows: list[Row] = []
    progress = Progress(not options.quiet)
    with progress.running(f"bench {options.model}"):
        for batch in options.batch:
            rows += _measure_batch(options, batch, pairs, progress)
    print_table(COLUMNS, [_cells(row) for row in rows], options.model)
    for row in rows:
        if row.failure is not None:
            kind = "skipped" if row.target == PYTORCH else "error"
            complain(f"{kind}: {row.target} {row.precision} at batch {row.batch}: {row.failure}")
    if json_path is not None:
        facts = {"name": "bench", "model": options.model, **provenance("onnx", "onnxruntime", "transformers")}
        write_json(json_path, {**facts, "skipped": skipped, "rows": [row.to_json() for row in rows]})
        print(f"wrote {json_path}")
    return 1 if any(row.failure and row.target != PYTORCH for row in rows) else 0


def choose_pairs(
    targets: Sequence[str] | None, precisions: Sequence[str], device: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """The (target, precision) pairs to build, and a sentence on each that does not exist here.

    Raises:
        InputError: unknown target or precision.
        BackendUnavailableError: nothing is left.
    """
    for name in precisions:
        as_precision(name)
    pairs: list[tuple[str, str]] = []
    skipped: list[str] = []
    for target in targets if targets is not None else available():
        backend = plugins.find(plugins.BACKENDS, target)
        if (reason := missing(target)) is not None:
            skipped.append(f"target {target}: {reason}")
        elif device not in backend.devices:
            skipped.append(f"target {target} does not run on {device}")
        else:
            there = backend.precisions_on(device)
            pairs += [(target, p) for p in precisions if p in there]
            skipped += [f"target {target} has no {p}" for p in precisions if p not in there]
    if not pairs:
        raise BackendUnavailableError(f"nothing to measure: {'; '.join(skipped)}")
    return pairs, skipped


def _measure_batch(
    options: argparse.Namespace, batch: int, pairs: list[tuple[str, str]], progress: Progress
) -> list[Row]:
    model, inputs = load_model(options.model, batch)
    inputs = on_device(require_inputs(options.model, inputs), options.device)
    model = model.eval().to(options.device)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    rows = {(PYTORCH, p): Row(batch, PYTORCH, p) for p in dict.fromkeys(["fp32", *options.precision])}
    for precision in options.precision:
        call = plain_call(model, inputs, as_precision(precision).dtype)
        if call is None:
            rows[PYTORCH, precision].failure = f"plain PyTorch cannot run this model in {precision}"
        else:
            calls[PYTORCH, precision] = call
    calls.setdefault((PYTORCH, "fp32"), call_of(model, inputs))
    for target, precision in pairs:
        progress.say(f"building {target} {precision}, batch {batch}")
        rows[target, precision] = row = Row(batch, target, precision)
        fast = _build(row, model, inputs, not options.no_cache)
        if fast is not None:
            calls[target, precision] = call_of(fast, inputs)
            _learn_plain_error(rows[PYTORCH, precision], fast)
    progress.say(f"measuring {len(calls)} candidates, batch {batch}")
    names = {f"{t} {p}": (t, p) for t, p in calls}
    with torch.no_grad():
        timings = interleaved({n: calls[k] for n, k in names.items()}, seconds=options.seconds, device=options.device)
    for name, key in names.items():
        rows[key].timing = timings[name]
    compare_with_plain(list(rows.values()))
    calls.clear()
    gc.collect()
    return list(rows.values())


def _build(row: Row, model: nn.Module, inputs: Inputs, cache: bool) -> CompiledModel | None:
    started = time.perf_counter()
    try:
        with peak_memory() as memory:
            fast = accelkit.optimize(
                model, inputs, target=row.target, precision=row.precision, cache=cache, progress=False
            )
    except AccelkitError as error:
        row.failure = str(error)
        return None
    row.build_seconds = time.perf_counter() - started
    row.build_peak_bytes = max(0, memory.peak_bytes - memory.before_bytes)
    variants = fast.report().variants
    outputs = [output for variant in variants for output in variant.accuracy]
    if outputs:
        worst = max(outputs, key=lambda output: output.error)
        row.error, row.allowed_error = worst.error, worst.allowed
    pieces = [piece for variant in variants for piece in variant.pieces]
    row.origin = ", ".join(sorted({piece.origin for piece in pieces})) or None
    known_bytes = [piece.facts.memory_bytes for piece in pieces if piece.facts.memory_bytes is not None]
    row.engine_bytes = sum(known_bytes) if known_bytes else None
    return fast


def _learn_plain_error(row: Row, fast: CompiledModel) -> None:
    yardsticks = [o.yardstick for v in fast.report().variants for o in v.accuracy if o.yardstick is not None]
    if row.error is None and yardsticks:
        row.error = max(yardsticks)


def call_of(model: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    """The model bound to its inputs."""
    if isinstance(inputs, dict):
        return lambda: model(**inputs)
    return lambda: model(*inputs)


def on_device(inputs: Inputs, device: str) -> Inputs:
    """The inputs on another device."""
    moved: Inputs = pytree.tree_map(lambda tensor: tensor.to(device), inputs)
    return moved


def plain_call(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Callable[[], Any] | None:
    """A copy of the model cast by hand, as PyTorch's users do it; None where it cannot run so."""
    if dtype == torch.float32:
        return call_of(model, inputs)
    narrow = copy.deepcopy(model).to(dtype)
    cast: Inputs = pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    call = call_of(narrow, cast)
    try:
        with torch.no_grad():
            call()
    except RuntimeError:  # a dtype baked into the model's own code
        return None
    return call


def compare_with_plain(rows: Sequence[Row]) -> None:
    """Fill in the speed-ups over plain PyTorch in fp32 of the same batch size."""
    baselines = {r.batch: r.timing for r in rows if (r.target, r.precision) == (PYTORCH, "fp32")}
    for row in rows:
        baseline = baselines.get(row.batch)
        if row.timing is None or baseline is None:
            continue
        row.speedup = baseline.median_ms / row.timing.median_ms
        row.no_difference = not (row.timing.slower_than(baseline) or baseline.slower_than(row.timing))


def _cells(row: Row) -> list[str | None]:
    timing = row.timing
    speedup = None if row.speedup is None else f"{'~' if row.no_difference else ''}{row.speedup:.2f}x"
    return [
        str(row.batch),
        row.target,
        row.precision,
        None if timing is None else f"{timing.median_ms:.3g}",
        None if timing is None else f"{timing.spread_ms:.2g}",
        None if row.items_per_second is None else f"{row.items_per_second:.4g}",
        speedup,
        None if row.error is None else f"{row.error:.1e}",
        None if row.build_seconds is None else f"{row.build_seconds:.1f}",
        mebibytes(row.engine_bytes),
        mebibytes(row.build_peak_bytes),
    ]
