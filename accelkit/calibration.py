"""`optimize(calibration=...)`: an iterable of inputs, brought into the form that a captured graph takes, one at a time.

    DataLoader, list, ... --> (tensor, tensor, ...) in the graph's order, on its device

A batch is what `example_inputs` is: a tensor, a tuple of positional arguments, or a dict of keyword arguments. One whose
shapes the captured program does not cover (a DataLoader's last, smaller batch) is left out and counted; one of another
structure or dtype is an InputError. Batches are never kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accelkit.capture import Program
from accelkit.errors import InputError
from accelkit.options import canonical_example, sizes_of

_AGAIN = "give a list or a DataLoader, which can be gone through again"


@dataclass
class Calibration:
    """The batches, and how many were looked at and used the last time."""

    batches: Iterable[Any]
    seen: int = 0
    used: int = 0

    def through(self, program: Program, whole: Program, sizes: dict[str, int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Each batch as the inputs of `program`'s graph.

        Args:
            program: what is built. whole: the captured program that it is a bucket of, or itself.
            sizes: the bucket's; batches are brought to it as the example is: rows cut or repeated.

        Raises:
            InputError: no batches (any more), one of another structure or dtype, or none whose shapes are covered.
        """
        self.seen = self.used = 0
        reason = ""
        for number, batch in enumerate(self.batches):
            self.seen += 1
            tensors = _flat(batch, number, whole)
            uncovered = whole.signature.covers(tensors)
            if uncovered is None and sizes:
                tensors = sizes_of(dataclasses.replace(whole, inputs=tensors), sizes)
            uncovered = uncovered or program.signature.covers(tensors)
            if uncovered is not None:
                reason = reason or f"batch {number}: {uncovered}"
                continue
            self.used += 1
            yield tensors
        if not self.seen:
            again = f" An iterator can be gone through only once: {_AGAIN}" if one_shot(self.batches) else ""
            raise InputError(f"calibration is empty: it gave no batch.{again}")
        if not self.used:
            raise InputError(
                f"calibration: none of the {self.seen} batches has shapes that were captured ({reason}). Capture with "
                "dynamic_shapes, or give batches of the example's shapes"
            )

    def note(self) -> str:
        """What was used, for the report."""
        left_out = (
            f"; {self.seen - self.used} left out, of shapes that are not covered" if self.seen > self.used else ""
        )
        batches = "batch" if self.used == 1 else "batches"
        return f"float16's range was checked on the example and {self.used} calibration {batches}{left_out}"


def as_calibration(value: Any) -> Calibration:
    """The `calibration=` argument, checked as far as it can be without taking a batch.

    Raises:
        InputError: not an iterable of batches.
    """
    if isinstance(value, torch.Tensor):
        raise InputError(
            "calibration is an iterable of inputs, not one tensor: calibration=[x], or x.split(batch_size)"
        )
    if isinstance(value, (str, bytes, Mapping)) or hasattr(value, "keys"):
        raise InputError(f"calibration is an iterable of inputs, not a {type(value).__name__}: calibration=[inputs]")
    if not isinstance(value, Iterable) and not hasattr(value, "__getitem__"):
        raise InputError(
            f"calibration is an iterable of inputs (a list, a DataLoader), not {type(value).__name__}; each is what "
            "example_inputs takes"
        )
    return Calibration(value)


def one_shot(batches: Any) -> bool:
    """Whether it is an iterator (a generator, say), which is used up when it has been gone through."""
    return hasattr(batches, "__next__")


def _flat(batch: Any, number: int, program: Program) -> tuple[torch.Tensor, ...]:
    signature = program.signature
    args, kwargs = canonical_example(batch, f"calibration batch {number}")
    try:
        tensors = signature.tensors_of(signature.leaves(args, kwargs))
    except InputError as error:
        labelled = isinstance(batch, (tuple, list)) and len(batch) == 2
        hint = " Where a DataLoader gives (inputs, labels): calibration=[x for x, _ in loader]" if labelled else ""
        raise InputError(f"calibration batch {number} does not fit the model: {error}.{hint}") from error
    for spec, tensor in zip(signature.tensors, tensors, strict=True):
        if tensor.dtype != spec.dtype:
            raise InputError(f"calibration batch {number}: {spec.name} is {tensor.dtype}, captured as {spec.dtype}")
    return tuple(t.to(example.device) for t, example in zip(tensors, program.inputs, strict=True))
