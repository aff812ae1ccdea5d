"""Q/DQ nodes in the forms that Inductor's patterns for 8-bit integer products look for

    1. dequantize_per_tensor(int8 constant, scale)            ->  dequantize_per_channel(constant, [scale, scale, ...], zeros)
    2. dequantize_per_channel(int8 constant, scales, None)    ->  the same with zeros for zero points

Inductor (torch/_inductor/fx_passes/quantization.py) makes oneDNN's integer products of a linear layer or convolution whose input
is dequantised per tensor and whose constant weight is dequantised per channel, with zero points.
"""

from __future__ import annotations

import copy

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_runner import fake_mode_of

quantized = torch.ops.quantized_decomposed
_LINEAR = (torch.ops.aten.linear.default,)
_CONVOLUTIONS = tuple(getattr(torch.ops.aten, f"conv{d}d").default for d in (1, 2, 3))


def in_inductors_forms(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph` in these forms; the graph itself where there is nothing to do."""
    if not any(map(_is_weight, graph.graph.nodes)):
        return graph
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    mode = fake_mode_of(graph)

    def constant(hint: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
        with graph.graph.inserting_before(before):
            node = graph.graph.get_attr(graphs.set_attribute(graph, hint, tensor))
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        return node

    for node in list(graph.graph.nodes):
        if not _is_weight(node):
            continue
        weight = node.args[0]
        assert isinstance(weight, fx.Node)
        tensor = graphs.attribute(graph, str(weight.target))
        if node.target is quantized.dequantize_per_tensor.default:
            same = tensor.new_full((len(tensor),), float(node.args[1]), dtype=torch.float32)
            scales = constant(f"{weight.target}_scales", same, node)
            node.target = quantized.dequantize_per_channel.default
        else:
            assert isinstance(node.args[1], fx.Node)
            scales = node.args[1]
        zeros = constant(f"{weight.target}_zero_points", tensor.new_zeros(len(tensor), dtype=torch.int64), node)
        node.args = (weight, scales, zeros, 0, -128, 127, torch.int8)
    graph.recompile()
    return graph


def quantised_layers(graph: fx.GraphModule) -> int:
    """Linear layers and convolutions whose input and constant weight are dequantised, in these forms."""
    return sum(
        node.target in (*_LINEAR, *_CONVOLUTIONS)
        and len(node.args) >= 2
        and isinstance(node.args[0], fx.Node)
        and str(node.args[0].target).startswith("quantized_decomposed.dequantize_per_tensor")
        and isinstance(node.args[1], fx.Node)
        and node.args[1].target is quantized.dequantize_per_channel.default
        for node in graph.graph.nodes
    )


def inputs_that_sums_read(graph: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the inputs that a sum behind a quantised layer may read: Inductor (2.13) lets oneDNN's product add its result
    into such a residual in place, where nothing else reads it later, even where it is an input: the caller's memory."""
    if not quantised_layers(graph):
        return ()
    read = {
        root
        for node in graph.graph.nodes
        if node.target is torch.ops.aten.add.Tensor
        for operand in node.all_input_nodes
        for root in graphs.storage_roots(operand)
    }
    return tuple(i for i, node in enumerate(graph.graph.find_nodes(op="placeholder")) if node in read)


def integer_products_made() -> int:
    """How many of Inductor's patterns for integer products have matched in this process so far."""
    from torch._dynamo.utils import counters

    return sum(
        counters["inductor"][f"{kind}_weight_prepack_matcher_count"] for kind in ("qlinear", "qconv")
    )  # fmt: skip


def _is_weight(node: fx.Node) -> bool:
    if node.target not in (quantized.dequantize_per_tensor.default, quantized.dequantize_per_channel.default):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return False
    return node.target is quantized.dequantize_per_tensor.default or bool(
        isinstance(node.args[1], fx.Node) and node.args[2] is None and node.args[3] == 0
    )
