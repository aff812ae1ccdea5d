"""A kind of problem that needs no GPU: x + 1 by candidates that are right, wrong or broken, timed by a clock that tests set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accelkit.tuning import files
from accelkit.tuning.choices import Choices
from accelkit.tuning.measuring import Task, Trial

ENVIRONMENT = files.Environment("NVIDIA H200", "9.0", "580.1", "2.11", "13.0", "3.6", "0123abcd")
GPU = torch.device("cuda", 0)


class Problem(NamedTuple):
    rows: int
    dtype: torch.dtype = torch.float16


class Inner(NamedTuple):
    warps: int


class Config(NamedTuple):
    name: str
    inner: Inner | None = None


class Fake(Task):
    """x + 1 for `rows` numbers; a candidate does what its name says."""

    names: tuple[str, ...] = ("slow", "fast")
    ran: list[str]

    def __init__(self, kind: Choices[Problem, Config], rows: int = 4, device: str = "cpu") -> None:
        self.choices, self.problem, self.device = kind, Problem(rows), torch.device(device)
        self.ran = []

    def default(self) -> Config:
        return Config("default")

    def candidates(self) -> list[Config]:
        return [Config("default"), *map(Config, self.names)]

    def work(self) -> float:
        return float(self.problem.rows)

    def trial(self) -> Trial:
        if "no operands" in self.names:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return FakeTrial(self)

    def __str__(self) -> str:
        return f"fake {self.problem.rows}"


class FakeTrial(Trial):
    def __init__(self, task: Fake) -> None:
        self.task = task
        self.x = torch.randn(task.problem.rows, dtype=torch.float16)

    def run(self, config: Config, turn: int) -> Sequence[Tensor]:
        self.task.ran.append(config.name)
        name = config.name
        if name == "raises":
            raise RuntimeError("PTXAS error: registers\nmore lines")
        if name == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "wrong":
            return (self.x + 1.1,)
        if name == "not a number":
            return (torch.full_like(self.x, float("nan")),)
        return ((self.x + 1)[:-1],) if name == "other shape" else (self.x + 1,)

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        if dtype is torch.float64 and "float64 does not fit" in self.task.names:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (self.x.to(dtype or self.x.dtype) + 1,)


def clock(times: dict[str, Sequence[float]]) -> Callable[..., Callable[[], float]]:
    """A timer that gives each candidate these milliseconds, one round after another, over and over."""

    def timer(launch: Any, launches: int) -> Callable[[], float]:
        (config,) = launch.args
        if config.name == "not recorded":
            raise ValueError("an operator that a CUDA graph cannot hold")
        taken = times[config.name]
        rounds = iter(range(10**6))
        return lambda: taken[next(rounds) % len(taken)]

    return timer
