"""A real sentence encoder on real text: the original beside accelkit's targets, with proof that they agree.

all-MiniLM-L6-v2 with its real weights embeds 64 English sentences of 3 to 58 words: latency of single sentences,
throughput of batches of 32, error against float64, the nearest sentences found, what was done to the model; then it is
saved, loaded in a new process, and gives the same embeddings there. All numbers are measured in this run. Exit code 1
if a check fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import accelkit
from accelkit.accuracy import relative_error
from accelkit.cli import sentences as texts
from accelkit.cli.output import complain, positive, print_table
from accelkit.cli.targets import missing
from accelkit.compiled import CompiledModel
from accelkit.errors import AccelkitError
from accelkit.measure import Timing, interleaved, machine_sentence
from accelkit.progress import Progress

HELP = "a real model on real text: before, after, and proof that they agree"
EXAMPLES = ("accelkit demo", "accelkit demo --seconds 2 --quiet")

CANDIDATES = (("onnxruntime", "fp32"), ("inductor", "fp32"), ("inductor", "bf16"))
WITHOUT_EXTRAS = ("eager", "fp32")
SINGLES, LARGE_BATCH = 12, 32
"""Single sentences timed (spread evenly over the lengths), and the batch size of the throughput."""
EXAMPLE_BATCH = 4
"""Sentences that the model is captured and checked with: any number will do, since batch and length are dynamic."""

ALLOWED_ERROR = {"fp32": 1e-5, "bf16": 5e-2}
"""fp32: rounding order only. bf16: 8 bits a value through six layers, 1e-2 measured, with room for other processors."""
EQUAL_NEIGHBOURS = {"fp32": 1.0, "bf16": 0.9}
"""Share of the top-3 neighbours that must be the same; bf16 may swap neighbours that are about equally near."""
SAME_AFTER_LOADING = 1e-5
"""Largest difference of a component of the unit vectors, between the process that saved and the one that loaded."""


@dataclass
class Candidate:
    """One way to run the encoder, and what was measured of it."""

    name: str
    precision: str
    model: Callable[..., Any]
    build_seconds: float | None = None
    embeddings: torch.Tensor | None = None
    error: float = float("nan")
    equal_neighbours: float = float("nan")
    single: Timing | None = None
    large: Timing | None = None


class Checks:
    """What has to hold; each is printed with its measured number."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, holds: bool, sentence: str) -> None:
        self.failed += not holds
        print(f"  {'ok    ' if holds else 'FAILED'}  {sentence}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=positive(float), default=4.0, help="time for each of the two measurements (default: 4)"
    )
    parser.add_argument("--target", choices=[n for n, _ in (*CANDIDATES, WITHOUT_EXTRAS)], help="only this target")
    parser.add_argument("--no-cache", action="store_true", help="compile anew and keep nothing in the engine cache")


def run(options: argparse.Namespace) -> int:
    """The demo, from loading the model to the new process."""
    started = time.perf_counter()
    sentences = texts.load_sentences()
    encoder, tokenize = texts.load_encoder()
    lengths = sorted(len(sentence.split()) for sentence in sentences)
    print(f"all-MiniLM-L6-v2 on {machine_sentence()}, {torch.get_num_threads()} threads")
    print(f"{len(sentences)} sentences of {lengths[0]} to {lengths[-1]} words")
    inputs = {size: texts.batches(sentences, tokenize, size) for size in (1, LARGE_BATCH)}

    progress = Progress(not options.quiet)
    checks = Checks()
    with progress.running("accelkit demo"):
        example = tokenize(sentences[:EXAMPLE_BATCH])
        candidates = [Candidate("original", "fp32", encoder), *_build_all(options, encoder, example, progress, checks)]
        progress.say("measuring")
        _measure(candidates, sentences, inputs, options.seconds)
        truth = texts.embed(copy.deepcopy(encoder).double(), inputs[1])
        _compare(candidates, truth, inputs[1])
    _print_numbers(candidates)
    _print_neighbours(candidates, sentences)

    print("\nChecks")
    for candidate in candidates[1:]:
        _check(checks, candidate)
    best = candidates[1]
    assert isinstance(best.model, CompiledModel)
    _check_new_process(checks, best, inputs[1])
    print(f"\nWhat was done to the model for {best.name} {best.precision}\n{best.model.report()}")
    verdict = f"{checks.failed} checks FAILED" if checks.failed else "All checks hold"
    print(f"\n{verdict}; {time.perf_counter() - started:.0f} s in all")
    return 1 if checks.failed else 0


