"""activation(x W^T + bias) + residual by cuBLASLt or by our kernels; before a layer norm with K split.

Weights are other ones at each launch: a model reads each of its own once a call, from memory and not from a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit import ops
from accelkit.kernels import linear
from accelkit.tuning.measuring import Task, Trial
from accelkit.tuning.problems.operands import Numbers, known, launches, least_seconds, named, widened

if TYPE_CHECKING:
    from accelkit.kernels.split import SplitConfig, SplitProblem


def of_linear(
    x: Tensor, weight: Tensor, bias: Any, activation: str = "none", residual: Any = None, rows: Any = None
) -> Task | None:
    """The problem of `accelkit.linear_activation`."""
    count = math.prod(x.shape[:-1])
    if not known(count, *weight.shape):
        return None
    features, width = weight.shape
    problem = linear.LinearProblem(count, features, width, x.dtype, activation, residual is not None, rows is not None)
    return LinearTask(problem, x.device)


def of_patches(image: Tensor, weight: Tensor, bias: Any) -> Task | None:
    """The matrix product in `accelkit.patch_embedding`."""
    features, channels, height, width = weight.shape
    rows = image.shape[0] * (image.shape[2] // height) * (image.shape[3] // width)
    if not known(rows):
        return None
    problem = linear.LinearProblem(rows, features, channels * height * width, image.dtype, "none", False, False)
    return LinearTask(problem, image.device)


def of_split(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Task | None:
    """The problem of `accelkit.linear_residual_layer_norm`."""
    from accelkit.kernels.split import SplitProblem

    count = math.prod(x.shape[:-1])
    if not known(count, *weight.shape):
        return None
    features, width = weight.shape
    return SplitTask(SplitProblem(count, features, width, x.dtype), x.device)


class LinearTask(Task):
    """A linear layer."""

    def __init__(self, problem: linear.LinearProblem, device: torch.device) -> None:
        self.choices, self.problem, self.device = linear.chosen, problem, device

    def default(self) -> linear.LinearConfig:
        return linear.default_on(self.device, self.problem)

    def work(self) -> float:
        p = self.problem
        numbers = p.rows * p.width + p.features * p.width + (1 + p.residual) * p.rows * p.features
        return least_seconds(2.0 * p.rows * p.features * p.width, numbers * p.dtype.itemsize)

    def trial(self) -> Trial:
        return _LinearTrial(self)

    def __str__(self) -> str:
        p = self.problem
        extras = [p.activation] * (p.activation != "none") + ["residual"] * p.residual + ["counted"] * p.counted
        return f"linear {p.rows} x {p.width} to {p.features} {named(p.dtype, extras)}"


class _LinearTrial(Trial):
    def __init__(self, task: LinearTask) -> None:
        p, numbers = task.problem, Numbers(task.device)
        self.activation, self.launches = p.activation, launches(task.work())
        self.x = numbers.normal(p.rows, p.width, dtype=p.dtype)
        self.weights = numbers.copies(numbers.normal(p.features, p.width, dtype=p.dtype, scale=p.width**-0.5))
        self.bias = numbers.normal(p.features, dtype=p.dtype)
        self.residual = numbers.normal(p.rows, p.features, dtype=p.dtype) if p.residual else None
        self.count = max(1, p.rows // 2) if p.counted else p.rows
        self.rows = torch.tensor([self.count], dtype=torch.int32, device=task.device) if p.counted else None

    def run(self, config: Any, turn: int) -> Sequence[Tensor]:
        weight = self.weights[turn % len(self.weights)]
        y = linear.linear_activation(self.x, weight, self.bias, self.activation, self.residual, self.rows, config)
        return (y[: self.count],)

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        x, weight, bias, residual = widened(dtype, self.x, self.weights[0], self.bias, self.residual)
        residual = None if residual is None else residual[: self.count]
        return (ops.linear_activation.meaning(x[: self.count], weight, bias, self.activation, residual),)


class SplitTask(Task):
    """A linear layer before a residual and a layer norm, K split."""

    def __init__(self, problem: SplitProblem, device: torch.device) -> None:
        from accelkit.kernels import split

        self.choices, self.problem, self.device = split.chosen, problem, device

    def default(self) -> SplitConfig:
        from accelkit.kernels import split

        return split.default_on(self.device, self.problem)

    def work(self) -> float:
        p = self.problem
        numbers = p.rows * p.width + p.features * p.width + 3 * p.rows * p.features
        return least_seconds(2.0 * p.rows * p.features * p.width, numbers * p.dtype.itemsize)

    def trial(self) -> Trial:
        return _SplitTrial(self)

    def __str__(self) -> str:
        p = self.problem
        return f"split linear {p.rows} x {p.width} to {p.features} {named(p.dtype, ['residual layer norm'])}"


class _SplitTrial(Trial):
    def __init__(self, task: SplitTask) -> None:
        p, numbers = task.problem, Numbers(task.device)
        self.launches = launches(task.work())
        self.x = numbers.normal(p.rows, p.width, dtype=p.dtype)
        self.weights = numbers.copies(numbers.normal(p.features, p.width, dtype=p.dtype, scale=p.width**-0.5))
        self.residual = numbers.normal(p.rows, p.features, dtype=p.dtype)
        self.bias, self.norm_weight, self.norm_bias = (numbers.normal(p.features, dtype=p.dtype) for _ in range(3))

    def run(self, config: Any, turn: int) -> Sequence[Tensor]:
        from accelkit.kernels import split

        weight = self.weights[turn % len(self.weights)]
        return split.linear_residual_layer_norm(
            self.x, weight, self.bias, self.residual, self.norm_weight, self.norm_bias, 1e-5, config
        )

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        x, weight, bias, residual = widened(dtype, self.x, self.weights[0], self.bias, self.residual)
        norm_weight, norm_bias = widened(dtype, self.norm_weight, self.norm_bias)
        return ops.linear_residual_layer_norm.meaning(x, weight, bias, residual, norm_weight, norm_bias, 1e-5)
