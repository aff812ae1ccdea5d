"""One problem measured: what may win, what is passed over and why, and when the default stays."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fake_problems import Config, Fake, FakeTrial, Problem, clock

from accelkit.tuning import measuring
from accelkit.tuning.choices import Choices
from accelkit.tuning.measuring import NO_TIME, NotTuned, measure

Kind = Choices[Problem, Config]


def task(kind: Kind, *names: str) -> Fake:
    found = Fake(kind)
    found.names = names
    return found


def test_the_fastest_wins(kind: Kind) -> None:
    result = measure(task(kind, "slow", "fast"), clock({"default": [2.0], "slow": [3.0], "fast": [1.0]}))
    assert result.choice == Config("fast")
    assert (result.default_ms, result.choice_ms, result.gain) == (2.0, 1.0, 2.0)
    assert result.times_ms == {Config("default"): 2.0, Config("slow"): 3.0, Config("fast"): 1.0}
    assert result.complete
    assert result.to_json() | {"measured": ""} == {
        "kind": "fake", "what": "fake 4", "problem": {"rows": 4, "dtype": "float16"}, "measured": "",
        "choice": {"name": "fast", "inner": None}, "default": {"name": "default", "inner": None},
        "choice_ms": 1.0, "default_ms": 2.0,
    }  # fmt: skip


def test_faster_within_the_spread_keeps_the_default(kind: Kind) -> None:
    noisy = {"default": [1.0, 1.2, 1.4], "fast": [0.95, 1.15, 1.35], "slow": [9.0]}
    result = measure(task(kind, "slow", "fast"), clock(noisy))
    assert result.choice == Config("default")
    assert result.gain == 1.0
    steady = {"default": [1.2, 1.21], "fast": [1.1, 1.11], "slow": [9.0]}
    assert measure(task(kind, "slow", "fast"), clock(steady)).choice == Config("fast")


def test_lucky_in_the_first_rounds_is_not_enough(kind: Kind) -> None:
    lucky = {"default": [1.0], "fast": [*[0.5] * measuring.ROUNDS, *[1.5] * measuring.DUEL_ROUNDS]}
    assert measure(task(kind, "fast"), clock(lucky)).choice == Config("default")


@pytest.mark.parametrize("name", ["wrong", "not a number", "other shape"])
def test_a_wrong_one_never_wins_and_is_told(kind: Kind, name: str) -> None:
    result = measure(task(kind, name), clock({"default": [2.0], name: [0.1]}))
    assert result.choice == Config("default")
    assert result.wrong[Config(name)].startswith("wrong: ")
    assert Config(name) not in result.times_ms


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "RuntimeError: PTXAS error: registers"),
        ("no memory", "OutOfMemoryError: CUDA out of memory"),
        ("not recorded", "ValueError: an operator that a CUDA graph cannot hold"),
    ],
)
def test_one_that_cannot_run_is_passed_over_with_its_reason(kind: Kind, name: str, reason: str) -> None:
    result = measure(task(kind, name, "fast"), clock({"default": [2.0], "fast": [1.0]}))
    assert result.choice == Config("fast")
    assert result.failed == {Config(name): reason}
    assert result.complete


def test_a_default_that_cannot_run_is_replaced(kind: Kind) -> None:
    broken = task(kind, "fast")
    broken.default = lambda: Config("raises")  # type: ignore[method-assign]
    broken.candidates = lambda: [Config("raises"), Config("fast")]  # type: ignore[method-assign]
    result = measure(broken, clock({"fast": [1.0]}))
    assert (result.choice, result.default_ms, result.gain) == (Config("fast"), None, 1.0)


def test_nothing_to_measure_is_said(kind: Kind) -> None:
    broken = task(kind)
    broken.candidates = lambda: [Config("raises"), Config("wrong")]  # type: ignore[method-assign]
    with pytest.raises(NotTuned, match=r"no candidate could be measured: wrong: an error of .*; RuntimeError: PTXAS"):
        measure(broken, clock({}))
    with pytest.raises(NotTuned, match="its operands cannot be made: OutOfMemoryError: CUDA out of memory"):
        measure(task(kind, "no operands"), clock({}))


def test_float32_judges_where_float64_does_not_fit(kind: Kind) -> None:
    result = measure(
        task(kind, "float64 does not fit", "wrong"), clock({"default": [2.0], "float64 does not fit": [1.0]})
    )
    assert list(result.wrong) == [Config("wrong")]
    assert result.choice == Config("float64 does not fit")


def test_without_time_the_rest_is_left_out(kind: Kind) -> None:
    result = measure(task(kind, "slow", "fast"), clock({"default": [2.0]}), lambda: True)
    assert result.choice == Config("default")
    assert result.failed == {Config("slow"): NO_TIME, Config("fast"): NO_TIME}
    assert not result.complete


def test_the_slow_are_not_timed_to_the_end(kind: Kind) -> None:
    rounds = {"default": 0, "slow": 0}

    def timer(launch, launches):  # type: ignore[no-untyped-def]
        def one() -> float:
            name = launch.args[0].name
            rounds[name] += 1
            return 1.0 if name == "default" else 2.0

        return one

    measure(task(kind, "slow"), timer)
    assert rounds == {"default": measuring.ROUNDS, "slow": measuring.FIRST_ROUNDS}


def test_nothing_is_kept_alive(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands go with the measurement, those in the frames of an error too."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(FakeTrial):
        def __init__(self, task: Fake) -> None:
            super().__init__(task)
            alive.append(weakref.ref(self.x))

    watched = task(kind, "raises", "fast")
    monkeypatch.setattr(watched, "trial", lambda: Watched(watched), raising=False)
    result = measure(watched, clock({"default": [2.0], "fast": [1.0]}))
    gc.collect()
    assert result.failed
    assert [one() for one in alive] == [None]


def test_the_callers_random_numbers_stay() -> None:
    from accelkit.tuning.problems.operands import Numbers

    before = torch.get_rng_state()
    first, second = (Numbers(torch.device("cpu")).normal(8, dtype=torch.float32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
