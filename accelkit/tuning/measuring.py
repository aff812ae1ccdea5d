"""One problem measured: every candidate is checked, then the right ones are timed in turns.

    candidates --run, compare with float64--> right ones --rounds, the slow ones drop out--> fastest --against the default--> choice

Right is what is right everywhere in accelkit: an error of at most twice plain PyTorch's own in the same precision. The
default stays where the fastest is not faster by more than the spread.
"""

from __future__ import annotations

import functools
import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from accelkit.accuracy import FLOOR_EPSILONS, YARDSTICK_FACTOR
from accelkit.errors import AccelkitError, LoweringError
from accelkit.measure import Timing, timing_of
from accelkit.tuning.choices import Choices, to_json

FIRST_ROUNDS, ROUNDS, DUEL_ROUNDS = 3, 9, 15
NO_TIME = "the time budget was spent"
DROPPED_FROM = 1.15
"""A candidate that is this many times slower than the fastest after the first rounds is not timed further."""


class Trial(ABC):
    """A problem's operands on a device: fresh random numbers in the real shapes.

    Attributes:
        launches: how many launches in a row are timed as one.
    """

    launches: int = 8

    @abstractmethod
    def run(self, config: Any, turn: int) -> Sequence[Tensor]:
        """The results by a configuration. `turn` counts launches: weights that a model reads once a call lie elsewhere in
        each, so that they come from memory and not from a cache."""

    @abstractmethod
    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        """The same by the operator's plain meaning on the operands of turn 0, widened to `dtype` where one is given."""


class Task(ABC):
    """A problem to tune.

    Attributes:
        choices: where its choice is kept. problem: what the choice depends on.
        device: where it is measured.
    """

    choices: Choices[Any, Any]
    problem: Any
    device: torch.device

    @abstractmethod
    def default(self) -> Any:
        """The configuration that the rules give."""

    @abstractmethod
    def trial(self) -> Trial:
        """Its operands; raises torch.OutOfMemoryError where they do not fit."""

    @abstractmethod
    def work(self) -> float:
        """A lower bound of its time on a fast GPU, in seconds; orders tasks."""

    def candidates(self) -> list[Any]:
        """The configurations to measure, the default first."""
        return list(dict.fromkeys([self.default(), *self.choices.candidates(self.device, self.problem)]))

    def key(self) -> tuple[str, torch.device, Any]:
        return self.choices.kind, self.device, self.problem


class Timer(Protocol):
    """Makes repeated launches measurable."""

    def __call__(self, launch: Callable[[int], object], launches: int) -> Callable[[], float]:
        """A function that runs `launches` launches and gives the milliseconds of one. Launches may raise here."""
        ...


