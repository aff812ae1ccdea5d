"""Runs an experiment: for each batch size all candidates are built, checked against float64 and timed in interleaved rounds.

    main([Experiment("fx2ait_encoder", "...", "encoder-block", batches=(1, 8))], __doc__, arguments)

A candidate that cannot be built or run becomes a row with the reason. The results file is written anew after every batch
size, so that a run that is cut short leaves what it has measured; so are parts of it, see parts.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import by_hand
import parts
import torch
from floors import Ceilings, floor_of, measure_ceilings, work_of
from gpu_models import subject
from gpu_peers import DTYPES, PEERS, SETTLE, Call, Case, Peer, strict_fp32, with_tf32
from swapped import masked_attention

from accelkit.measure import Timing, interleaved, write_results
from accelkit.models import Inputs

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("triton", "transformers", "xformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt")
NO_TIME = "the run's time budget"
ENDED = "the process ended while this was built or run"
BASE = "eager"
Clock = Callable[[Mapping[str, Call], argparse.Namespace], dict[str, Timing]]


def events(calls: Mapping[str, Call], options: argparse.Namespace) -> dict[str, Timing]:
    """Interleaved rounds by CUDA events."""
    limits: dict[str, Any] = {"min_rounds": options.rounds, "max_rounds": options.rounds} if options.rounds else {}
    return interleaved(calls, seconds=options.seconds, warmup=2, device=options.device, **limits)


@dataclass(frozen=True)
class Experiment:
    """One results file: a model over batch sizes.

    Attributes:
        name: of the results file. title: its heading.
        model: see gpu_models.
        batches, quick: batch sizes of a full and of a quick run.
        precisions: of a full run; a quick one has the last alone.
        peers: candidates by key, in the tables' order.
        pattern: images of this many patches a side -> boolean [tokens, tokens], for the sparse candidates.
        clock: calls -> timings.
        also: other tables of the same model and peers; a part's rows are theirs too, measured once.
    """

    name: str
    title: str
    model: str
    batches: tuple[int, ...]
    quick: tuple[int, ...]
    precisions: tuple[str, ...] = ("fp32", "tf32", "fp16")
    peers: Mapping[str, Peer] = field(default_factory=lambda: PEERS)
    pattern: Callable[[int], torch.Tensor] | None = None
    clock: Clock = events
    also: tuple[Experiment, ...] = ()


def main(experiments: Sequence[Experiment], doc: str, arguments: Sequence[str] | None = None) -> int:
    """Run those that the command line asks for; each writes `<output>/<machine>/<name>.json`. Returns the exit code."""
    options = parse(experiments, doc, arguments)
    late = 0
    for experiment in experiments:
        if experiment.model in options.model:
            run = Run(experiment, options)
            print(f"wrote {run.write()}")
            late += sum(str(row["failure"]).startswith(NO_TIME) for row in run.rows)
    return parts.incomplete(late)


def parse(experiments: Sequence[Experiment], doc: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    models = [e.model for e in experiments]
    known = dict.fromkeys(key for e in experiments for key in e.peers)
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--quick", action="store_true", help="few batch sizes, fp16 alone; recorded like a full run")
    parser.add_argument("--tiny", action="store_true", help="tiny models, one round: does it work? Nothing is recorded")
    parser.add_argument("--model", type=words, default=models, help=f"of {', '.join(models)} (default: all)")
    parser.add_argument("--batch", type=lambda text: tuple(map(int, text.split(","))), help="such as 1,8")
    parser.add_argument("--precision", type=words, help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--peers", type=words, help=f"of {', '.join(known)}; +NAME adds one to the default ones")
    parser.add_argument("--target", default="fastertransformer", help="accelkit's (default: fastertransformer)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="timed rounds of a batch size (default: 4; 2 with --quick)")
    parser.add_argument("--rounds", type=int, help="exactly this many rounds")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing more is built")
    parser.add_argument("--own-stream", action="store_true", help="not on CUDA's default stream (TensorRT waits there)")
    parser.add_argument("--cache", action="store_true", help="accelkit may take engines from its cache")
    parts.add_options(parser)
    parser.add_argument("--output", type=Path, help="results folder (default: benchmarks/results; --tiny: temporary)")
    options = parser.parse_args(arguments)
    for given, names in ((options.model, models), (options.precision or (), DTYPES), (options.peers or (), known)):
        if unknown := [n for n in given if n.removeprefix("+") not in names]:
            parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(names)}")
    options.deadline = time.perf_counter() + options.budget
    options.rounds = options.rounds or (1 if options.tiny else None)
    options.seconds = options.seconds or (2.0 if options.quick else 4.0)
    options.output = options.output or (Path(tempfile.mkdtemp(prefix="accelkit-tiny-")) if options.tiny else RESULTS)
    return options


class Run:
    """One experiment on this machine."""

    def __init__(self, experiment: Experiment, options: argparse.Namespace) -> None:
        self.experiment, self.options = experiment, options
        self.precisions = tuple(
            options.precision or experiment.precisions[-1 if options.quick or options.tiny else 0 :]
        )
        self.batches = options.batch or (experiment.quick if options.quick or options.tiny else experiment.batches)
        strict_fp32()
        self.spec = subject(experiment.model, options.tiny)
        self.model = self.spec.make().to(options.device)
        self.models = {d: self._narrow(d) for d in dict.fromkeys(DTYPES[p] for p in self.precisions)}
        self.ceilings: Ceilings = measure_ceilings(options.device, self.precisions, tiny=options.tiny)
        self.pattern = self._pattern()
        self.rows: list[dict[str, Any]] = []
        self.counted: dict[int | None, int] = {}

    def _narrow(self, dtype: torch.dtype) -> torch.nn.Module:
        return by_hand.cast(self.model, (), dtype)[0]

    def _pattern(self) -> torch.Tensor | None:
        if self.experiment.pattern is None:
            return None
        (image,) = by_hand.tensors_of(self.spec.make_inputs(1))
        return self.experiment.pattern(image.shape[-1] // 16)

    def write(self) -> Path:
        """Measure every batch size, writing what there is after each; then the candidates that may end the process."""
        for batch in self.batches:
            self.rows += self.measure(batch)
            path = self._write()
        for batch in self.batches:
            before = self.rows
            lost = [
                {**_row(batch, precision, key), "failure": ENDED}
                for precision in self.precisions
                for key in self.peers(precision, risky=True)
            ]
            if lost:
                self._keep([*before, *lost])
                self._keep([*before, *self.measure(batch, risky=True)])
        return path

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        known = list(self.experiment.peers)

        def place(row: dict[str, Any]) -> tuple[int, int, int]:
            return (
                self.batches.index(row["batch"]),
                self.precisions.index(row["precision"]),
                known.index(row["candidate"]),
            )

        self.rows = sorted(rows, key=place)
        self._write()

    def _write(self) -> Path:
        if self.options.part:
            for other in self.experiment.also:
                self._write_as(other)
        return self._write_as(self.experiment)

    def _write_as(self, e: Experiment) -> Path:
        options = self.options
        facts = {
            "model": e.model, "description": self.spec.description, "device": options.device, "target": options.target,
            "own_stream": options.own_stream, "quick": options.quick, "tiny": options.tiny,
            "ceilings": self.ceilings.to_json(), "labels": {key: peer.label for key, peer in e.peers.items()},
            "sparse": [key for key, peer in e.peers.items() if peer.sparse], **parts.facts(options),
        }  # fmt: skip
        gpu_title = {"gpu_title": f"{e.title} (tiny: no measurement)" if options.tiny else e.title}
        name = parts.file_name(e.name, options)
        return write_results(name, self.rows, options.output, packages=PACKAGES, **gpu_title, **facts)

    def peers(self, precision: str, risky: bool = False) -> dict[str, Peer]:
        """Those of the run in a precision, risky or not; a peer that was asked for by name has every precision."""
        known, given = self.experiment.peers, self.options.peers or []
        named = [key for key in given if not key.startswith("+")]
        added = [key[1:] for key in given if key.startswith("+")]
        wide = DTYPES[precision] is torch.float32
        usual = {k for k, p in known.items() if p.default and (p.wide or not wide)}
        chosen = set(named) if named else usual
        return {key: peer for key, peer in known.items() if (key in chosen or key in added) and peer.risky == risky}

    def measure(self, batch: int, risky: bool = False) -> list[dict[str, Any]]:
        """All candidates of all precisions at one batch size; the risky ones beside the base, whose own row is there already."""
        with torch.no_grad(), by_hand.quiet(), _stream(self.options):
            inputs = _moved(self.spec.make_inputs(batch), self.options.device)
            kept = _kept_tokens(inputs)
            truths = self._truths(inputs)
            rows: dict[str, dict[str, Any]] = {}
            calls: dict[str, Call] = {}
            for precision in self.precisions:
                row_of_all = self._floor(inputs, kept, precision)
                case = self._case(inputs, precision)
                chosen = self.peers(precision, risky)
                if risky and chosen:
                    chosen |= {key: peer for key, peer in self.peers(precision).items() if key == BASE}
                rows |= {f"{key} {precision}": _row(batch, precision, key) for key in chosen}
                for key, peer in sorted(chosen.items(), key=lambda item: item[1].slow):  # a spent budget costs the slow
                    name = f"{key} {precision}"
                    row = rows[name]
                    self._say(f"batch {batch}: building {name}")
                    call = self._build(peer, case, truths[peer.sparse], kept, row)
                    row.update({} if peer.sparse else row_of_all)
                    if call is not None:
                        calls[name] = call
            self._time({name: calls[name] for name in rows if name in calls}, rows, batch)
            calls.clear()
        self._clean()
        return [row for row in rows.values() if not (risky and row["candidate"] == BASE)]

    def _case(self, inputs: Inputs, precision: str) -> Case:
        _, narrow = by_hand.cast(torch.nn.Identity(), inputs, DTYPES[precision])
        model, options = self.models[DTYPES[precision]], self.options
        return Case(model, narrow, precision, options.target, options.cache, self.pattern, (self.model, inputs))

    def _floor(self, inputs: Inputs, kept: torch.Tensor | None, precision: str) -> dict[str, Any]:
        lengths = None if kept is None else kept.sum(1).tolist()
        work = work_of(self.model, inputs, precision, lengths, self.counted)
        floor = floor_of(work, self.ceilings, precision)
        return {"floor_ms": floor.ms, "floor_bound": floor.bound}

    def _truths(self, inputs: Inputs) -> dict[bool, list[torch.Tensor]]:
        """Float64 outputs: of the model (False) and of the model with the sparse pattern (True)."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            truth = by_hand.float64_outputs(self.model, inputs)
            if self.pattern is None:
                return {False: truth, True: truth}
            return {False: truth, True: by_hand.float64_outputs(masked_attention(self.model, self.pattern), inputs)}
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _build(
        self, peer: Peer, case: Case, truth: list[torch.Tensor], kept: torch.Tensor | None, row: dict[str, Any]
    ) -> Call | None:
        """The candidate's call, or None with the reason in the row."""
        if time.perf_counter() > self.options.deadline:
            row["failure"] = f"{NO_TIME} of {self.options.budget:g} s was used up"
            return None
        if self.options.device == "cuda":
            torch.cuda.empty_cache()  # what the candidate before left, or this one would seem to need less
        before, started = _bytes_in_use(self.options.device), time.perf_counter()
        try:
            build = with_tf32(case.precision, lambda: peer.build(case))
            made = build()
            row |= getattr(made, "facts", {})
            call = with_tf32(case.precision, made)
            for _ in range(1 if self.options.tiny else SETTLE):
                call()
            _synchronize(self.options.device)
            row["build_seconds"] = round(time.perf_counter() - started, 3)
            row["error"] = error(by_hand.tensors_of(call()), truth, kept)
            self._clean(compiled=False)  # what only the build used goes back; what a call needs, it takes again
            call()
            _synchronize(self.options.device)
        except Exception as problem:  # noqa: BLE001 - a candidate that cannot take the model is a result
            row["failure"] = reason(problem)
            del problem  # its traceback holds what the build had taken
            self._clean(compiled=False)
            return None
        after = _bytes_in_use(self.options.device)
        row["memory_bytes"] = None if before is None or after is None else after - before
        return call

    def _time(self, calls: Mapping[str, Call], rows: Mapping[str, dict[str, Any]], batch: int) -> None:
        if not calls:
            return
        self._say(f"batch {batch}: timing {len(calls)} candidates")
        try:
            timings = self.experiment.clock(calls, self.options)
        except Exception as problem:  # noqa: BLE001 - one candidate's failure here is told in the rows of all
            for name in calls:
                rows[name]["failure"] = f"the timed rounds stopped: {reason(problem)}"
            return
        for name, timing in timings.items():
            row = rows[name]
            row |= {**timing.to_json(), "items_per_second": round(batch * 1e3 / timing.median_ms, 3)}
            plain = timings.get(f"{BASE} {row['precision']}")
            row["speedup"] = None if plain is None else round(plain.median_ms / timing.median_ms, 4)
            row["share_of_floor"] = round(row["floor_ms"] / timing.median_ms, 4) if "floor_ms" in row else None

    def _clean(self, compiled: bool = True) -> None:
        """Memory that nothing uses goes back to the GPU, so that what a candidate takes can be told."""
        if compiled:
            torch._dynamo.reset()
        if self.options.device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _say(self, text: str) -> None:
        print(f"{self.experiment.name}: {text}", file=sys.stderr, flush=True)


