"""Many problems: their order, the budget, what is known from before, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_problems import GPU, Config, Fake, Problem, clock

from accelkit.tuning import files, tuner
from accelkit.tuning.choices import Choices
from accelkit.tuning.measuring import Task
from accelkit.tuning.tuner import shown, tune

Kind = Choices[Problem, Config]
TIMES = {"default": [2.0], "slow": [3.0], "fast": [1.0]}


class Ahead:
    """Compiles nothing; notes what it is asked."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.waited: list[Sequence[int]] = []

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.noted.append("closed")

    def note(self, task: Task) -> list[int]:
        self.noted.append(str(task))
        return [len(self.noted)]

    def go(self) -> None:
        self.noted.append("go")

    def wait(self, numbers: Sequence[int], until: float, told: Callable[[int, int], None] = print) -> None:
        self.waited.append(numbers)
        told(3, 9)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as the test sets it."""
    time = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: time[0])
    return time


def test_choices_are_used_and_kept(kind: Kind) -> None:
    tasks = [Fake(kind, 4), Fake(kind, 8)]
    outcome = tune(tasks, clock(TIMES))
    assert [r.choice for r in outcome.results] == [Config("fast")] * 2
    assert kind[tasks[0].device, Problem(8)] == Config("fast")
    assert kind[GPU, Problem(4)] == Config("fast")  # from the file, as another process would
    assert not outcome.left


def test_those_of_most_work_come_first_and_once(kind: Kind) -> None:
    ahead = Ahead()
    tasks = [Fake(kind, 4), Fake(kind, 8), *[Fake(kind, 3)] * 5]
    outcome = tune(tasks, clock(TIMES), ahead=ahead)
    assert [str(r.task) for r in outcome.results] == ["fake 3", "fake 8", "fake 4"]
    assert ahead.noted == ["fake 3", "fake 8", "fake 4", "go", "closed"]
    assert ahead.waited == [[1], [2], [3]]


def test_what_is_known_is_not_measured_again(kind: Kind) -> None:
    tune([Fake(kind, 4)], clock(TIMES))
    outcome = tune([Fake(kind, 4), Fake(kind, 5)], clock(TIMES))
    assert ([str(t) for t in outcome.known], [str(r.task) for r in outcome.results]) == (["fake 4"], ["fake 5"])
    assert "tuned before: 1 problem" in outcome.notes()
    again = tune([Fake(kind, 4)], clock({**TIMES, "slow": [0.5]}), again=True)
    assert [r.choice for r in again.results] == [Config("slow")]
    assert kind[Fake(kind).device, Problem(4)] == Config("slow")


def test_the_budget_ends_it(kind: Kind, now: list[float]) -> None:
    class Slow(Fake):
        def trial(self):  # type: ignore[no-untyped-def]
            now[0] += 10.0
            return super().trial()

    outcome = tune([Slow(kind, rows) for rows in (1, 2, 3, 4)], clock(TIMES), seconds=15.0)
    assert [str(r.task) for r in outcome.results] == ["fake 4", "fake 3"]
    assert outcome.left == {
        "fake 3": "the time budget was spent after 1 of 3 candidates",
        "fake 2": "the time budget was spent",
        "fake 1": "the time budget was spent",
    }
    assert [entry["problem"]["rows"] for entry in files.entries_of(GPU)] == [4]  # what is not complete starts again
    assert "not tuned: fake 2: the time budget was spent" in outcome.notes()


def test_progress_is_told(kind: Kind) -> None:
    told: list[Any] = []
    tune([Fake(kind, 4), Fake(kind, 8)], clock(TIMES), progress=lambda *words: told.append(words), ahead=Ahead())
    assert told == [
        (0, 2, "looking at the candidates"),
        (0, 2, "fake 8"), (0, 2, "fake 8 (3 of 9 kernels compiled)"),
        (1, 2, "fake 4"), (1, 2, "fake 4 (3 of 9 kernels compiled)"),
        (2, 2, ""),
    ]  # fmt: skip


def test_a_problem_that_cannot_be_measured_keeps_its_default(kind: Kind) -> None:
    broken = Fake(kind, 9)
    broken.names = ("no operands",)
    outcome = tune([broken, Fake(kind, 4)], clock(TIMES))
    assert "its operands cannot be made" in outcome.left["fake 9"]
    assert [str(r.task) for r in outcome.results] == ["fake 4"]
    assert kind[broken.device, broken.problem] is None


def test_an_interrupt_keeps_what_was_found(kind: Kind) -> None:
    def stop(done: int, total: int, words: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    ahead = Ahead()
    with pytest.raises(KeyboardInterrupt):
        tune([Fake(kind, 4), Fake(kind, 8)], clock(TIMES), progress=stop, ahead=ahead)
    assert ahead.noted[-1] == "closed"
    assert [entry["problem"]["rows"] for entry in files.entries_of(GPU)] == [8]


def test_notes_say_what_was_gained_and_what_was_passed_over(kind: Kind) -> None:
    wrong = Fake(kind, 4)
    wrong.names = ("wrong", "fast")
    notes = tune([wrong, Fake(kind, 2)], clock({**TIMES, "fast": [0.5]}), ahead=Ahead()).notes()
    assert "tuned fake 4: fast, 4.00 times as fast as the default (500.0 against 2000.0 us)" in notes
    assert any(note.startswith("tuning passed over wrong for fake 4: wrong: an error of") for note in notes)
    assert notes[0].startswith("tuned 2 problems in 0 s; 0 keep the default")


def test_nothing_is_started_for_nothing(kind: Kind) -> None:
    ahead = Ahead()
    assert tune([], clock({}), ahead=ahead).results == []
    assert ahead.noted == []


def test_configurations_are_words() -> None:
    pytest.importorskip("triton")
    from accelkit.kernels.linear import CUBLAS, LinearConfig
    from accelkit.ops.attention_choice import AttentionChoice, TritonConfig

    assert shown(LinearConfig("tiles", 64, 64, 32, 4, 5)) == "tiles 64 64 32 4 5"
    assert shown(CUBLAS) == "cublas"
    assert shown(AttentionChoice("cudnn")) == "cudnn"
    assert shown(AttentionChoice("triton", TritonConfig("one_pass", 64, 0, 4, 1, True))) == "triton one_pass 64 4 1 pdl"
