"""Time and memory: candidates in interleaved rounds, medians with their spread, and the machine they were taken on.

    timings = interleaved({"eager": lambda: model(x), "accelkit": lambda: fast(x)}, seconds=2)
    timings["accelkit"].median_ms, timings["accelkit"].spread_ms

Interleaving (A B A B ...) makes a drift of the machine's speed hit all candidates alike; a difference smaller than the
spread is no difference.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in milliseconds a call.

    Attributes:
        median_ms: median over the rounds.
        low_ms, high_ms: first and third quartile.
        min_ms: fastest round.
        rounds: number of rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    min_ms: float
    rounds: int

    @property
    def spread_ms(self) -> float:
        """Interquartile range."""
        return self.high_ms - self.low_ms

    def slower_than(self, other: Timing) -> bool:
        """Whether the medians differ by more than either's spread."""
        return self.median_ms - other.median_ms > max(self.spread_ms, other.spread_ms)

    def to_json(self) -> dict[str, float]:
        return {k: round(v, 5) for k, v in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ms ({self.low_ms:.3g} to {self.high_ms:.3g})"


def timing_of(samples_ms: list[float]) -> Timing:
    """Median and quartiles of samples in milliseconds."""
    if len(samples_ms) == 1:
        low = high = samples_ms[0]
    else:
        low, _, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(statistics.median(samples_ms), low, high, min(samples_ms), len(samples_ms))


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 3,
    max_rounds: int = 200,
    warmup: int = 1,
    min_sample_ms: float = 0.5,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time candidates in turn, round after round, until `seconds` have passed.

    Args:
        candidates: name -> call without arguments.
        seconds: time to spend on the timed rounds in all; at least `min_rounds` are made however long they take.
        warmup: untimed calls of each candidate before.
        min_sample_ms: a sample repeats a fast call until it lasts about this long. An untimed call comes before each: the
            one before it was another candidate's, which left its own data in the caches and its threads spinning (ONNX
            Runtime's do), and cost the next call up to a quarter of its time on 2 cores.
        device: on "cuda" samples are taken with CUDA events; else with the wall clock.

    Returns:
        name -> Timing, in the candidates' order.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()
    sample = _cuda_sample if torch.device(device).type == "cuda" else _wall_sample
    repeats = {}
    for name, call in candidates.items():
        once = sample(call, 1)
        repeats[name] = max(1, min(1000, round(min_sample_ms / once))) if once > 0 else 1000
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - started > seconds:
            break
        for name, call in candidates.items():
            call()
            samples[name].append(sample(call, repeats[name]))
    return {name: timing_of(taken) for name, taken in samples.items()}


def _wall_sample(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) * 1e3 / repeats


def _cuda_sample(call: Callable[[], Any], repeats: int) -> float:
    torch.cuda.synchronize()
    new_event: Any = torch.cuda.Event
    begin, end = new_event(enable_timing=True), new_event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


# --- memory


def resident_bytes() -> int:
    """This process's resident memory in bytes (0 where the system does not tell)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class PeakMemory:
    """Peak resident memory of a region: `before_bytes` at its start, `peak_bytes` the highest seen inside."""

    before_bytes: int = 0
    peak_bytes: int = 0


@contextmanager
def peak_memory(interval_s: float = 0.01) -> Iterator[PeakMemory]:
    """Sample the process's resident memory in a thread while the region runs."""
    seen = PeakMemory(resident_bytes(), resident_bytes())
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            seen.peak_bytes = max(seen.peak_bytes, resident_bytes())

    thread = threading.Thread(target=watch, name="accelkit-peak-memory", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        seen.peak_bytes = max(seen.peak_bytes, resident_bytes())


# --- where a number comes from


def machine() -> dict[str, Any]:
    """What the numbers were taken on: processor, cores, memory, GPU."""
    facts: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory_bytes": properties.total_memory,
        }
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return lines[0] if lines else platform.processor()
    except OSError:
        return platform.processor()


def machine_name() -> str:
    """A short folder name for this kind of machine: `h200`, or `cpu-2-cores-amd-epyc`."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).name.lower().removeprefix("nvidia ").replace(" ", "-")
    words = [w for w in _processor().lower().replace("(r)", "").replace("(tm)", "").split() if w.isalnum()][:2]
    return "-".join(["cpu", str(os.cpu_count()), "cores", *words])


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch, accelkit and of the named packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("accelkit", "numpy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine_sentence() -> str:
    """The machine for a reader of a table: `2 cores of AMD EPYC 9B14, 24 GiB`, or `NVIDIA H200, 140 GiB`."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    memory = _memory_bytes()
    return f"{os.cpu_count()} cores of {_processor()}" + (f", {memory / 2**30:.0f} GiB" if memory else "")


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system, or one that does not tell
        return None


def provenance(*packages: str) -> dict[str, Any]:
    """Where numbers come from: date, machine (a sentence), hardware (its facts), versions (`packages`' among them)."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine_sentence(),
        "hardware": machine(),
        "versions": versions(*packages),
    }


def write_json(path: Path | str, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_results(name: str, rows: list[dict[str, Any]], folder: Path | str, **facts: Any) -> Path:
    """Write one benchmark's rows to `<folder>/<machine_name()>/<name>.json` with machine, versions and date.

    Args:
        name: the benchmark's name.
        rows: one dict a measured row.
        folder: normally `benchmarks/results`.
        facts: anything else worth keeping (`title` and `table` for the README, see docs/generate_tables.py; goals,
            notes), and `packages` to list versions of.

    Returns:
        the file's path.
    """
    packages = facts.pop("packages", ())
    path = Path(folder) / machine_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"name": name, **provenance(*packages), **facts, "rows": rows})
    return path
