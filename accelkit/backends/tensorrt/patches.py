"""patch_embedding(image, weight [features, channels, p, q], bias)
      ->  linear(rows of the patches [batch, patches, channels * p * q], weight [features, channels * p * q], bias)

A gather and one matrix product. As a convolution the image and the result are permuted around a kernel that is slow for a
stride of its own size. The weight is the same memory. An image whose size is known at run time only stays a convolution.
"""

from __future__ import annotations

import copy

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.onnx_split import call, size_of
from accelkit.ops.patch_embedding import OPERATOR
from accelkit.pass_runner import fake_mode_of

aten = torch.ops.aten


def patches_as_rows(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with its patch embeddings as products; the graph itself where there are none."""
    names = {node.name for node in graph.graph.nodes if node.target is OPERATOR.overload and _sizes(node) is not None}
    if not names:
        return graph
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    for node in [n for n in graph.graph.nodes if n.name in names]:
        _rewrite(graph, node)
    graph.recompile()
    return graph


def _sizes(node: fx.Node) -> list[int] | None:
    """channels, height, width of the image and features, height, width of a patch; None where one is not a number."""
    bound = graphs.bound_arguments(node) or {}
    image, weight = (graphs.val(bound[name]).shape for name in ("image", "weight"))
    sizes = [*image[1:], weight[0], *weight[2:]]
    return sizes if all(isinstance(size, int) for size in sizes) and bound["weight"].op == "get_attr" else None


def _rewrite(graph: fx.GraphModule, node: fx.Node) -> None:
    bound, sizes = graphs.bound_arguments(node) or {}, _sizes(node)
    assert sizes is not None
    channels, height, width, _, p, q = sizes
    down, across = height // p, width // q
    image, weight = bound["image"], bound["weight"]
    rows = graphs.attribute(graph, str(weight.target)).detach().flatten(1)
    with graph.graph.inserting_before(node):
        for dim, wanted, found in ((2, down * p, height), (3, across * q, width)):
            if wanted != found:  # what patches do not cover
                image = call(graph, aten.slice.Tensor, (image, dim, 0, wanted))
        batch = size_of(graph, image, 0)
        cut = call(graph, aten.reshape.default, (image, [batch, channels, down, p, across, q]))
        gathered = call(graph, aten.permute.default, (cut, [0, 2, 4, 1, 3, 5]))
        flat = call(graph, aten.reshape.default, (gathered, [batch, down * across, channels * p * q]))
        flat_weight = graph.graph.get_attr(graphs.set_attribute(graph, f"{weight.target}_rows", rows))
        flat_weight.meta["val"] = fake_mode_of(graph).from_tensor(rows, static_shapes=True)
        product = call(graph, aten.linear.default, (flat, flat_weight, bound["bias"]))
    node.replace_all_uses_with(product)
    graph.graph.erase_node(node)
    if not weight.users:
        graph.graph.erase_node(weight)
