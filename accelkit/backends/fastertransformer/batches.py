"""Batch sizes to record: examples of other sizes than the caller's, and padding up to a recorded one.

recorded: 1, 8, 32        a batch of 6  ->  the recording of 8, rows 6 and 7 hold anything, results[:6]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from accelkit.backends.fastertransformer.recording import Recording
from accelkit.batch import Batch, Shapes, between
from accelkit.errors import InputError


def shapes_of(inputs: Sequence[Tensor]) -> Shapes:
    """What recordings are looked up by."""
    return tuple([(i.shape, i.dtype) for i in inputs])


def examples_of(
    sizes: Sequence[int], batch: Batch | str, inputs: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, ...]], list[str]]:
    """Example inputs to record, from the largest batch on, and what could not be had.

    Raises:
        InputError: a size outside the graph's range.
    """
    if isinstance(batch, str):
        return [tuple(inputs)], [f"capture_sizes has no effect: {batch}"] * bool(sizes)
    if wrong := [s for s in sizes if s > batch.largest]:
        raise InputError(
            f"fastertransformer: capture_sizes {wrong} are more than the dynamic dimension's {batch.largest:.0f} at most"
        )
    wanted = {*sizes, batch.rows(inputs)}
    return [batch.resized(inputs, size) for size in sorted(wanted, reverse=True)], []


@dataclass(frozen=True)
class Padding:
    """Where a batch between two recorded sizes runs as the larger one.

    Attributes:
        batch: the dynamic dimension.
        recordings: what there is.
        times_ms: recorded size -> milliseconds of its replay and of the same batch without a CUDA graph.
    """

    batch: Batch
    recordings: Mapping[Shapes, Recording]
    times_ms: Mapping[int, tuple[float, float]]

    def recording_for(self, inputs: Sequence[Tensor]) -> Recording | None:
        """The next larger recording, where it is faster than running this batch without one."""
        rows = self.batch.rows(inputs)
        size = min((s for s in self.times_ms if s > rows), default=None)
        if size is None or self.times_ms[size][0] > between(
            {s: plain for s, (_, plain) in self.times_ms.items()}, rows
        ):
            return None
        if any(i.shape[0] != rows for i, b in zip(inputs, self.batch.batched, strict=True) if b):
            return None
        return self.recordings.get(self.batch.shapes_at(inputs, size))
