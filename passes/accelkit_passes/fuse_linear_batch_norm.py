"""batch_norm(linear(x, w, b)) -> linear(x, w * scale, b * scale + shift)

Where the norm's channels are the linear layer's features: of a [batch, features] result as it is, or of a longer one
whose features have been moved to dimension 1 (`transpose(1, 2)` for BatchNorm1d over [batch, length, features]) or
whose other dimensions have been flattened into one. BatchNorm1d straight on [batch, length, features] normalises the
length, which no weight can take. The fold is computed in float64 and rounded once to the weight's dtype; it costs the
memory of one new weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from accelkit import graph as graphs
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._batch_norm import input_of, is_batch_norm, read, rounded, take_fold
from accelkit_passes._fusion import constant, only_used_by, require

aten = torch.ops.aten

FLATTENS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default)
MOVES = (aten.transpose.int, aten.permute.default, aten.contiguous.default, *FLATTENS)


@dataclass(frozen=True)
class FuseLinearBatchNorm(GraphPass):
    """batch_norm(linear(x)) -> linear(x) with folded weights"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for norm in list(graph.graph.nodes):
            if not is_batch_norm(norm):
                continue
            path = _path(norm)
            if path[0].target != aten.linear.default:
                continue
            try:
                result.rewrote(_fold(graph, path, norm))
            except Refused as refusal:
                result.refused(norm, str(refusal))
        return result


def _path(norm: fx.Node) -> list[fx.Node]:
    """From where the norm's input is computed, through what only moves it, to the norm's input."""
    path = [input_of(norm)]
    while path[0].target in MOVES:
        path.insert(0, path[0].args[0])
    return path


def _fold(graph: fx.GraphModule, path: list[fx.Node], norm: fx.Node) -> str:
    for node, user in zip(path, [*path[1:], norm], strict=True):
        only_used_by(node, user)
    linear = path[0]
    axis = graphs.val(linear).dim() - 1
    for move in path[1:]:
        axis = _moved(axis, move)
    require(
        axis == 1, f"{norm.name} normalises dimension 1 of its input, but {linear.name}'s features are dimension {axis}"
    )
    found = read(graph, norm)
    bound = graphs.bound_arguments(linear) or {}
    weight = constant(graph, bound["weight"], "the weight")
    require(weight.dtype == found.dtype, f"the weight is {weight.dtype}, the norm {found.dtype}")
    folded = rounded(weight.double() * found.scale.view(-1, 1), weight.dtype, "weight")
    shift = found.shift
    if bound["bias"] is not None:
        shift = shift + constant(graph, bound["bias"], "the bias").double() * found.scale
    return take_fold(graph, linear, found, folded, rounded(shift, weight.dtype, "bias"))


def _moved(axis: int, move: fx.Node) -> int:
    """Where the dimension `axis` of a move's input is in its result."""
    before, after = graphs.val(move.all_input_nodes[0]), graphs.val(move)
    bound = graphs.bound_arguments(move) or {}
    if move.target == aten.transpose.int:
        swapped = {bound["dim0"] % before.dim(), bound["dim1"] % before.dim()}
        return int((swapped - {axis}).pop()) if axis in swapped and len(swapped) == 2 else axis
    if move.target == aten.permute.default:
        return [d % before.dim() for d in bound["dims"]].index(axis)
    if move.target == aten.contiguous.default:
        return axis
    last = axis == before.dim() - 1 and statically_known_true(before.shape[-1] == after.shape[-1])
    require(last, f"{move.name} does not provably keep the features in a dimension of their own")
    return int(after.dim()) - 1
