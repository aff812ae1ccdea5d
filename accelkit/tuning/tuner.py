"""Many problems tuned within a budget.

    tasks --those of most work first--> compile elsewhere, measure here --> choices in this process and on disk

What is known from an earlier run is not measured again. What the budget does not reach keeps the default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from accelkit.tuning import files
from accelkit.tuning.compiling import Compiler
from accelkit.tuning.measuring import NO_TIME, NotTuned, Result, Task, Timer, measure

Progress = Callable[[int, int, str], None]
"""Called with the number of tasks that are done, of all, and what is being done."""


class Ahead(Protocol):
    """What compiles kernels ahead; `accelkit.tuning.compiling.Compiler` is one."""

    def __enter__(self) -> Ahead: ...
    def __exit__(self, *_: object) -> None: ...
    def note(self, task: Task) -> list[int]: ...
    def go(self) -> None: ...
    def wait(self, numbers: Sequence[int], until: float, told: Callable[[int, int], None] = ...) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What tuning gave.

    Attributes:
        results: the measured problems.
        known: problems that an earlier run had measured.
        left: problems that keep the default, with the reason.
        seconds: that it took.
    """

    results: list[Result] = field(default_factory=list)
    known: list[Task] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def notes(self) -> list[str]:
        """Sentences for a report."""
        notes = []
        faster = sorted((r for r in self.results if r.gain > 1.0), key=lambda r: -r.gain)
        if self.results:
            stay = len(self.results) - len(faster)
            notes.append(f"tuned {_problems(len(self.results))} in {self.seconds:.0f} s; {stay} keep the default")
        notes += [
            f"tuned {r.task}: {shown(r.choice)}, {r.gain:.2f} times as fast as the default "
            f"({_microseconds(r.choice_ms)} against {_microseconds(r.default_ms)} us)"
            for r in faster
        ]
        if self.known:
            notes.append(f"tuned before: {_problems(len(self.known))}")
        notes += [f"not tuned: {problem}: {why}" for problem, why in self.left.items()]
        notes += [
            f"tuning passed over {shown(c)} for {r.task}: {why}" for r in self.results for c, why in r.wrong.items()
        ]
        return notes


def tune(
    tasks: Iterable[Task],
    timer: Timer,
    *,
    seconds: float = 60.0,
    again: bool = False,
    progress: Progress = lambda done, total, words: None,
    ahead: Ahead | None = None,
) -> Outcome:
    """Measure tasks, those of most work first, and keep what was chosen in `task.choices` and on disk.

    Args:
        tasks: the problems; a task that comes several times counts so many times as much.
        timer: measures launches.
        seconds: the budget; a compilation or a measurement that has begun is finished.
        again: measure known problems too.
        progress: told before each problem.
        ahead: compiles kernels ahead; None: other processes do.
    """
    began = time.monotonic()
    until = began + seconds
    outcome = Outcome()
    waiting = []
    for task in _by_work(tasks):
        known = task.choices[task.device, task.problem] is not None
        if known and not again and not task.choices.is_provisional(task.device, task.problem):
            outcome.known.append(task)
        else:
            waiting.append(task)
    if waiting:
        on_gpu = any(task.device.type == "cuda" for task in waiting)
        with ahead if ahead is not None else Compiler(None if on_gpu else 1) as compiler:
            _tune(waiting, timer, until, progress, compiler, outcome)
    return Outcome(outcome.results, outcome.known, outcome.left, time.monotonic() - began)


def _tune(
    tasks: Sequence[Task], timer: Timer, until: float, progress: Progress, compiler: Ahead, outcome: Outcome
) -> None:
    progress(0, len(tasks), "looking at the candidates")
    compilations = {}
    for task in tasks:
        if time.monotonic() < until:
            compilations[id(task)] = compiler.note(task)
    compiler.go()
    for done, task in enumerate(tasks):
        words = str(task)

        def told(compiled: int, of: int, done: int = done, words: str = words) -> None:
            progress(done, len(tasks), f"{words} ({compiled} of {of} kernels compiled)")

        progress(done, len(tasks), words)
        compiler.wait(compilations.get(id(task), []), until, told)
        if time.monotonic() >= until:
            outcome.left[words] = NO_TIME
            continue
        try:
            result = measure(task, timer, lambda: time.monotonic() >= until)
        except NotTuned as error:
            outcome.left[words] = str(error)
            continue
        outcome.results.append(result)
        task.choices.keep(task.device, task.problem, result.choice)
        if result.complete:
            files.keep(task.device, [result.to_json()])
        else:  # good enough for this process; the next one starts again
            outcome.left[words] = f"{NO_TIME} after {len(result.times_ms)} of {len(task.candidates())} candidates"
    progress(len(tasks), len(tasks), "")


def _by_work(tasks: Iterable[Task]) -> list[Task]:
    work: dict[Any, float] = {}
    first: dict[Any, Task] = {}
    for task in tasks:
        key = task.key()
        first.setdefault(key, task)
        work[key] = work.get(key, 0.0) + task.work()
    return sorted(first.values(), key=lambda task: -work[task.key()])


def shown(config: Any) -> str:
    """A configuration in a few words: `tiles 64 64 64 4 5`."""
    if config is None:
        return "by rule"
    if isinstance(config, tuple):
        words = [name if value is True else shown(value) for name, value in config._asdict().items()]  # type: ignore[attr-defined]
        return " ".join(w for w in words if w not in ("", "0", "False", "by rule"))
    return str(config)


def _problems(count: int) -> str:
    return f"{count} problem{'s' * (count != 1)}"


def _microseconds(ms: float | None) -> str:
    return "?" if ms is None else f"{ms * 1e3:.1f}"
