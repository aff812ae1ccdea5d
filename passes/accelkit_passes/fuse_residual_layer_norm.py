"""s = add(x, residual); layer_norm(s, w, b)  ->  accelkit.residual_layer_norm(x, residual, w, b), whose results are both

What stands between the halves of every transformer layer: one read of x and of the residual, one write of each result.
Post-norm models (BERT) use the first result, pre-norm models (ViT, GPT) the sum too. x is the newer operand, what the
layer has just computed.

The norm is over the last dimension, and both operands have the sum's full shape: position embeddings are broadcast over
the batch, and the kernel reads rows. A norm whose input is no sum, the first one of a model, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from accelkit.ops.residual_layer_norm import OPERATOR
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._fusion import bound, require
from accelkit_passes._residual import Norm, before_casts, fuse_residual

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseResidualLayerNorm(GraphPass):
    """layer_norm(x + residual) -> accelkit.residual_layer_norm(x, residual)"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in graph.graph.find_nodes(op="call_function", target=aten.layer_norm.default):
            try:
                result.rewrote(fuse_residual(graph, OPERATOR, _read(node)))
            except Refused as refusal:
                result.refused(node, str(refusal))
        return result


def _read(node: fx.Node) -> Norm:
    arguments = bound(node)
    dimensions = len(arguments["normalized_shape"])
    require(dimensions == 1, f"it normalises the last {dimensions} dimensions, not the last one alone")
    source, operands = before_casts(arguments["input"]), (arguments["weight"], arguments["bias"])
    return Norm(source, node, frozenset({node}), operands, arguments["eps"])
