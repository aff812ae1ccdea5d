"""Public helpers for those who write passes and backends, and want to test them as accelkit tests its own.

graph = trace(MyModule(), torch.randn(2, 8))
record = apply(MyPass(), graph)
assert graph_text(graph) == '''...'''
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from accelkit.capture import capture
from accelkit.graph import graph_text
from accelkit.pass_api import GraphPass
from accelkit.pass_runner import PassRecord, run_passes

__all__ = ["apply", "graph_text", "relative_error", "run", "trace"]


def trace(model: nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> fx.GraphModule:
    """The accelkit graph of a module for these inputs, exactly as `optimize` captures it (no pass has run)."""
    return capture(model, args, kwargs, dynamic_shapes=dynamic_shapes).graph


def apply(one: GraphPass | Sequence[GraphPass], graph: fx.GraphModule) -> PassRecord:
    """Run a pass (or several; the last one's record is returned) on `graph` in place, under all of the runner's invariants."""
    return run_passes(graph, [one] if isinstance(one, GraphPass) else one)[-1]


def run(graph: fx.GraphModule, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run a graph on real tensors, without gradients."""
    with torch.no_grad():
        return tuple(graph(*inputs))


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64; NaN never passes a comparison."""
    from accelkit.accuracy import relative_error as measure

    return measure(result, reference)
