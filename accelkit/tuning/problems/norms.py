"""Layer and RMS norms of sums, and of rows that are looked up: rows and warps of a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit import ops
from accelkit.tuning.measuring import Task, Trial
from accelkit.tuning.problems.operands import Numbers, known, launches, least_seconds, named, widened

if TYPE_CHECKING:
    from accelkit.kernels.norms import NormConfig, NormProblem

_ENTRIES = 1024  # of a table: what is looked up lies apart


def of_layer_norm(x: Tensor, residual: Tensor, *_: Any, **__: Any) -> Task | None:
    """The problem of `accelkit.residual_layer_norm`."""
    return _of_sum("layer", x, residual)


def of_rms_norm(x: Tensor, residual: Tensor, *_: Any, **__: Any) -> Task | None:
    """The problem of `accelkit.residual_rms_norm`."""
    return _of_sum("rms", x, residual)


def of_embedding(indices: Sequence[Tensor], tables: Sequence[Tensor], *_: Any, **__: Any) -> Task | None:
    """The problem of `accelkit.embedding_layer_norm`."""
    from accelkit.kernels.norms import NormProblem

    rows = math.prod(torch.broadcast_shapes(*(i.shape for i in indices)))  # type: ignore[no-untyped-call]
    if not known(rows) or len({table.dtype for table in tables}) > 1:
        return None
    problem = NormProblem("embedding", rows, tables[0].shape[1], tables[0].dtype, len(tables))
    return NormTask(problem, tables[0].device)


def _of_sum(form: str, x: Tensor, residual: Tensor) -> Task | None:
    from accelkit.kernels.norms import NormProblem

    rows = math.prod(x.shape[:-1])
    if not known(rows, x.shape[-1]) or x.dtype is not residual.dtype:
        return None
    return NormTask(NormProblem(form, rows, x.shape[-1], x.dtype, 0), x.device)


class NormTask(Task):
    """A normalisation of rows."""

    def __init__(self, problem: NormProblem, device: torch.device) -> None:
        from accelkit.kernels import norms

        self.choices, self.problem, self.device = norms.chosen, problem, device

    def default(self) -> NormConfig:
        from accelkit.kernels import norms

        return norms.default_on(self.device, self.problem)

    def work(self) -> float:
        p = self.problem
        return least_seconds(0.0, 4.0 * p.rows * p.width * p.dtype.itemsize)

    def trial(self) -> Trial:
        return _EmbeddingTrial(self) if self.problem.form == "embedding" else _SumTrial(self)

    def __str__(self) -> str:
        p = self.problem
        what = {"layer": "residual layer norm", "rms": "residual RMS norm", "embedding": "embedding layer norm"}[p.form]
        return f"{what} {p.rows} x {p.width} {named(p.dtype, [f'{p.tables} tables'] * (p.tables > 0))}"


class _SumTrial(Trial):
    def __init__(self, task: NormTask) -> None:
        p, numbers = task.problem, Numbers(task.device)
        self.layer, self.launches = p.form == "layer", launches(task.work())
        self.x, self.residual = (numbers.normal(p.rows, p.width, dtype=p.dtype) for _ in range(2))
        self.weight, self.bias = (numbers.normal(p.width, dtype=p.dtype) for _ in range(2))

    def run(self, config: Any, turn: int) -> Sequence[Tensor]:
        from accelkit.kernels import norms

        if self.layer:
            return norms.residual_layer_norm(self.x, self.residual, self.weight, self.bias, 1e-5, None, config)
        return norms.residual_rms_norm(self.x, self.residual, self.weight, 1e-5, None, config)

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        x, residual, weight, bias = widened(dtype, self.x, self.residual, self.weight, self.bias)
        if self.layer:
            return ops.residual_layer_norm.meaning(x, residual, weight, bias, 1e-5)
        return ops.residual_rms_norm.meaning(x, residual, weight, 1e-5)


class _EmbeddingTrial(Trial):
    def __init__(self, task: NormTask) -> None:
        p, numbers = task.problem, Numbers(task.device)
        self.launches = launches(task.work())
        self.tables = [numbers.normal(_ENTRIES, p.width, dtype=p.dtype) for _ in range(p.tables)]
        self.indices = [numbers.integers(0, _ENTRIES, p.rows) for _ in range(p.tables)]
        self.weight, self.bias = (numbers.normal(p.width, dtype=p.dtype) for _ in range(2))

    def run(self, config: Any, turn: int) -> Sequence[Tensor]:
        from accelkit.kernels import norms

        return (norms.embedding_layer_norm(self.indices, self.tables, self.weight, self.bias, 1e-5, config),)

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        tables = widened(dtype, *self.tables)
        weight, bias = widened(dtype, self.weight, self.bias)
        return (ops.embedding_layer_norm.meaning(self.indices, tables, weight, bias, 1e-5),)
