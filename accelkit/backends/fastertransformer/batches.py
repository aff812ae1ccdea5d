"""Batch sizes of a dynamic graph: which inputs have the batch, examples of other sizes, and padding up to a recorded size.

recorded: 1, 8, 32        a batch of 6  ->  the recording of 8, rows 6 and 7 hold anything, results[:6]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from accelkit import graph as graphs
from accelkit.backends.fastertransformer.recording import Recording
from accelkit.errors import InputError

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


def shapes_of(inputs: Sequence[Tensor]) -> Shapes:
    """What recordings are looked up by."""
    return tuple([(i.shape, i.dtype) for i in inputs])


@dataclass(frozen=True)
class Batch:
    """The dynamic first dimension.

    Attributes:
        symbol: its name in the graph's shapes.
        batched: for each input, whether it has it.
        largest: the largest size, or infinity.
    """

    symbol: str
    batched: tuple[bool, ...]
    largest: float

    def rows(self, inputs: Sequence[Tensor]) -> int:
        return next(i.shape[0] for i, b in zip(inputs, self.batched, strict=True) if b)

    def resized(self, inputs: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
        """The inputs with `size` rows, repeated to grow."""
        rows = torch.arange(size, device=inputs[0].device) % self.rows(inputs)
        return tuple(i.index_select(0, rows) if b else i for i, b in zip(inputs, self.batched, strict=True))

    def shapes_at(self, inputs: Sequence[Tensor], size: int) -> Shapes:
        return tuple(
            (torch.Size((size, *i.shape[1:])) if b else i.shape, i.dtype)
            for i, b in zip(inputs, self.batched, strict=True)
        )


def batch_of(graph: fx.GraphModule) -> Batch | str:
    """The graph's batch, or why it has none that can be told apart."""
    values = [graphs.val(node) for node in graph.graph.find_nodes(op="placeholder")]
    symbols = {str(v.shape[0]) for v in values if v.ndim and not isinstance(v.shape[0], int)}
    if not symbols:
        return "no input has a dynamic first dimension"
    if len(symbols) > 1 or not (symbol := symbols.pop()).isidentifier():
        return "the inputs' first dimensions are not one and the same dynamic size"
    first = next(v.shape[0] for v in values if v.ndim and str(v.shape[0]) == symbol)
    if any(
        first.node.expr in size.node.expr.free_symbols
        for v in values
        for size in v.shape[1:]
        if not isinstance(size, int)
    ):
        return "the batch is also a size of another dimension"
    upper = first.node.shape_env.bound_sympy(first.node.expr).upper
    largest = float(upper) if upper.is_finite else float("inf")
    return Batch(symbol, tuple(v.ndim > 0 and str(v.shape[0]) == symbol for v in values), largest)


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
        if size is None or self.times_ms[size][0] > self._unrecorded_ms(rows):
            return None
        if any(i.shape[0] != rows for i, b in zip(inputs, self.batch.batched, strict=True) if b):
            return None
        return self.recordings.get(self.batch.shapes_at(inputs, size))

    def _unrecorded_ms(self, rows: int) -> float:
        """Between two measured sizes; below the smallest in proportion, which is less than it takes."""
        points = {0: 0.0} | {size: plain for size, (_, plain) in self.times_ms.items()}
        low, high = max(s for s in points if s <= rows), min(s for s in points if s >= rows)
        if low == high:
            return points[low]
        return points[low] + (points[high] - points[low]) * (rows - low) / (high - low)
