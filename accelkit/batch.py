"""The batch of a graph: the dynamic first dimension that its inputs share, and their rows repeated to another size.

x[s0, 128, 768], mask[s0, 128], table[30522, 768]  ->  Batch("s0", batched=(True, True, False))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from accelkit import graph as graphs

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


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


def between(points: Mapping[int, float], rows: int) -> float:
    """What a batch of `rows` takes, by what other sizes take: on the line between two, below the smallest in proportion (less
    than it really takes), above the largest in proportion to it.

    >>> between({8: 6.0, 32: 14.0}, 20), between({8: 6.0}, 4), between({8: 6.0}, 16)
    (10.0, 3.0, 12.0)
    """
    known = {0: 0.0, **points}
    low = max(size for size in known if size <= rows)
    high = min((size for size in known if size >= rows), default=None)
    if high is None:
        return known[low] * rows / low
    return known[low] if low == high else known[low] + (known[high] - known[low]) * (rows - low) / (high - low)
