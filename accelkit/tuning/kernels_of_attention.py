"""Which kernel computes an attention of kind "auto": each measured once for a shape, while a model is compiled for it.

    rules' choice | triton | cudnn | flash | efficient | xformers  --check, replay in turns-->  the first within 2 % of the fastest

A few milliseconds a shape, beside what `accelkit tune` takes for the Triton kernel's configurations. What is found is kept where
that keeps its choices, marked as provisional: tuning measures it again, and a later build finds it. The order is fixed and the
rules' choice comes first, so that a near-tie comes out the same every time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from accelkit.ops.attention_choice import AttentionChoice, kernels_on
from accelkit.tuning import files
from accelkit.tuning.choices import to_json
from accelkit.tuning.measuring import NO_TIME, NotTuned, Result, Task, Timer, measure
from accelkit.tuning.problems.attention import AttentionTask

NEAR = 1.02
"""Times within two per cent are equal: clocks differ by as much from run to run (accelkit.backends.fastertransformer.choice)."""


class KernelsTask(AttentionTask):
    """An attention's problem with every kernel as a candidate once."""

    def candidates(self) -> list[Any]:
        return kernels_on(self.device, self.problem)


def choose_kernels(tasks: Iterable[Task], timer: Timer, seconds: float = 10.0) -> list[str]:
    """Measure attentions of kind "auto" that have no choice yet, and keep what was found.

    Args:
        tasks: a graph's problems; those that are no attention of kind "auto" are passed over.
        timer: measures launches.
        seconds: the budget; what it does not reach keeps the rules' choice.

    Returns:
        a sentence for each attention: what was measured, now or by an earlier build, and what runs.

    Raises:
        LoweringError: a kernel broke the GPU's context, which only a new process can mend.
    """
    until = time.monotonic() + seconds
    found = {task.problem: task for task in tasks if isinstance(task, AttentionTask) and task.problem.kind == "auto"}
    return [_sentence(KernelsTask(task.problem, task.device), timer, until) for task in found.values()]


def _sentence(task: KernelsTask, timer: Timer, until: float) -> str:
    known = task.choices[task.device, task.problem]
    if known is not None:
        return f"{task}: {_remembered(task, known)}"
    if time.monotonic() >= until:
        return f"{task}: not measured, {NO_TIME}; runs {task.default().kind} by rule"
    try:
        result = _first_of_the_fastest(measure(task, timer, lambda: time.monotonic() >= until))
    except NotTuned as error:
        return f"{task}: not measured, {error}; runs {task.default().kind} by rule"
    task.choices.keep(task.device, task.problem, result.choice, provisional=True)
    times_ms = {config.kind: round(ms, 5) for config, ms in result.times_ms.items()}
    if result.complete:
        files.keep(task.device, [result.to_json() | {"times_ms": times_ms, "provisional": True}])
    reasons = {config.kind: why.removeprefix("ValueError: ") for config, why in (result.wrong | result.failed).items()}
    left_out = "".join(f"; not {kind}: {why}" for kind, why in reasons.items())
    return f"{task}: measured {_shown(times_ms)}; runs {result.choice.kind}{left_out}"


def _first_of_the_fastest(result: Result) -> Result:
    times = result.times_ms
    order = [config for config in result.task.candidates() if config in times]
    choice = next(config for config in order if times[config] <= NEAR * min(times.values()))
    return dataclasses.replace(result, choice=choice, choice_ms=times[choice])


def _remembered(task: KernelsTask, choice: AttentionChoice) -> str:
    problem = to_json(task.problem)
    entries = files.entries_of(task.device)
    entry = next((e for e in entries if e.get("kind") == "attention" and e.get("problem") == problem), {})
    when = f" on {entry['measured']}" if "measured" in entry else ""
    if isinstance(times_ms := entry.get("times_ms"), dict):
        return f"measured{when} {_shown(times_ms)}; runs {choice.kind}"
    if isinstance(ms := entry.get("choice_ms"), float):
        return f"tuned{when}; runs {choice.kind}, {ms:.4f} ms"
    return f"tuned; runs {choice.kind}"


def _shown(times_ms: dict[str, float]) -> str:
    return ", ".join(f"{kind} {ms:.4f} ms" for kind, ms in times_ms.items())
