"""Which kernel an attention of kind "auto" gets while a model is compiled: planted times, kernels that run anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="one of the kernels is Triton's")

import torch
from fake_problems import ENVIRONMENT, GPU
from torch import Tensor

from accelkit import ops
from accelkit.kernels import attention
from accelkit.ops import attention_choice, attention_kinds
from accelkit.ops.attention_choice import AttentionChoice, AttentionProblem, chosen
from accelkit.tuning import files, kernels_of_attention
from accelkit.tuning.kernels_of_attention import choose_kernels
from accelkit.tuning.measuring import Task
from accelkit.tuning.problems import task_of
from accelkit.tuning.tuner import tune

CPU = torch.device("cpu")


class Kernels:
    """Every kernel computes the plain meaning; `wrong` ones are off, `refused` ones take nothing. `ms`: what a launch takes."""

    def __init__(self) -> None:
        self.ms = {"triton": 2.0, "cudnn": 2.0, "flash": 2.0, "efficient": 2.0}
        self.wrong: set[str] = set()
        self.refused: set[str] = {"xformers"}
        self.ran: list[str] = []

    def run(self, kind: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool, *_: Any) -> Tensor:
        self.ran.append(kind)
        result = ops.attention.meaning(query, key, value, mask, causal)
        return result * 1.1 if kind in self.wrong else result

    def refusal_of(self, kind: str, *_: Any) -> str | None:
        return f"{kind} attention takes no such thing" if kind in self.refused else None

    def timer(self, launch: Any, launches: int) -> Any:
        (config,) = launch.args
        return lambda: self.ms[config.kind]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """No choice is known, and the file is a GPU's that needs not be there."""
    made = Kernels()
    monkeypatch.setattr(attention_kinds, "run", made.run)
    monkeypatch.setattr(attention_kinds, "refusal_of", made.refusal_of)
    monkeypatch.setattr(attention_choice, "refusal_of", made.refusal_of)
    monkeypatch.setattr(attention_kinds, "without_xformers", lambda: "not installed")
    monkeypatch.setattr(attention_choice, "dependent_launch_on", lambda device: False)
    monkeypatch.setattr(attention, "shared_bytes_on", lambda device: 227 * 1024)
    monkeypatch.setattr(files, "environment_of", lambda device: ENVIRONMENT)
    chosen.forget()
    yield made
    chosen.forget()


def task(length: int = 200, kind: str = "auto", batch: int = 1) -> Task:
    query, key, value = torch.randn(batch, length, 3, 2, 16).half().unbind(2)
    found = task_of("attention", query, key, value, kind=kind)
    assert found is not None
    return found


def problem(length: int = 200) -> AttentionProblem:
    found: AttentionProblem = task(length).problem
    return found


WHAT = "attention 1 x 2 x 200 x 16 float16: "


def test_the_fastest_runs_and_every_time_is_told(kernels: Kernels) -> None:
    kernels.ms["flash"] = 1.5
    (note,) = choose_kernels([task()], kernels.timer)
    assert note == (
        f"{WHAT}measured triton 2.0000 ms, cudnn 2.0000 ms, flash 1.5000 ms, efficient 2.0000 ms; runs flash"
    )
    assert chosen[CPU, problem()] == AttentionChoice("flash")
    query, key, value = torch.randn(1, 200, 3, 2, 16).half().unbind(2)
    assert attention_choice.chosen_kind(query, key, value, None, False) == "flash"


@pytest.mark.parametrize(
    ("ms", "runs"),
    [
        ({"cudnn": 1.97}, "triton"),  # the rules' choice at 200 keys: within 2 %
        ({"flash": 1.0, "efficient": 0.99}, "flash"),
        ({"flash": 1.0, "efficient": 0.9}, "efficient"),
        ({"efficient": 1.0, "cudnn": 1.01}, "cudnn"),
    ],
)
def test_near_ties_go_by_a_fixed_order(kernels: Kernels, ms: dict[str, float], runs: str) -> None:
    kernels.ms.update(ms)
    (note,) = choose_kernels([task()], kernels.timer)
    assert note.endswith(f"; runs {runs}")


def test_the_rules_choice_comes_first(kernels: Kernels) -> None:
    (note,) = choose_kernels([task(100)], kernels.timer)  # up to 128 keys the rules prefer cuDNN
    assert "measured cudnn 2.0000 ms, triton 2.0000 ms" in note
    assert note.endswith("; runs cudnn")


