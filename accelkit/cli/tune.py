"""Measure, on this GPU, which kernel and configuration each fused operator of a model runs with, and keep the choices.

What FasterTransformer's `vit_gemm` did: ahead of time, in a file that every later process on the same GPU, driver and versions
finds (in the cache folder; another: the environment's ACCELKIT_CACHE_DIR). Without tuning, rules decide.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from accelkit.cli.bench import on_device
from accelkit.cli.optimize import require_inputs
from accelkit.cli.output import batch_sizes, complain, counted, positive, print_table
from accelkit.errors import BackendUnavailableError
from accelkit.models import MODELS, load_model
from accelkit.precision import Precision, as_precision
from accelkit.tf32 import tensor_core_products
from accelkit.tuning import files
from accelkit.tuning.measuring import Task
from accelkit.tuning.tuner import Outcome, Progress, shown

HELP = "measure which kernels a model's operators run with on this GPU"
EXAMPLES = (
    "accelkit tune vit-b16-384 --batch 1 8 32 --precision fp16 --budget 120",
    "accelkit tune --list",
    "accelkit tune --clear",
)
COLUMNS = ("problem", "default us", "chosen us", "gain", "chosen")
LIST_COLUMNS = (*COLUMNS, "measured")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    names = ", ".join(MODELS)
    what.add_argument("model", metavar="MODEL", nargs="?", help=f"{names}, or your own: package.module:callable")
    what.add_argument("--list", action="store_true", help="show what is known, for every GPU and set of versions")
    what.add_argument("--clear", action="store_true", help="forget it")
    parser.add_argument(
        "--batch", type=batch_sizes, nargs="+", default=[[1]], metavar="N", help="batch sizes (default: 1)"
    )
    parser.add_argument("--precision", default="fp16", help="fp32, tf32, bf16 or fp16 (default: fp16)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the model runs (default: cuda where there is one)"
    )
    parser.add_argument(
        "--budget", type=positive(float), default=120.0, metavar="SECONDS", help="time to take (default: 120)"
    )
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")


def run(options: argparse.Namespace) -> int:
    """Tune and print the table, or do what is asked."""
    if options.list:
        _list()
        return 0
    if options.clear:
        print(f"removed {counted(files.clear(), 'file')} of tuned choices from {files.folder()}")
        return 0
    precision = as_precision(options.precision)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        print("nothing to tune on a CPU: fused operators run their plain definitions there")
        return 0
    if not torch.cuda.is_available():
        raise BackendUnavailableError("--device cuda: PyTorch sees no CUDA device here")
    batches = [size for sizes in options.batch for size in sizes]
    gpu = torch.device("cuda", torch.cuda.current_device())
    outcome = tune_model(options.model, batches, precision, gpu, options.budget, options.again, not options.quiet)
    _tell(outcome, options.model)
    print(f"kept in {files.path_of(gpu)}")
    return 0


def tune_model(
    name: str, batches: list[int], precision: Precision, device: torch.device, seconds: float, again: bool, bar: bool
) -> Outcome:
    """Tune all problems of a model at these batch sizes."""
    from accelkit.backends.fastertransformer.tune import tasks_of_model, tune_tasks

    tf32 = tensor_core_products() if precision.name == "tf32" else contextlib.nullcontext()
    with tf32, progress_bar(bar) as progress:
        tasks: list[Task] = []
        for number, batch in enumerate(batches):
            progress(number, len(batches), f"looking at {name}, batch {batch}")
            model, inputs = load_model(name, batch)
            given = on_device(require_inputs(name, inputs), str(device))
            tasks += tasks_of_model(model.eval().to(device), given, precision)
            del model, given
        torch.cuda.empty_cache()
        return tune_tasks(tasks, seconds, device, progress, again)


@contextlib.contextmanager
def progress_bar(wanted: bool) -> Iterator[Progress]:
    """A progress bar on a terminal (rich); silent elsewhere."""
    if not wanted or not sys.stderr.isatty():
        yield lambda done, total, words: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield lambda done, total, words: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("", total=None)
        yield lambda done, total, words: bar.update(line, completed=done, total=total, description=words)


def _tell(outcome: Outcome, title: str) -> None:
    rows = [
        (str(r.task), _microseconds(r.default_ms), _microseconds(r.choice_ms), f"{r.gain:.2f}x", shown(r.choice))
        for r in sorted(outcome.results, key=lambda r: str(r.task))
    ]
    if rows:
        print_table(COLUMNS, rows, title)
    if outcome.known:
        print(f"{counted(len(outcome.known), 'problem')} known from before; --again measures anew")
    elif not rows and not outcome.left:
        print(f"{title} has no fused operators with kernels to choose")
    for result in outcome.results:
        for config, why in result.wrong.items():
            complain(f"warning: {result.task}: {shown(config)} was passed over: {why}")
    for problem, why in outcome.left.items():
        complain(f"warning: not tuned: {problem}: {why}")


def _list() -> None:
    paths = files.paths()
    if not paths:
        print(f"nothing is tuned yet in {files.folder()}")
    for path in paths:
        entries = sorted(files.read(path), key=lambda entry: str(entry.get("what")))
        where = ", ".join(f"{name} {value}" for name, value in files.environment_in(path).items())
        print_table(LIST_COLUMNS, [_row(entry) for entry in entries], where)
        print(f"{counted(len(entries), 'problem')} in {path}")


def _row(entry: dict[str, Any]) -> tuple[Any, ...]:
    default, choice = entry.get("default_ms"), entry.get("choice_ms")
    gain = default / choice if isinstance(default, float) and isinstance(choice, float) and choice else None
    return (
        entry.get("what"), _microseconds(default), _microseconds(choice), None if gain is None else f"{gain:.2f}x",
        _words(entry.get("choice")), entry.get("measured"),
    )  # fmt: skip


def _words(choice: Any) -> str:
    if isinstance(choice, dict):
        return " ".join(word for value in choice.values() if (word := _words(value)))
    return "" if not choice or isinstance(choice, bool) else str(choice)


def _microseconds(ms: Any) -> str | None:
    return f"{ms * 1e3:.1f}" if isinstance(ms, (int, float)) else None