# --- building


def _build_all(
    options: argparse.Namespace, encoder: torch.nn.Module, example: texts.TensorDict, progress: Progress, checks: Checks
) -> list[Candidate]:
    wanted = [pair for pair in (*CANDIDATES, WITHOUT_EXTRAS) if options.target in (None, pair[0])]
    built: list[Candidate] = []
    for target, precision in wanted:
        if (target, precision) == WITHOUT_EXTRAS and built:
            continue  # it is the optimised graph in PyTorch: shown where nothing faster is installed
        if (reason := missing(target)) is not None:
            complain(f"skipped: target {target}: {reason}")
            continue
        progress.say(f"building {target} {precision}")
        started = time.perf_counter()
        try:
            fast = accelkit.optimize(
                encoder, example, target=target, precision=precision, dynamic_shapes=texts.dynamic_shapes(),
                cache=not options.no_cache, progress=False,
            )  # fmt: skip
        except AccelkitError as error:
            checks(False, f"{target} {precision} is built: {error}")
            continue
        built.append(Candidate(target, precision, fast, time.perf_counter() - started))
    if not built:
        raise AccelkitError("the demo has no target to show: see `accelkit targets`")
    return built


# --- measuring


def _measure(
    candidates: Sequence[Candidate], sentences: Sequence[str], inputs: dict[int, list[texts.TensorDict]], seconds: float
) -> None:
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    step = (len(sentences) - 1) / (SINGLES - 1)
    singles = [inputs[1][by_length[round(step * i)]] for i in range(SINGLES)]

    def timings(batches: Sequence[texts.TensorDict]) -> dict[str, Timing]:
        calls = {str(i): (lambda model=c.model: texts.embed(model, batches)) for i, c in enumerate(candidates)}
        return interleaved(calls, seconds=seconds)

    for (_, single), (_, large), candidate in zip(
        timings(singles).items(), timings(inputs[LARGE_BATCH]).items(), candidates, strict=True
    ):
        candidate.single, candidate.large = single, large


def _compare(candidates: Sequence[Candidate], truth: torch.Tensor, inputs: Sequence[texts.TensorDict]) -> None:
    original = candidates[0]
    for candidate in candidates:
        candidate.embeddings = texts.embed(candidate.model, inputs)
        candidate.error = relative_error(candidate.embeddings, truth)
        assert original.embeddings is not None  # the original is the first
        candidate.equal_neighbours = texts.share_of_equal_neighbours(
            texts.nearest(original.embeddings), texts.nearest(candidate.embeddings)
        )


# --- telling


def _print_numbers(candidates: Sequence[Candidate]) -> None:
    original = candidates[0]
    assert original.single is not None
    assert original.large is not None
    total = len(original.embeddings) if original.embeddings is not None else 0
    rows = []
    for candidate in candidates:
        single, large = candidate.single, candidate.large
        assert single is not None
        assert large is not None
        rows.append(
            (
                f"{candidate.name} {candidate.precision}",
                f"{single.median_ms / SINGLES:.2f}",
                f"{original.single.median_ms / single.median_ms:.2f}x",
                f"{total * 1e3 / large.median_ms:.0f}",
                f"{original.large.median_ms / large.median_ms:.2f}x",
                f"{candidate.error:.1e}",
                f"{candidate.equal_neighbours:.1%}",
                None if candidate.build_seconds is None else f"{candidate.build_seconds:.1f}",
            )
        )
    print()
    columns = (
        "", "batch 1, ms", "speed-up", f"batch {LARGE_BATCH}, sentences/s", "speed-up", "error (float64)",
        "same top-3", "build, s",
    )  # fmt: skip
    print_table(columns, rows)
    rounds = f"{original.single.rounds} and {original.large.rounds}"
    print(f"medians of {rounds} interleaved rounds, tokenising not included")