def _row(batch: int, precision: str, key: str) -> dict[str, Any]:
    return {"batch": batch, "precision": precision, "candidate": key, "failure": None}


def error(outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], kept: torch.Tensor | None) -> float:
    """Largest relative error (Frobenius norm) over the outputs; of padded rows the tokens that are text count.

    Raises:
        RuntimeError: another number of outputs, or other shapes.
    """
    if [o.shape for o in outputs] != [t.shape for t in truth]:
        raise RuntimeError(f"outputs {[tuple(o.shape) for o in outputs]}, not {[tuple(t.shape) for t in truth]}")
    worst = 0.0
    for output, right in zip(outputs, truth, strict=True):
        tokens = kept is not None and right.ndim > 2 and right.shape[:2] == kept.shape
        ours, wanted = (t[kept] if tokens else t for t in (output.double(), right))
        difference = float((ours - wanted).norm() / wanted.norm())
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def reason(problem: BaseException) -> str:
    """An exception for a table's footnote: its kind and its first line, at most 300 characters."""
    first = next((line for line in str(problem).splitlines() if line.strip()), "")
    return f"{type(problem).__name__}: {first}"[:300]


def _kept_tokens(inputs: Inputs) -> torch.Tensor | None:
    """The mask of tokens that are text, where some are not."""
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    return None if mask is None or bool(mask.all()) else mask.bool()


def _moved(inputs: Inputs, device: str) -> Inputs:
    if isinstance(inputs, dict):
        return {name: t.to(device) for name, t in inputs.items()}
    return tuple(t.to(device) for t in inputs)


def _bytes_in_use(device: str) -> int | None:
    """The GPU's memory in use, as the driver sees it: PyTorch's, other libraries' and CUDA graphs' alike."""
    if device != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def _stream(options: argparse.Namespace) -> AbstractContextManager[Any]:
    """A stream of the run's own where that is asked for: TensorRT waits for the GPU in every call on the default stream."""
    return torch.cuda.stream(torch.cuda.Stream()) if options.own_stream and options.device == "cuda" else nullcontext()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
