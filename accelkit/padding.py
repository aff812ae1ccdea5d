"""A batch between two buckets runs in the next larger one.

    buckets 1, 8, 32        a batch of 6  ->  its last row three times  ->  the program of 8  ->  results[:6]

Where the model provably computes each row from that row alone (`accelkit.rowwise`), the rows that are added change nothing in
the others; they repeat one of the caller's own, so that none of them divides by zero or looks up what is not there. It is
done where the larger bucket measured faster than the original model would be at the batch's own size, and always where there is
no original model to fall back on. Backends have a say: `Backend.pads_batches`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from accelkit.batch import Batch, batch_of, between
from accelkit.capture import Program
from accelkit.errors import PassError
from accelkit.pass_runner import run_passes
from accelkit.rowwise import why_not_rowwise

if TYPE_CHECKING:
    from accelkit.compiled import Built, Variant
    from accelkit.pipeline import Plan


@dataclass(frozen=True)
class Padded:
    """Where one batch size goes: a variant of more rows.

    Attributes:
        variant: what runs. batched: which inputs have rows.
        rows: the caller's. size: the variant's.
    """

    variant: Variant
    batched: tuple[bool, ...]
    rows: int
    size: int

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The results of the caller's rows."""
        with torch.no_grad():
            added = self.size - self.rows
            grown = [
                torch.cat((t, t[-1:].expand(added, *t.shape[1:]))) if b else t
                for t, b in zip(tensors, self.batched, strict=True)
            ]
            return tuple(result[: self.rows] for result in self.variant.lowered.call(*grown))


@dataclass(frozen=True)
class Padding:
    """The buckets of a model whose rows are independent.

    Attributes:
        program: as captured, its batch dynamic. batch: which inputs have it.
        variants: the buckets.
        times_ms: by a variant's label: its own milliseconds and the original model's, where they were measured.
        required: there is no original model to fall back on.
    """

    program: Program
    batch: Batch
    variants: tuple[Variant, ...]
    times_ms: Mapping[str, tuple[float, float]]
    required: bool

    def route(self, tensors: Sequence[Tensor]) -> Padded | str:
        """Where these inputs, which no bucket covers as they are, run; or why they are not padded ("": no bucket is larger)."""
        plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        if not plain or self.program.signature.covers(tensors) is not None or (rows := self.batch.rows(tensors)) < 1:
            return ""
        fitting = {size: variant for variant in self.variants if (size := self._fits(variant, tensors))}
        if not (larger := [size for size in fitting if size > rows]):
            return ""
        size = min(larger)
        variant = fitting[size]
        if not self.required and variant.label in self.times_ms:
            own = {s: self.times_ms[v.label][1] for s, v in fitting.items() if v.label in self.times_ms}
            padded_ms, original_ms = self.times_ms[variant.label][0], between(own, rows)
            if padded_ms > original_ms:
                return (
                    f"not padded to {variant.label}, which takes {padded_ms:.3g} ms where the original model takes about "
                    f"{original_ms:.3g} ms"
                )
        return Padded(variant, self.batch.batched, rows, size)

    def _fits(self, variant: Variant, tensors: Sequence[Tensor]) -> int:
        """The variant's batch size if it takes inputs like these but for that, else 0."""
        specs = variant.signature.tensors
        size = next(s.shape[0] for s, b in zip(specs, self.batch.batched, strict=True) if b)
        if not isinstance(size, int):
            return 0
        resized = [
            t[:1].expand(size, *t.shape[1:]) if b else t for t, b in zip(tensors, self.batch.batched, strict=True)
        ]
        return size if variant.signature.covers(resized) is None else 0


def padding_of(plan: Plan, built: Built) -> Padding | str | None:
    """The padding of a built model, why there is none, or None where there are no buckets of batch sizes."""
    program = built.program
    if program is None or not plan.buckets:
        return None
    batch = batch_of(program.graph)
    if isinstance(batch, str) or program.signature.dims.get(batch.symbol) not in plan.buckets:
        return None
    if not plan.backend.pads_batches():
        return f"{plan.backend.name} does not pad"
    if any(record.meaning is not None for found in built.report.variants for record in found.ledger):
        return "a pass changes what the model computes, and what was proved of the model may not hold any more"
    if (reason := _why_not_rowwise(program.graph, batch, plan)) is not None:
        return reason
    times_ms = {
        variant.label: (found.timings["compiled"].median_ms, found.timings["original"].median_ms)
        for variant, found in zip(built.variants, built.report.variants, strict=True)
        if {"compiled", "original"} <= set(found.timings)
    }
    return Padding(program, batch, built.variants, times_ms, not plan.fallback or built.fallback is None)


def _why_not_rowwise(graph: fx.GraphModule, batch: Batch, plan: Plan) -> str | None:
    reason = why_not_rowwise(graph, batch.symbol)
    if reason is None or not plan.graph_passes:
        return reason
    # passes leave fewer forms: nn.MultiheadAttention moves the batch about, the attention that is recognised in it does not
    rewritten = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    try:
        with torch.no_grad():
            run_passes(rewritten, plan.graph_passes)
    except PassError as error:  # the buckets' own graphs have been through the same passes
        return f"{reason}, and the passes cannot rewrite it at every batch size ({error})"
    return why_not_rowwise(rewritten, batch.symbol)


def sentence(found: Padding | str) -> str:
    """For the report."""
    if isinstance(found, str):
        return f"none, a batch between two buckets is not covered: {found}"
    condition = "" if found.required else " where that measured faster than the original model"
    return f"a batch between two buckets runs in the larger one{condition}: its rows are independent"
