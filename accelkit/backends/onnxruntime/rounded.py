"""conv(dequantize(quantize(x)), dequantize(w), bias) -> conv(x, w', bias): quantised convolutions, for ONNX Runtime's CPU kernels

Its integer convolution (QLinearConv) gives integers, and is made only where the graph rounds the result too; otherwise it
dequantises the weight at each call. So w' is the rounded weight as floating-point numbers, made once at each compile and
load; the input is not rounded, which only takes error away.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_runner import fake_mode_of

aten, quantized = torch.ops.aten, torch.ops.quantized_decomposed
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
_DEQUANTIZE = (quantized.dequantize_per_tensor.default, quantized.dequantize_per_channel.default)
LINEAR = (aten.linear.default, torch.ops.accelkit.linear_activation.default, aten.matmul.default)


def float_convolutions(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A copy of `graph` without quantised convolutions, and their names; the graph itself where there are none."""
    names = [n.name for n in graph.graph.nodes if n.target in CONVOLUTIONS and is_quantised(n)]
    if not names:
        return graph, []
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    for node in list(graph.graph.nodes):
        if node.name not in names:
            continue
        x, weight = node.args[:2]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        node.replace_input_with(weight, _float(graph, weight))
        rounded = x.args[0]
        if isinstance(rounded, fx.Node) and rounded.op == "call_function":
            node.replace_input_with(x, rounded.args[0])
    graph.graph.eliminate_dead_code(is_impure_node=lambda n: not graphs.is_pure(n))
    graph.recompile()
    return graph, names


def is_quantised(node: fx.Node) -> bool:
    """Whether both factors of a product come from dequantize nodes, the second's integers from a constant or not."""
    return len(node.args) >= 2 and all(map(_dequantised, node.args[:2]))


def quantised_products(graph: fx.GraphModule) -> list[str]:
    """The names of the linear layers and matrix products whose factors are quantised."""
    return [n.name for n in graph.graph.nodes if n.target in LINEAR and is_quantised(n)]


def _dequantised(value: object) -> bool:
    while isinstance(value, fx.Node) and value.target in (aten.permute.default, aten.transpose.int):
        value = value.args[0]
    return isinstance(value, fx.Node) and str(value.target).startswith("quantized_decomposed.dequantize")


def _float(graph: fx.GraphModule, weight: fx.Node) -> fx.Node:
    args, kwargs = fx.node.map_arg(
        (weight.args, weight.kwargs), lambda n: graphs.attribute(graph, str(n.target)).detach()
    )
    dequantize: Any = weight.target
    with torch.no_grad():
        tensor = dequantize(*args, **kwargs)
    name = graphs.set_attribute(graph, f"{weight.all_input_nodes[0].target}_rounded", tensor)
    with graph.graph.inserting_before(weight):
        node = graph.graph.get_attr(name)
    node.meta["val"] = fake_mode_of(graph).from_tensor(tensor, static_shapes=True)
    return node
