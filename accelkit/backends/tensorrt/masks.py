"""attention(q, k, v, mask)  ->  attention(q, k, v, finite mask) * whether a query sees any key

The zeros of queries that see nothing are one factor on the result, made once from the mask: guards between attention's own
operators keep TensorRT from fusing these. Where the mask provably hides no whole row there is no factor.

The finite mask adds half of the lowest number: with the lowest itself, a score below zero is minus infinity in half precision,
and a row of those NaN, which no factor makes 0. Masks beside causal attention stay as they are.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.onnx_split import call

aten = torch.ops.aten
ATTENTION = ops.attention.OPERATOR.overload
_MOVES = (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.permute.default,
)  # fmt: skip


def finite_masks(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with finite masks; the graph itself where there is nothing to do."""
    names = {node.name for node in graph.graph.nodes if node.target is ATTENTION and _masked(node)}
    if not names:
        return graph
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    known: dict[str, tuple[fx.Node, fx.Node | None]] = {}
    for node in [n for n in graph.graph.nodes if n.name in names]:
        _rewrite(graph, node, known)
    graph.recompile()
    return graph


def _masked(node: fx.Node) -> bool:
    bound = graphs.bound_arguments(node) or {}
    return bound["mask"] is not None and not bound["causal"]


def _rewrite(graph: fx.GraphModule, node: fx.Node, known: dict[str, tuple[fx.Node, fx.Node | None]]) -> None:
    bound = graphs.bound_arguments(node) or {}
    mask, dtype = bound["mask"], graphs.val(bound["query"]).dtype
    # each layer may bring its own view of one mask
    key = f"{mask.target} {mask.args} {mask.kwargs} {dtype}" if mask.target in _MOVES else f"{mask.name} {dtype}"
    if key not in known:
        with graph.graph.inserting_before(node):
            known[key] = _finite(graph, mask, dtype), None if hides_no_row(graph, mask) else _seen(graph, mask, dtype)
    added, seen = known[key]
    with graph.graph.inserting_before(node):
        arguments = (bound["query"], bound["key"], bound["value"], added, False, bound["scale"], bound["kind"])
        result = attended = call(graph, ATTENTION, arguments)
        if seen is not None:
            result = call(graph, aten.mul.Tensor, (attended, seen))
    node.replace_all_uses_with(result)
    graph.graph.erase_node(node)
    attended.name = node.name  # what the parser refuses is known by this name


def _finite(graph: fx.GraphModule, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The mask as finite numbers, at least half of the lowest."""
    lowest = float(torch.finfo(dtype).min) / 2
    if graphs.val(mask).dtype is torch.bool:
        hidden = call(graph, aten.to.dtype, (call(graph, aten.logical_not.default, (mask,)), dtype))
        return call(graph, aten.mul.Tensor, (hidden, lowest))
    return call(graph, aten.clamp.default, (_cast(graph, mask, dtype), lowest))


def _seen(graph: fx.GraphModule, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    """[batch, length, heads, 1], or sizes of 1: 1 where a query sees a key, else 0."""
    boolean = graphs.val(mask).dtype is torch.bool
    visible = mask if boolean else call(graph, aten.gt.Scalar, (mask, -math.inf))
    # a maximum of booleans, and not of numbers, which the exporter takes in float32
    seen = call(graph, aten.to.dtype, (call(graph, aten.any.dim, (visible, -1, True)), dtype))
    while graphs.val(seen).dim() < 4:
        seen = call(graph, aten.unsqueeze.default, (seen, 0))
    heads, length = graphs.val(seen).shape[1:3]
    if isinstance(heads, int) and isinstance(length, int) and heads == length == 1:
        return seen
    return call(graph, aten.permute.default, (seen, [0, 2, 1, 3]))


def _cast(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if graphs.val(node).dtype is dtype else call(graph, aten.to.dtype, (node, dtype))


def hides_no_row(graph: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether every query provably sees a key: a constant that says so, or numbers that were chosen between finite ones."""
    if _is_constant(mask):
        value = graphs.attribute(graph, str(mask.target))
        seen = value if value.dtype is torch.bool else value > -math.inf
        return bool((seen.any(-1) if seen.dim() else seen).all())
    return _is_finite(graph, mask, graphs.val(mask).dtype)


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and node not in graphs.written_roots(node.graph)


def _is_finite(graph: fx.GraphModule, value: Any, dtype: torch.dtype) -> bool:
    """Of a node, or of a number that becomes one of this dtype."""
    if isinstance(value, (int, float)):
        return dtype.is_floating_point and abs(value) <= torch.finfo(dtype).max  # False for NaN
    if not isinstance(value, fx.Node) or graphs.val(value).dtype is not dtype or not dtype.is_floating_point:
        return False
    if _is_constant(value):
        return bool(graphs.attribute(graph, str(value.target)).isfinite().all())
    if value.target in _MOVES:
        return _is_finite(graph, value.args[0], dtype)
    chosen = _CHOICES.get(value.target)
    bound = graphs.bound_arguments(value) or {}
    return chosen is not None and all(_is_finite(graph, bound[name], dtype) for name in chosen)


_CHOICES: dict[Any, tuple[str, ...]] = {
    aten.where.self: ("self", "other"),
    aten.where.ScalarSelf: ("self", "other"),
    aten.where.ScalarOther: ("self", "other"),
    aten.where.Scalar: ("self", "other"),
    aten.masked_fill.Scalar: ("self", "value"),
    aten.masked_fill.Tensor: ("self", "value"),
    aten.full.default: ("fill_value",),
    aten.full_like.default: ("fill_value",),
}
"""Operators whose result is one of these arguments, element by element."""
