"""softmax(scale Q K^T + mask) V: which kernel computes it, and how the Triton kernel is launched.

Operands lie as in the graph: apart, or as slices of one product of Q, K and V. Masks are random of the graph's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit import ops
from accelkit.kernels import dependent_launch_on
from accelkit.ops import attention_choice, attention_kinds
from accelkit.ops.attention_choice import AttentionChoice, AttentionProblem
from accelkit.tuning.measuring import Task, Trial
from accelkit.tuning.problems.operands import Numbers, known, launches, least_seconds, named, widened

if TYPE_CHECKING:
    from accelkit.kernels.attention import AttentionConfig, VariableLengthProblem


def of_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any = None, causal: bool = False, scale: Any = None,
    kind: str = "auto",
) -> Task | None:  # fmt: skip
    """The problem of `accelkit.attention`: of kind "auto" which kernel, of kind "triton" its configuration."""
    problem = attention_choice.problem_of(query, key, value, mask, causal, kind)
    if problem is None or kind not in ("auto", "triton") or not known(*problem[:7]):
        return None
    return AttentionTask(problem, query.device)


def of_variable_length(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, causal: bool = False, scale: Any = None
) -> Task | None:
    """The problem of `accelkit.variable_length_attention`."""
    from accelkit.kernels.attention import variable_length_problem

    if not known(*query.shape, *key.shape, *value.shape, offsets.shape[0] - 1, longest):
        return None
    return VariableLengthTask(variable_length_problem(query, key, offsets, longest, causal), query.device)


class AttentionTask(Task):
    """Attention of operands of one length each."""

    def __init__(self, problem: AttentionProblem, device: torch.device) -> None:
        self.choices, self.problem, self.device = attention_choice.chosen, problem, device

    def default(self) -> AttentionChoice:
        return attention_choice.default_on(self.device, self.problem)

    def work(self) -> float:
        p = self.problem
        numbers = 2 * p.batch * (p.heads * p.length + p.key_heads * p.keys) * p.width
        return least_seconds(4.0 * p.batch * p.heads * p.length * p.keys * p.width, numbers * p.dtype.itemsize)

    def trial(self) -> Trial:
        return _AttentionTrial(self)

    def __str__(self) -> str:
        p = self.problem
        sizes = f"{p.batch} x {p.heads} x {p.length}{f' to {p.keys}' * (p.keys != p.length)} x {p.width}"
        extras = [f"mask {p.mask}"] * (p.mask != "none") + ["causal"] * p.causal + ["tf32"] * p.tf32
        return f"attention {sizes} {named(p.dtype, [*extras, *([p.kind] * (p.kind != 'auto'))])}"


class _AttentionTrial(Trial):
    def __init__(self, task: AttentionTask) -> None:
        p, numbers = task.problem, Numbers(task.device)
        self.causal, self.launches = p.causal, launches(task.work())
        self.query, self.key, self.value = _operands(numbers, p)
        self.mask = _mask(numbers, p)

    def run(self, config: AttentionChoice, turn: int) -> Sequence[Tensor]:
        operands = (self.query, self.key, self.value, self.mask, self.causal)
        if (why := attention_kinds.refusal_of(config.kind, *operands)) is not None:
            raise ValueError(why)
        return (attention_kinds.run(config.kind, *operands, None, config.config),)

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        parts = []
        for i in range(self.query.shape[0]):  # one at a time: plain attention in float64 writes its scores out
            mask = self.mask if self.mask is None else self.mask[i : i + 1]
            query, key, value, mask = widened(
                dtype, self.query[i : i + 1], self.key[i : i + 1], self.value[i : i + 1], mask
            )
            parts.append(ops.attention.meaning(query, key, value, mask, self.causal))
        return (torch.cat(parts),)


def _operands(numbers: Numbers, p: AttentionProblem) -> tuple[Tensor, Tensor, Tensor]:
    if p.packed and p.length == p.keys and p.width == p.value_width:
        rows = numbers.normal(p.batch, p.length, p.heads + 2 * p.key_heads, p.width, dtype=p.dtype)
        split = p.heads + p.key_heads
        return rows[:, :, : p.heads], rows[:, :, p.heads : split], rows[:, :, split:]
    return (
        numbers.normal(p.batch, p.length, p.heads, p.width, dtype=p.dtype),
        numbers.normal(p.batch, p.keys, p.key_heads, p.width, dtype=p.dtype),
        numbers.normal(p.batch, p.keys, p.key_heads, p.value_width, dtype=p.dtype),
    )


def _mask(numbers: Numbers, p: AttentionProblem) -> Tensor | None:
    """A mask of the problem's form; every query keeps the first key."""
    if p.mask == "none":
        return None
    rows = p.length if p.mask.endswith("query and key") else 1
    if p.mask.startswith("additive"):
        return numbers.normal(p.batch, 1, rows, p.keys, dtype=p.dtype)
    kept = numbers.integers(1, p.keys + 1, p.batch, 1, rows, 1)
    return torch.arange(p.keys, device=numbers.device) < kept


class VariableLengthTask(Task):
    """Attention within packed sequences."""

    def __init__(self, problem: VariableLengthProblem, device: torch.device) -> None:
        from accelkit.kernels import attention

        self.choices, self.problem, self.device = attention.chosen, problem, device

    def default(self) -> AttentionConfig:
        from accelkit.kernels import attention

        p = self.problem
        found = attention.variable_length_default(p.longest, p.width, p.dtype)
        return found._replace(pdl=dependent_launch_on(self.device))

    def work(self) -> float:
        p = self.problem
        numbers = 2 * p.rows * (p.heads + p.key_heads) * p.width
        return least_seconds(2.0 * p.rows * p.longest * p.heads * p.width, numbers * p.dtype.itemsize)

    def trial(self) -> Trial:
        return _VariableLengthTrial(self)

    def __str__(self) -> str:
        p = self.problem
        sizes = f"{p.sequences} x {p.heads} x at most {p.longest} x {p.width}, {p.rows} rows,"
        return f"variable-length attention {sizes} {named(p.dtype, ['causal'] * p.causal)}"


class _VariableLengthTrial(Trial):
    def __init__(self, task: VariableLengthTask) -> None:
        p, numbers = task.problem, Numbers(task.device)
        self.longest, self.causal, self.launches = p.longest, p.causal, launches(task.work())
        rows = numbers.normal(p.rows, p.heads + 2 * p.key_heads, p.width, dtype=p.dtype)
        split = p.heads + p.key_heads
        self.operands = (rows[:, : p.heads], rows[:, p.heads : split], rows[:, split:])
        # lengths drawn evenly up to the longest, which is there; those that do not fit the rows are cut
        lengths = numbers.integers(1, p.longest + 1, p.sequences)
        lengths[0] = p.longest
        ends = lengths.cumsum(0).clamp(max=p.rows)
        self.offsets = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        self.count = int(ends[-1])

    def run(self, config: Any, turn: int) -> Sequence[Tensor]:
        from accelkit.kernels import attention

        query, key, value = self.operands
        found = attention.variable_length_attention(
            query, key, value, self.offsets, self.longest, self.causal, None, config
        )
        return (found[: self.count],)

    def plain(self, dtype: torch.dtype | None) -> Sequence[Tensor]:
        query, key, value = widened(dtype, *self.operands)
        found = ops.variable_length_attention.meaning(query, key, value, self.offsets, self.longest, self.causal)
        return (found[: self.count],)
