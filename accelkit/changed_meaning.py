"""What the error is measured against where a pass changes, on request, what the model computes (sparse attention).

    captured -> passes -> before | the pass | after -> passes -> compiled
    float64 of `before` against float64 of `captured`: the passes up to there      compiled against float64 of `after`: the rest

So every other pass is held to the model as ever, and what is left unproved is the one change that was asked for; how far it
leads away from the model is told.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.accuracy import check_outputs, reference_outputs, relative_error
from accelkit.errors import AccuracyError
from accelkit.precision import Precision


@dataclass(frozen=True)
class MeaningChange:
    """A pass's change of what a graph computes.

    Attributes:
        by: the pass. options: the pass with its options. reason: what the graph computes now, in its words.
        before, after: copies of the graph; tensors are shared.
    """

    by: str
    options: str
    reason: str
    before: fx.GraphModule
    after: fx.GraphModule

    def note(self) -> str:
        return (
            f"{self.options} changes what the model computes, as asked: {self.reason}; inputs that no engine covers run on "
            "the model as it was"
        )


def snapshot(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that later passes do not reach; tensors are shared."""
    return fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)


def follow(
    change: MeaningChange,
    inputs: Sequence[torch.Tensor],
    reference: Sequence[Any],
    plain: Sequence[Any] | None,
    names: Sequence[str],
    precision: Precision,
    tolerance: float | None,
) -> tuple[Sequence[Any], Sequence[Any] | None, str]:
    """What to judge by after a change.

    Args:
        reference: float64 outputs before it. plain: plain PyTorch's in the precision, or None where it could not run.
        names: of the outputs.

    Returns:
        float64 outputs after it, plain PyTorch's error around them, and a sentence on how far the change leads away.

    Raises:
        AccuracyError: the graph before the change is further from `reference` than allowed.
    """
    before = reference_outputs(change.before, inputs)
    wrong = [o for o in check_outputs(before, reference, plain, names, precision, tolerance) if not o.ok]
    if wrong:
        listed = ", ".join(f"{o.name} is off by {o.error:.2e} (allowed {o.allowed:.2e})" for o in wrong)
        raise AccuracyError(f"the passes before {change.by} compute something else than the model: {listed}")
    after = reference_outputs(change.after, inputs)
    distances = [
        f"{name} {relative_error(new, old):.2e}"
        for name, new, old in zip(names, after, reference, strict=True)
        if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor)
    ]
    note = (
        f"errors are against a float64 run of the graph after {change.by}; its distance from the model as it was: "
        f"{', '.join(distances)}"
    )
    return after, None if plain is None else list(map(_carried, plain, reference, after)), note


def _carried(plain: Any, reference: Any, after: Any) -> Any:
    """Plain PyTorch's error, put on the new truth: nobody runs the changed model in plain PyTorch."""
    if not all(isinstance(t, torch.Tensor) for t in (plain, reference, after)) or plain.shape != after.shape:
        return plain
    if not after.is_floating_point():
        return torch.where(plain == reference, after, plain)
    moved = after + (plain.to(after.dtype) - reference)
    return torch.where(plain.isfinite() & reference.isfinite(), moved, plain.to(after.dtype))