@dataclass(frozen=True)
class Result:
    """What measuring a problem gave.

    Attributes:
        task: the problem.
        default, choice: configurations; `choice` is the default where nothing was faster by more than the spread.
        default_ms, choice_ms: medians of one launch; None where the default could not be measured.
        times_ms: every timed candidate's.
        wrong: candidates whose result was not right, with by how much.
        failed: candidates that could not run, with the reason.
    """

    task: Task
    default: Any
    choice: Any
    default_ms: float | None
    choice_ms: float
    times_ms: dict[Any, float] = field(default_factory=dict)
    wrong: dict[Any, str] = field(default_factory=dict)
    failed: dict[Any, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether no candidate was left out for want of time."""
        return NO_TIME not in self.failed.values()

    @property
    def gain(self) -> float:
        """How many times faster than the default; 1 where that stays."""
        return self.default_ms / self.choice_ms if self.default_ms and self.choice != self.default else 1.0

    def to_json(self) -> dict[str, Any]:
        def rounded(ms: float | None) -> float | None:
            return None if ms is None else round(ms, 5)

        return {
            "kind": self.task.choices.kind,
            "what": str(self.task),
            "problem": to_json(self.task.problem),
            "choice": to_json(self.choice),
            "default": to_json(self.default),
            "choice_ms": rounded(self.choice_ms),
            "default_ms": rounded(self.default_ms),
            "measured": time.strftime("%Y-%m-%d"),
        }


class NotTuned(AccelkitError):
    """A problem could not be measured; the message says why."""


def measure(task: Task, timer: Timer, out_of_time: Callable[[], bool] = lambda: False) -> Result:
    """Measure a problem's candidates.

    Raises:
        NotTuned: no candidate could be measured: no memory for its operands, or none ran.
        LoweringError: a candidate broke the GPU's context, which only a new process can mend.
    """
    with torch.no_grad():
        return _Measurement(task, timer, out_of_time).run()


class _Measurement:
    def __init__(self, task: Task, timer: Timer, out_of_time: Callable[[], bool]) -> None:
        self.task, self.timer, self.out_of_time = task, timer, out_of_time
        self.default, self.all = task.default(), task.candidates()
        self.wrong: dict[Any, str] = {}
        self.failed: dict[Any, str] = {}
        self.samples: dict[Any, list[float]] = {}

    def run(self) -> Result:
        try:
            trial = self.task.trial()
            judge = _Judge(trial)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise NotTuned(f"its operands cannot be made: {said_shortly(error)}") from None
        rounds = self._recorded(trial, judge)
        del judge  # and the float64 reference
        if not rounds:
            reasons = "; ".join(dict.fromkeys([*self.wrong.values(), *self.failed.values()]))
            raise NotTuned(f"no candidate could be measured: {reasons or 'there are none'}")
        best = self._fastest(rounds)
        timings = {config: timing_of(samples) for config, samples in self.samples.items()}
        if best != self.default and self.default in rounds:
            timings |= self._duel(rounds, best)
            if not timings[self.default].slower_than(timings[best]):
                best = self.default
        default_ms = timings[self.default].median_ms if self.default in timings else None
        times_ms = {config: timing.median_ms for config, timing in timings.items()}
        return Result(
            self.task, self.default, best, default_ms, times_ms[best], times_ms, self.wrong, self.failed
        )  # fmt: skip

    def _recorded(self, trial: Trial, judge: _Judge) -> dict[Any, Callable[[], float]]:
        """Every right candidate, ready to be timed."""
        rounds: dict[Any, Callable[[], float]] = {}
        for config in self.all:
            if rounds and self.out_of_time():
                self.failed[config] = NO_TIME
                continue
            try:
                if (fault := judge.fault(trial.run(config, 0))) is not None:
                    self.wrong[config] = fault
                    continue
                rounds[config] = self.timer(functools.partial(trial.run, config), trial.launches)
            except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch may raise, told in the result
                self.failed[config] = said_shortly(error)
                self._require_gpu(config)
        return rounds

    def _require_gpu(self, config: Any) -> None:
        """After an invalid access a GPU answers nothing any more in this process, and nothing can be measured."""
        if self.task.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.task.device)
        except RuntimeError as error:
            raise LoweringError(
                f"the GPU no longer answers this process since {config} was tried for {self.task}: {said_shortly(error)}; "
                "start a new process, and tune without this candidate or not at all"
            ) from None

    def _fastest(self, rounds: dict[Any, Callable[[], float]]) -> Any:
        self.samples = {config: [] for config in rounds}
        left = list(rounds)
        for done in range(ROUNDS):
            for config in left:
                self.samples[config].append(rounds[config]())
            if done + 1 == FIRST_ROUNDS:
                bound = DROPPED_FROM * min(min(samples) for samples in self.samples.values())
                left = [config for config in left if min(self.samples[config]) <= bound]
        return min(left, key=lambda config: timing_of(self.samples[config]).median_ms)

    def _duel(self, rounds: dict[Any, Callable[[], float]], best: Any) -> dict[Any, Timing]:
        """The fastest of many was lucky too: measured afresh against the default alone."""
        samples: dict[Any, list[float]] = {self.default: [], best: []}
        for _ in range(DUEL_ROUNDS):
            for config, taken in samples.items():
                taken.append(rounds[config]())
        return {config: timing_of(taken) for config, taken in samples.items()}


class _Judge:
    """Tells right results from wrong ones: float64's where there is memory for it, else float32's."""

    def __init__(self, trial: Trial) -> None:
        self.plain = trial.plain(None)
        self.exact: Sequence[Tensor]
        try:
            self.exact = trial.plain(torch.float64)
        except torch.OutOfMemoryError:
            self.exact = trial.plain(torch.float32)
        self.allowed = [self._allowed(plain, exact) for plain, exact in zip(self.plain, self.exact, strict=True)]
        self.plain = ()

    def fault(self, results: Sequence[Tensor]) -> str | None:
        """How wrong the results are, or None."""
        for result, exact, allowed in zip(results, self.exact, self.allowed, strict=True):
            if result.shape != exact.shape:
                return f"wrong: a result {list(result.shape)} in place of {list(exact.shape)}"
            error = _error(result, exact)
            if not error <= allowed:
                return f"wrong: an error of {error:.2e} where {allowed:.2e} is allowed"
        return None

    @staticmethod
    def _allowed(plain: Tensor, exact: Tensor) -> float:
        floor = 1.0 + (FLOOR_EPSILONS - 1.0) / math.sqrt(max(1, exact.numel()))
        if plain.dtype not in (torch.float16, torch.bfloat16):
            floor = FLOOR_EPSILONS
        return YARDSTICK_FACTOR * _error(plain, exact) + floor * torch.finfo(plain.dtype).eps


def _error(result: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result, computed where they are."""
    norm = torch.linalg.vector_norm
    scale = float(norm(exact))
    difference = float(norm(result.to(exact.dtype) - exact))
    return difference / scale if scale else (math.inf if difference else 0.0)


def said_shortly(error: BaseException) -> str:
    """The error's first line; its frames, which hold tensors, are let go."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
