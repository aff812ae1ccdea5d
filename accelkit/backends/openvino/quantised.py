"""quantize(weight) -> an int8 weight, outside the ONNX model like any other: what OpenVINO's int8 kernels want

    quantize_per_channel(@w, scales, zeros)  ->  @w_quantised   (int8, computed by PyTorch)

Where the graph quantises a weight itself, OpenVINO (2026.4) leaves convolutions with one scale an output channel in float32. The
int8 weight is computed from the graph's own at each compile and load, so that a stored model serves other weights of the
same graph.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.onnx_export import initializer_name
from accelkit.pass_runner import fake_mode_of

if TYPE_CHECKING:
    import onnx


def with_quantised_weights(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A copy of `graph` whose quantised weights are attributes, and their names; the graph itself where there are none."""
    if not any(map(_quantises_weight, graph.graph.nodes)):
        return graph, []
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    names = []
    for node in list(graph.graph.nodes):
        if not _quantises_weight(node):
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: graphs.attribute(graph, str(n.target)).detach())
        with torch.no_grad():
            value = node.target(*arguments[0], **arguments[1])
        names.append(graphs.set_attribute(graph, f"{node.all_input_nodes[0].target}_quantised", value))
        with graph.graph.inserting_before(node):
            made = graph.graph.get_attr(names[-1])
        made.meta["val"] = fake_mode_of(graph).from_tensor(value, static_shapes=True)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, names


def leave_outside(model: onnx.ModelProto, names: list[str]) -> None:
    """Take these attributes' values out of an exported model, as `export_onnx` does for floating-point ones."""
    outside = {initializer_name(name) for name in names}
    for initializer in model.graph.initializer:
        if initializer.name not in outside:
            continue
        length = len(initializer.raw_data)
        initializer.ClearField("raw_data")
        initializer.data_location = initializer.EXTERNAL
        for key, text in (("location", "supplied-by-accelkit"), ("offset", "0"), ("length", str(length))):
            initializer.external_data.add(key=key, value=text)


def _quantises_weight(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "quantized_decomposed"
        and target._opname in ("quantize_per_tensor", "quantize_per_channel")
        and all(i.op == "get_attr" for i in node.all_input_nodes)
    )