def test_wrong_and_refused_kernels_are_left_out_with_the_reason(kernels: Kernels) -> None:
    kernels.wrong, kernels.refused = {"efficient"}, {"flash"}
    kernels.ms.update({"efficient": 0.1, "cudnn": 1.0})
    (note,) = choose_kernels([task()], kernels.timer)
    assert note.startswith(
        f"{WHAT}measured triton 2.0000 ms, cudnn 1.0000 ms; runs cudnn; not efficient: wrong: an error"
    )
    assert "; not flash: flash attention takes no such thing" in note


def test_each_shape_once(kernels: Kernels) -> None:
    notes = choose_kernels([task(), task(), task(100), task(batch=2)], kernels.timer)
    assert [note.partition(":")[0] for note in notes] == [
        "attention 1 x 2 x 200 x 16 float16",
        "attention 1 x 2 x 100 x 16 float16",
        "attention 2 x 2 x 200 x 16 float16",
    ]
    assert kernels.ran == ["triton", "cudnn", "flash", "efficient"] * 1 + [
        "cudnn", "triton", "flash", "efficient", "triton", "cudnn", "flash", "efficient",
    ]  # fmt: skip


def test_a_kind_that_was_asked_for_is_not_measured(kernels: Kernels) -> None:
    linear = task_of("linear_activation", torch.randn(4, 32).half(), torch.randn(64, 32).half(), None, "none")
    assert linear is not None
    assert choose_kernels([task(kind="triton"), linear], kernels.timer) == []
    assert not kernels.ran


# --- what is kept


def test_a_later_build_and_another_process_find_it(kernels: Kernels) -> None:
    kernels.ms["flash"] = 1.5
    choose_kernels([task()], kernels.timer)
    kernels.ran.clear()
    (note,) = choose_kernels([task()], kernels.timer)
    assert "measured on 20" in note
    assert note.endswith("triton 2.0000 ms, cudnn 2.0000 ms, flash 1.5000 ms, efficient 2.0000 ms; runs flash")
    assert not kernels.ran
    chosen.forget()
    assert chosen[GPU, problem()] == AttentionChoice("flash"), "from the file"
    assert chosen.is_provisional(GPU, problem())


def test_tuning_measures_it_again(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.ms["flash"] = 1.5
    choose_kernels([task()], kernels.timer)
    assert chosen.is_provisional(CPU, problem())
    kernels.ms["cudnn"] = 0.5
    kernels.ran.clear()
    outcome = tune([task()], kernels.timer)
    assert [r.choice for r in outcome.results] == [AttentionChoice("cudnn")]
    assert kernels.ran.count("triton") > 1, "its configurations are candidates of tuning"
    assert not chosen.is_provisional(CPU, problem())
    assert tune([task()], kernels.timer).known
    (note,) = choose_kernels([task()], kernels.timer)
    assert note.startswith(f"{WHAT}tuned on 20")
    assert note.endswith("; runs cudnn, 0.5000 ms")
    # another process that had looked before must not put its own back
    chosen.forget()
    kernels.ms["cudnn"] = 3.0
    choose_kernels([task()], kernels.timer)
    path = files.path_of(CPU)
    assert path is not None
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["choice"]["kind"] == "cudnn"
    assert "provisional" not in entry


# --- what fails


def test_no_time_is_told(kernels: Kernels) -> None:
    notes = choose_kernels([task(), task(100)], kernels.timer, seconds=0.0)
    assert notes == [
        f"{WHAT}not measured, the time budget was spent; runs triton by rule",
        "attention 1 x 2 x 100 x 16 float16: not measured, the time budget was spent; runs cudnn by rule",
    ]
    assert chosen[CPU, problem()] is None


def test_time_that_runs_out_meanwhile(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of those that were reached holds for this process, and the next one measures again."""
    now = iter([0.0, 1.0, 2.0, *[99.0] * 50])
    monkeypatch.setattr(kernels_of_attention.time, "monotonic", lambda: next(now))
    (note,) = choose_kernels([task()], kernels.timer, seconds=10.0)
    assert "measured triton 2.0000 ms, cudnn 2.0000 ms; runs triton; not flash: the time budget was spent" in note
    path = files.path_of(CPU)
    assert path is not None
    assert not path.exists()


def test_no_memory_for_the_operands(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(kernels_of_attention.KernelsTask, "trial", no_memory)
    (note,) = choose_kernels([task()], kernels.timer)
    assert note == (
        f"{WHAT}not measured, its operands cannot be made: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB; "
        "runs triton by rule"
    )
