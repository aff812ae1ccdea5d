"""Timing in interleaved rounds, memory, and results files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelkit.measure import (
    Timing,
    interleaved,
    machine_name,
    peak_memory,
    resident_bytes,
    timing_of,
    versions,
    write_results,
)


def test_candidates_take_turns() -> None:
    calls: list[str] = []

    def record(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    timings = interleaved(
        {"a": lambda: record("a", 0.002), "b": lambda: record("b", 0.004)},
        seconds=0,
        min_rounds=5,
        warmup=2,
        min_sample_ms=0.1,
    )
    assert calls[:4] == ["a", "a", "b", "b"]
    assert calls[6:] == ["a", "a", "b", "b"] * 5  # an untimed call before each timed one
    assert list(timings) == ["a", "b"]
    assert timings["a"].rounds == 5
    assert timings["a"].min_ms >= 2
    assert timings["b"].min_ms >= 4


def test_fast_calls_are_repeated_and_rounds_bounded() -> None:
    count = 0

    def quick() -> None:
        nonlocal count
        count += 1

    timing = interleaved({"quick": quick}, seconds=60, max_rounds=4, warmup=0)["quick"]
    assert timing.rounds == 4
    assert count > 100


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=40))
def test_median_and_quartiles(samples: list[float]) -> None:
    timing = timing_of(samples)
    assert min(samples) == timing.min_ms
    assert timing.min_ms <= timing.low_ms + 1e-9 <= timing.median_ms + 2e-9 <= timing.high_ms + 3e-9
    assert timing.high_ms <= max(samples) + 1e-9
    assert timing.spread_ms == timing.high_ms - timing.low_ms


def test_a_difference_within_the_spread_is_none() -> None:
    def timing(median: float, spread: float) -> Timing:
        return Timing(median, median - spread / 2, median + spread / 2, median - spread, 9)

    assert timing(11, 0.5).slower_than(timing(10, 0.5))
    assert not timing(11, 2).slower_than(timing(10, 0.5))
    assert not timing(10, 0.5).slower_than(timing(11, 0.5))


def test_peak_memory_sees_what_is_gone_again() -> None:
    with peak_memory(0.001) as memory:
        tensor = torch.ones(64 * 2**20)
        time.sleep(0.02)
        del tensor
    assert memory.peak_bytes - memory.before_bytes > 200 * 2**20
    assert resident_bytes() > 10 * 2**20


def test_results_files(tmp_path: Path) -> None:
    path = write_results("bench", [{"ms": 1.5}], tmp_path, goal=2.0, packages=("pytest", "no-such-package"))
    assert path == tmp_path / machine_name() / "bench.json"
    content = json.loads(path.read_text())
    assert content["rows"] == [{"ms": 1.5}]
    assert content["goal"] == 2.0
    assert content["versions"]["pytest"] == pytest.__version__
    assert "no-such-package" not in content["versions"]
    assert content["machine"]
    assert versions()["torch"] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ["bench.json"]
