"""A part of the graph that an engine runs no faster than PyTorch goes back to PyTorch.

    engine(part) measures slower than part in PyTorch  ->  the part's operators stay in PyTorch, with both times as the reason

Only where a graph is in pieces: each border between an engine and PyTorch costs a launch, copies and lost fusions, so that a
small piece may lose by being compiled. A graph in one piece is judged as a whole, in the report, against the original model.
Engine and PyTorch are timed in turn, on the values that the example gives there; a difference within the spread is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelkit.measure import interleaved

SECONDS = 0.3
"""Of measuring a piece: the rounds that this gives at a millisecond a call bring the quartiles within a few percent."""
MIN_ROUNDS = 5


def why_given_back(
    engine: Callable[..., Any], in_pytorch: Callable[..., Any], inputs: Sequence[torch.Tensor]
) -> str | None:
    """The reason, with both times, where the engine is slower by more than the spread; None where it may stay."""
    device = next((t.device for t in inputs if isinstance(t, torch.Tensor)), torch.device("cpu"))
    timings = interleaved(
        {"engine": lambda: engine(*inputs), "PyTorch": lambda: in_pytorch(*inputs)},
        seconds=SECONDS, min_rounds=MIN_ROUNDS, device=device,
    )  # fmt: skip
    mine, plain = timings["engine"], timings["PyTorch"]
    if not mine.slower_than(plain):
        return None
    return f"measured slower in an engine than in PyTorch: {mine} against {plain}"
