"""What building and calling a TensorRT engine costs through accelkit: build times, sizes, memory, overhead, refit.

    python benchmarks/tensorrt_build.py                                       # all models: tens of minutes on one GPU
    python benchmarks/tensorrt_build.py --model encoder-block --precision fp16
    python benchmarks/tensorrt_build.py --device cpu --tiny                   # the same code on tiny models

Steps, each in the order given and each with a reason in the row where it fails:
    cold      optimize() with empty caches and no build process: TensorRT's seconds and accelkit's own around them, engine size
    warm      the same model with other weights, the timing cache and the build process being what `cold` left
    cached    optimize() again, the engine from accelkit's cache; the GPU memory that it takes
    overhead  microseconds of the host a call, over execute_async_v3 on the same engine and bound buffers
    plain     the same without a CUDA graph (a build more)
    refit     a refittable engine (a build more): seconds for other weights, the error afterwards
    by_hand   the TorchScript export built by hand, without a timing cache and with the one that it left
Writes benchmarks/results/<machine>/tensorrt_build.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import by_hand
import parts
import torch
from gpu_models import subject
from gpu_peers import DTYPES, run, strict_fp32, with_tf32
from gpu_run import NO_TIME, PACKAGES, RESULTS, _bytes_in_use, _moved, error, reason
from tensorrt_by_hand import build, export, library
from tensorrt_ours import Optimized, optimized, raw_call
from torch import nn

from accelkit.backends.tensorrt.building import stop_workers
from accelkit.measure import write_results
from accelkit.models import Inputs

MODELS = {"encoder-block": (1, 64), "vit-b16-384": (1, 32), "bert-base-128": (1,), "vit-l16-384": (1,)}
STEPS = ("cold", "warm", "cached", "overhead", "plain", "refit", "by_hand")
CALLS = 300
TITLE = "TensorRT: builds, sizes, memory, calls"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    strict_fp32()
    rows: list[dict[str, Any]] = []
    for model in options.model:
        for batch in options.batch or MODELS[model]:
            for precision in options.precision:
                print(f"{model}, batch {batch}, {precision}", file=sys.stderr, flush=True)
                rows.append(measure(model, batch, precision, options))
                facts = {"build_title": TITLE, "tiny": options.tiny, **parts.facts(options)}
                name = parts.file_name("tensorrt_build", options)
                path = write_results(name, rows, options.output, packages=PACKAGES, **facts)
    print(f"wrote {path}")
    return parts.incomplete(sum(why.startswith(NO_TIME) for row in rows for why in row["failures"].values()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--model", type=words, default=tuple(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--batch", type=lambda text: tuple(map(int, text.split(","))), help="such as 1,32")
    parser.add_argument("--precision", type=words, default=("fp16",), help=f"of {', '.join(DTYPES)} (default: fp16)")
    parser.add_argument("--steps", type=words, default=STEPS, help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it work? Nothing is recorded")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no step begins")
    parser.add_argument("--output", type=Path, help="results folder (default: benchmarks/results; --tiny: temporary)")
    parts.add_options(parser)
    options = parser.parse_args(arguments)
    for given, known in ((options.model, MODELS), (options.precision, DTYPES), (options.steps, STEPS)):
        if unknown := [word for word in given if word not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    options.deadline = time.perf_counter() + options.budget
    options.output = options.output or (Path(tempfile.mkdtemp(prefix="accelkit-tiny-")) if options.tiny else RESULTS)
    return options


def measure(name: str, batch: int, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row: each step's findings under the step's name, and in `failures` why a step has none."""
    row: dict[str, Any] = {"model": name, "batch": batch, "precision": precision, "candidate": "accelkit-tensorrt",
                           "failure": None, "failures": {}}  # fmt: skip
    before = os.environ.get("ACCELKIT_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="accelkit-build-bench-") as folder:
        os.environ["ACCELKIT_CACHE_DIR"] = folder  # nothing is known beforehand
        try:
            with torch.no_grad(), by_hand.quiet(), _own_stream(options.device):
                subject_of_steps = Subject(name, batch, precision, options)
                for step in options.steps:
                    _take(step, subject_of_steps, row, options.deadline)
        finally:
            if before is None:
                del os.environ["ACCELKIT_CACHE_DIR"]
            else:
                os.environ["ACCELKIT_CACHE_DIR"] = before
    row["failure"] = row["failures"].get("cold")
    return row


def _take(step: str, subject: Subject, row: dict[str, Any], deadline: float) -> None:
    if time.perf_counter() > deadline:
        row["failures"][step] = f"{NO_TIME} was used up"
        return
    print(f"  {step}", file=sys.stderr, flush=True)
    try:
        row[step] = with_tf32(subject.precision, getattr(subject, step))()
    except Exception as problem:  # noqa: BLE001 - a step that fails is a result
        row["failures"][step] = reason(problem)


class Subject:
    """A model in a precision, and the steps; later ones use what `cold` built."""

    def __init__(self, name: str, batch: int, precision: str, options: argparse.Namespace) -> None:
        spec = subject(name, options.tiny)
        self.precision, self.device, self.calls = precision, options.device, 3 if options.tiny else CALLS
        self.wide = spec.make().to(options.device)
        self.wide_inputs: Inputs = _moved(spec.make_inputs(batch), options.device)
        self.model, self.inputs = by_hand.cast(self.wide, self.wide_inputs, DTYPES[precision])
        self.made: Optimized | None = None

    def cold(self) -> dict[str, Any]:
        stop_workers()
        self.made = made = optimized(self.model, self.inputs, self.precision, cache=True)
        return {**made.facts, "error": self._error(made, self.wide)}

    def warm(self) -> dict[str, Any]:
        other, _ = self._other()
        return optimized(other, self.inputs, self.precision, cache=False).facts

    def cached(self) -> dict[str, Any]:
        _give_back(self.device)
        before = _bytes_in_use(self.device)
        made = optimized(self.model, self.inputs, self.precision, cache=True)
        run(made.model, self.inputs)()
        _give_back(self.device)
        after = _bytes_in_use(self.device)
        memory = None if before is None or after is None else after - before
        return {**made.facts, "memory_bytes": memory}

    def overhead(self) -> dict[str, Any]:
        return self._overhead(self._built())

    def plain(self) -> dict[str, Any]:
        made = optimized(self.model, self.inputs, self.precision, cache=False, cuda_graph=False)
        return {**self._overhead(made), "seconds": made.facts["seconds"]}

    def refit(self) -> dict[str, Any]:
        made = optimized(self.model, self.inputs, self.precision, cache=False, refittable=True)
        other, wide = self._other()
        state = other.state_dict()
        _synchronize(self.device)
        started = time.perf_counter()
        made.model.refit(state)
        _synchronize(self.device)
        seconds = time.perf_counter() - started
        plain = error(by_hand.tensors_of(run(other, self.inputs)()), self._truth(wide), None)
        return {"refit_seconds": round(seconds, 3), "built": made.facts["seconds"], "error": self._error(made, wide),
                "plain_error": plain, "call": self._overhead(made)}  # fmt: skip

    def by_hand(self) -> dict[str, Any]:
        trt = library()
        with tempfile.TemporaryDirectory(prefix="accelkit-tensorrt-by-hand-") as folder:
            path, started = Path(folder) / "model.onnx", time.perf_counter()
            names, results = export(self.wide, self.wide_inputs, "torchscript", path)
            exported = time.perf_counter() - started
            dtypes = dict.fromkeys([*names, *results], DTYPES[self.precision])
            data, cold, cache = build(trt, path, self.precision, dtypes, b"")
            _, warm, _ = build(trt, path, self.precision, dtypes, cache)
        return {"export_seconds": round(exported, 3), "cold_seconds": _rounded(cold), "warm_seconds": _rounded(warm),
                "engine_bytes": int(data.nbytes), "timing_cache_bytes": len(cache)}  # fmt: skip

    def _built(self) -> Optimized:
        if self.made is None:
            raise RuntimeError("nothing was built by the step cold")
        return self.made

    def _other(self) -> tuple[nn.Module, nn.Module]:
        """The model with other weights of the same kind: in the precision, and in float32."""
        wide = copy.deepcopy(self.wide)
        generator = torch.Generator(self.device).manual_seed(1)
        for parameter in wide.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.add_(noise * parameter.std(correction=0), alpha=0.1)
        return by_hand.cast(wide, (), DTYPES[self.precision])[0], wide

    def _truth(self, wide: nn.Module) -> list[torch.Tensor]:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return by_hand.float64_outputs(wide, self.wide_inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _error(self, made: Optimized, wide: nn.Module) -> float:
        return error(by_hand.tensors_of(run(made.model, self.inputs)()), self._truth(wide), None)

    def _overhead(self, made: Optimized) -> dict[str, Any]:
        """Host microseconds of a call while the GPU is idle: medians, the two taken in turn."""
        raw, ours = raw_call(made, self.inputs), run(made.model, self.inputs)
        times: dict[str, list[float]] = {"raw_us": [], "accelkit_us": []}
        for _ in range(20 if self.calls > 20 else 1):
            raw(), ours()
        for _ in range(self.calls):
            times["raw_us"].append(_host_us(raw, self.device))
            times["accelkit_us"].append(_host_us(ours, self.device))
        found = {name: round(statistics.median(taken), 2) for name, taken in times.items()}
        return {**found, "overhead_us": round(found["accelkit_us"] - found["raw_us"], 2), **raw.facts}


def _host_us(call: Callable[[], Any], device: str) -> float:
    _synchronize(device)
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _give_back(device: str) -> None:
    """What PyTorch keeps of memory that nothing uses goes back to the GPU."""
    _synchronize(device)
    if device == "cuda":
        torch.cuda.empty_cache()


def _own_stream(device: str) -> Any:
    """Not CUDA's default stream, on which TensorRT waits for the GPU in every call."""
    new_stream: Any = torch.cuda.Stream
    return torch.cuda.stream(new_stream()) if device == "cuda" else nullcontext()


if __name__ == "__main__":
    sys.exit(main())
