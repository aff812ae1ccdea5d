"""s = add(x, residual); rms_norm(s, w)  ->  accelkit.residual_rms_norm(x, residual, w), whose results are both

For aten.rms_norm (nn.RMSNorm), and for the form that transformers' Llama, Mistral, Gemma and T5 spell out:

    v = s.float(); n = v * rsqrt(mean(v ** 2, -1) + eps);  w * n.to(s.dtype)   or   (w * n).to(s.dtype)

with the casts that the precision leaves of it. x is the newer operand. See fuse_residual_layer_norm for the shapes.

A norm without a residual stays as it is, spelled out or not: it is one of a model (the first), Inductor fuses it, and
ONNX knows an RMS norm only from opset 23 on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops.residual_rms_norm import OPERATOR
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._fusion import bound, is_cast, is_floating, require
from accelkit_passes._proofs import same_sizes
from accelkit_passes._residual import Norm, before_casts, fuse_residual

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseResidualRmsNorm(GraphPass):
    """rms_norm(x + residual) -> accelkit.residual_rms_norm(x, residual)"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in list(graph.graph.nodes):
            if node.op != "call_function" or node._erased or node.target not in _READERS:
                continue
            try:
                if (norm := _READERS[node.target](node)) is not None:
                    result.rewrote(fuse_residual(graph, OPERATOR, norm))
            except Refused as refusal:
                result.refused(node, str(refusal))
        return result


def _of_operator(node: fx.Node) -> Norm:
    arguments = bound(node)
    dimensions, eps = len(arguments["normalized_shape"]), arguments["eps"]
    require(dimensions == 1, f"it normalises the last {dimensions} dimensions, not the last one alone")
    if eps is None:  # PyTorch's default: of the dtype that it accumulates in
        dtype = graphs.val(node).dtype
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    return Norm(before_casts(arguments["input"]), node, frozenset({node}), (arguments["weight"],), eps)


def _spelled_out(root: fx.Node) -> Norm | None:
    """The norm around 1 / sqrt(mean square + eps), whose root is the node; None where it is no norm's."""
    inside = {root}
    if root.target is aten.pow.Tensor_Scalar and root.args[1] != -0.5:
        return None
    shifted = _input(root, inside)
    if shifted.target is not aten.add.Tensor:
        return None
    mean, eps = _input(shifted, inside), bound(shifted)["other"]
    if not isinstance(eps, float) or mean.target is not aten.mean.dim:
        return None
    value = _squared(_input(mean, inside))
    scaled, by = _only_user(root, inside)
    if value is None or scaled is None:
        return None
    source = before_casts(value)
    if scaled.target is not _SCALES[root.target] or not _multiplies(scaled, source, by):
        return None
    over, rank = bound(mean), graphs.val(source).dim()
    dims = [d % rank for d in over["dim"] or range(rank)]  # none named: all of them
    require(dims == [rank - 1], f"it normalises dimension {', '.join(map(str, dims))}, not the last one alone")
    if not over["keepdim"]:
        return None
    return _with_weight(source, scaled, inside, eps)


def _with_weight(source: fx.Node, scaled: fx.Node, inside: set[fx.Node], eps: float) -> Norm:
    """The norm with the weight that the scaled value is multiplied by next, if it is."""
    casts = {scaled}
    last, by = _only_user(scaled, casts)
    weight = None
    if last is not None and last.target is aten.mul.Tensor:
        weight = last.args[0] if last.args[1] is by else last.args[1]
    shape = [graphs.val(source).shape[-1]]
    if last is None or not is_floating(weight) or not same_sizes(graphs.val(weight).shape, shape):  # type: ignore[arg-type]
        return Norm(source, scaled, frozenset({*inside, scaled}), (None,), eps)
    return Norm(source, last, frozenset({*inside, *casts, last}), (weight,), eps)  # type: ignore[arg-type]


_SCALES: dict[Any, Any] = {
    aten.rsqrt.default: aten.mul.Tensor,
    aten.sqrt.default: aten.div.Tensor,
    aten.pow.Tensor_Scalar: aten.mul.Tensor,
}
"""What takes the reciprocal root, and how the value is scaled by it."""

_READERS = {aten.rms_norm.default: _of_operator, **dict.fromkeys(_SCALES, _spelled_out)}


# --- steps from node to node, over casts


def _input(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """A node's first operand, before casts; it and they are put `inside`."""
    operand: Any = node.args[0]
    while is_cast(operand):
        inside.add(operand)
        operand = operand.args[0]
    inside.add(operand)
    return operand  # type: ignore[no-any-return]


def _only_user(node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node | None, fx.Node]:
    """The only operator that reads a node's value, before or after casts (put `inside`), and what it reads of it."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not is_cast(user):
            return user, node
        inside.add(user)
        node = user
    return None, node


def _squared(node: fx.Node) -> fx.Node | None:
    """x of x ** 2."""
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.square.default or (node.target is aten.mul.Tensor and node.args[0] is node.args[1]):
        return node.args[0]  # type: ignore[return-value]
    return None


def _multiplies(scaled: fx.Node, source: fx.Node, by: fx.Node) -> bool:
    """Whether the node is source * by, or source / by."""
    left, right = scaled.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return False
    if left is by and scaled.target is aten.mul.Tensor:
        left, right = right, left
    return right is by and before_casts(left) is source
