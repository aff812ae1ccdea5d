"""A normalisation of a residual sum, and the fused operator that takes both's place.

    s = add(x, residual); norm(s)   ->   fused = residual_norm(x, residual, ...); fused[0]; fused[1] for who else reads s

Half-precision graphs may compute the norm in float32, between two casts: the fused operators compute so by themselves.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops import Operator, operator_of
from accelkit_passes._fusion import (
    add_fused,
    bound,
    erase_unused,
    is_cast,
    is_floating,
    metadata,
    nothing_used_outside,
    nothing_written_between,
    require,
)  # fmt: skip
from accelkit_passes._proofs import same_sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension.

    Attributes:
        source: what is normalised, before casts.
        last: the node that gives the result, in the dtype that the norm computes in.
        inside: the nodes that compute it, `last` among them, casts of `source` not.
        operands: the weights, or None for those that there are not.
        eps: what is added to the variance or mean square.
    """

    source: fx.Node
    last: fx.Node
    inside: frozenset[fx.Node]
    operands: tuple[fx.Node | None, ...]
    eps: float


def before_casts(node: fx.Node) -> fx.Node:
    """The value before it was cast between floating-point dtypes, if it was."""
    while is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def fuse_residual(graph: fx.GraphModule, fused: Operator, norm: Norm) -> str:
    """Put the fused operator where the sum stood; returns what was done.

    Raises:
        Refused: the norm's input is no sum of two tensors of one shape, or what the norm computes is needed elsewhere.
    """
    total = norm.source
    x, residual = _operands(total)
    nothing_used_outside(graph, norm.inside, norm.last)
    results = _results(norm, graphs.val(total).dtype)
    nothing_written_between(graph, total, norm.last)
    _move_before(graph, norm, total)
    node = add_fused(graph, fused, (x, residual, *norm.operands, norm.eps), total)
    with graph.graph.inserting_before(total):
        normalised, summed = (graph.graph.call_function(operator.getitem, (node, index)) for index in (0, 1))
    normalised.meta, summed.meta = metadata(results[0]), metadata(total)
    for result in results:
        result.replace_all_uses_with(normalised)
    erase_unused(graph, {*norm.inside, *results, *_casts(total)})
    total.replace_all_uses_with(summed)
    erase_unused(graph, {total, summed})
    return f"{total.name} into {norm.last.name}"


def _operands(total: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two operands, the newer one first."""
    source = total.args[0] if total.target is operator.getitem else None
    if isinstance(source, fx.Node) and (known := operator_of(source)) and known.name.startswith("residual_"):
        require(False, f"its sum is computed by {source.name} for another norm already")
    require(total.target is aten.add.Tensor, f"its input ({total.name}) is no sum")
    left, right, alpha = (bound(total)[name] for name in ("self", "other", "alpha"))
    require(isinstance(right, fx.Node), f"its input ({total.name}) adds a number, not a residual")
    require(alpha == 1, f"alpha={alpha} scales the second operand of {total.name}")
    values = [graphs.val(operand) for operand in (left, right)]
    for operand, value in zip((left, right), values, strict=True):
        require(is_floating(operand), f"{operand.name}, which {total.name} adds, is {value.dtype}")
        broadcast = f"{operand.name} {_sizes(value)} is broadcast to {_sizes(graphs.val(total))} by {total.name}"
        require(same_sizes(value.shape, graphs.val(total).shape), broadcast)
    order = {node: position for position, node in enumerate(total.graph.nodes)}
    newer = max(left, right, key=lambda operand: (operand.op != "get_attr", order[operand]))
    return (left, right) if newer is left else (right, left)


def _sizes(value: torch.Tensor) -> str:
    return f"[{', '.join(map(str, value.shape))}]"


def _results(norm: Norm, dtype: torch.dtype) -> list[fx.Node]:
    """The nodes that have the result in the sum's dtype: the norm's last, or the casts of it."""
    computed = graphs.val(norm.last).dtype
    if computed == dtype:
        return [norm.last]
    require(computed is torch.float32, f"{norm.last.name} computes in {computed}, the sum is {dtype}")
    others = [u.name for u in norm.last.users if not is_cast(u) or graphs.val(u).dtype != dtype]
    require(not others, f"{', '.join(others)} reads the result in {computed}, the sum is {dtype}")
    return list(norm.last.users)


def _casts(total: fx.Node) -> list[fx.Node]:
    return [user for user in total.users if is_cast(user)]


def _move_before(graph: fx.GraphModule, norm: Norm, total: fx.Node) -> None:
    """Weights are named where they are first used, often after the sum."""
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    late = [n for n in norm.operands if n is not None and order[n] > order[total]]
    for weight in late:
        require(weight.op == "get_attr", f"its weight ({weight.name}) is computed after the sum ({total.name})")
    for weight in late:
        total.prepend(weight)
