"""Attentions that run in PyTorch: on request, since only the whole model's time tells whether that is faster.

    layer | attention | layer   in one engine   ->   engine, accelkit.attention in PyTorch, engine

Lowering cuts the graph there, and queries, keys, values and the residual stream cross as [batch, length, heads, width] and
[batch, length, width], as they lie. Nothing is chosen by measuring: on TensorRT 8.6 and an H200 an attention in an engine of its
own took longer than a whole encoder block with it, so that its time alone says nothing of its time inside a fused region.
"""

from __future__ import annotations

from torch import fx

from accelkit import ops

ATTENTION = ops.attention.OPERATOR.overload
PLACES = ("engine", "pytorch")


def attentions(graph: fx.GraphModule) -> dict[str, str]:
    """The attentions of a graph by node, and why they run in PyTorch."""
    return {node.name: "runs in PyTorch: asked for" for node in graph.graph.nodes if node.target is ATTENTION}
