"""batch_norm(conv(x, w, b)) -> conv(x, w * scale, b * scale + shift)

At inference a batch norm is a multiplication and an addition per channel, and the convolution before it can do both for
nothing: one pass over memory less, and a runtime that knows no fused form needs none. All convolutions (1-D to 3-D,
transposed, grouped, `same` padding) with or without a bias. The fold is computed in float64 and rounded once to the
weight's dtype, so that its error is that of storing a weight. It costs the memory of one new weight; the model's own
weight is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._batch_norm import input_of, is_batch_norm, read, rounded, take_fold
from accelkit_passes._fusion import constant, only_used_by, require

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding, aten.convolution.default,
)  # fmt: skip
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class FuseConvBatchNorm(GraphPass):
    """batch_norm(conv(x)) -> conv(x) with folded weights"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for norm in list(graph.graph.nodes):
            if not is_batch_norm(norm):
                continue
            convolution = input_of(norm)
            if convolution.target not in (*CONVOLUTIONS, *TRANSPOSED):
                continue
            try:
                result.rewrote(_fold(graph, convolution, norm))
            except Refused as refusal:
                result.refused(norm, str(refusal))
        return result


def _fold(graph: fx.GraphModule, convolution: fx.Node, norm: fx.Node) -> str:
    only_used_by(convolution, norm)
    found = read(graph, norm)
    bound = graphs.bound_arguments(convolution) or {}
    weight = constant(graph, bound["weight"], "the weight")
    require(weight.dtype == found.dtype, f"the weight is {weight.dtype}, the norm {found.dtype}")
    # conv2d also takes [channels, height, width]; batch_norm then normalises the height
    require(graphs.val(convolution).dim() == weight.dim(), f"{convolution.name} has no batch dimension")
    folded = rounded(
        weight.double() * _per_output_channel(convolution, bound, weight, found.scale), weight.dtype, "weight"
    )
    shift = found.shift
    if bound["bias"] is not None:
        shift = shift + constant(graph, bound["bias"], "the bias").double() * found.scale
    return take_fold(graph, convolution, found, folded, rounded(shift, weight.dtype, "bias"))


def _per_output_channel(
    convolution: fx.Node, bound: dict[str, Any], weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`scale` [channels out], shaped to multiply `weight`."""
    ones = [1] * (weight.dim() - 2)
    if convolution.target not in TRANSPOSED and not bound.get("transposed", False):
        return scale.view(-1, 1, *ones)  # [out, in / groups, ...]
    groups = bound["groups"]  # [in, out / groups, ...]: the rows of group g see that group's outputs
    return scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).reshape(*weight.shape[:2], *ones)