def _print_neighbours(candidates: Sequence[Candidate], sentences: Sequence[str], examples: int = 4) -> None:
    found = [texts.nearest(c.embeddings) for c in candidates if c.embeddings is not None]
    print("\nNearest sentences")
    for index in range(2, len(sentences), len(sentences) // examples):
        print(f"  {_short(sentences[index])}")
        for rank, neighbour in enumerate(found[0][index].tolist()):
            agree = sum(neighbour in other[index].tolist() for other in found[1:])
            print(f"    {rank + 1}. {_short(sentences[neighbour])}  [found by {agree} of {len(found) - 1}]")


def _short(sentence: str, width: int = 84) -> str:
    return sentence if len(sentence) <= width else f"{sentence[: width - 3].rsplit(' ', 1)[0]}..."


# --- checking


def _check(checks: Checks, candidate: Candidate) -> None:
    name = f"{candidate.name} {candidate.precision}"
    allowed, equal = ALLOWED_ERROR[candidate.precision], EQUAL_NEIGHBOURS[candidate.precision]
    checks(candidate.error <= allowed, f"{name}: error {candidate.error:.1e} against float64, at most {allowed:.0e}")
    checks(
        candidate.equal_neighbours >= equal,
        f"{name}: {candidate.equal_neighbours:.1%} of the top-3 neighbours are the original's, at least {equal:.0%}",
    )
    assert isinstance(candidate.model, CompiledModel)
    stats = candidate.model.stats()
    checks(
        stats["calls"] > 0 and stats["fallback"] == 0,
        f"{name}: {stats['calls']} calls of all batch sizes and lengths, {stats['fallback']} of them on the fallback",
    )


def _check_new_process(checks: Checks, candidate: Candidate, inputs: Sequence[texts.TensorDict]) -> None:
    assert isinstance(candidate.model, CompiledModel)
    assert candidate.embeddings is not None
    with tempfile.TemporaryDirectory(prefix="accelkit-demo-") as folder:
        model, given, result = (Path(folder) / name for name in ("minilm.accel", "inputs.npz", "embeddings.npz"))
        candidate.model.save(model)
        arrays = {f"{i}/{name}": t.numpy() for i, batch in enumerate(inputs) for name, t in batch.items()}
        np.savez(given, **arrays)  # type: ignore[arg-type]  # numpy's stubs take the names for its own flag
        started = time.perf_counter()
        command = [sys.executable, "-m", "accelkit.cli.demo_child", str(model), str(given), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            checks(False, f"a new process loads the saved model; exit code {done.returncode}: {reason}")
            return
        told = json.loads(done.stdout.splitlines()[-1])
        with np.load(result, allow_pickle=False) as loaded:
            difference = float((torch.from_numpy(loaded["embeddings"]) - candidate.embeddings).abs().max())
        size = model.stat().st_size / 2**20
    name, load_seconds = f"{candidate.name} {candidate.precision}", told["load_seconds"]
    checks(
        difference <= SAME_AFTER_LOADING,
        f"a new process loads {name} ({size:.0f} MiB) in {load_seconds:.1f} s ({seconds:.1f} s with Python's start and "
        f"the calls): embeddings differ by at most {difference:.1e}, allowed {SAME_AFTER_LOADING:.0e}",
    )
    stats, in_file = told["stats"], told["engines_in_file"]
    checks(
        stats["fallback"] == 0 and not told["transformers"],
        f"there: {stats['calls']} calls, {stats['fallback']} on the fallback; transformers "
        f"{'was' if told['transformers'] else 'not'} imported",
    )
    if in_file:  # inductor and eager keep none: they are made anew from the program in the file
        origins = ", ".join(told["origins"])
        checks(origins == "artifact", f"there: {in_file} engine(s) in the file, used were engines from: {origins}")
