"""permute(flatten(conv2d(image, w, b, stride=patch), 2), [0, 2, 1])  ->  accelkit.patch_embedding(image, w, b)

How vision transformers begin; also written permute(conv2d(...), [0, 2, 3, 1]) and then flattened. Patches that do not
overlap are the rows of one matrix product, which a kernel gathers from the image; the transposed copy is never made.

The stride is the kernel size, nothing is padded, dilated or grouped. The image's size is a number, or provably gives as
many patches as the fused operator counts; the batch may be dynamic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops.patch_embedding import OPERATOR
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._fusion import (
    RESHAPES,
    add_fused,
    bound,
    erase_unused,
    nothing_used_outside,
    nothing_written_between,
    require,
)  # fmt: skip
from accelkit_passes._proofs import proved, same_sizes

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)


@dataclass(frozen=True)
class FusePatchEmbedding(GraphPass):
    """conv2d -> flatten -> transpose  ->  accelkit.patch_embedding"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in list(graph.graph.nodes):
            if node.target not in CONVOLUTIONS or (path := _path(node)) is None:
                continue
            try:
                result.rewrote(_fuse(graph, path))
            except Refused as refusal:
                result.refused(node, str(refusal))
        return result


def _path(conv: fx.Node) -> list[fx.Node] | None:
    """The convolution, and the two nodes after it that make rows of its channels; None where there are none."""
    for first in conv.users:
        for second in first.users:
            if first.target in RESHAPES and second.target is aten.permute.default and _dims(second) == [0, 2, 1]:
                return [conv, first, second] if _keeps_channels(conv, first, channels=1) else None
            if first.target is aten.permute.default and second.target in RESHAPES and _dims(first) == [0, 2, 3, 1]:
                return [conv, first, second] if _keeps_channels(conv, second, channels=2) else None
    return None


def _dims(permute: fx.Node) -> list[int]:
    return list(bound(permute)["dims"])


def _keeps_channels(conv: fx.Node, reshape: fx.Node, channels: int) -> bool:
    """Whether the reshape makes one dimension of the image's two, and leaves batch and channels as they are."""
    before, after = graphs.val(conv).shape, graphs.val(reshape).shape
    return len(before) == 4 and len(after) == 3 and same_sizes([after[0], after[channels]], before[:2])


def _fuse(graph: fx.GraphModule, path: list[fx.Node]) -> str:
    conv, first, last = path
    nothing_used_outside(graph, path, last)
    nothing_written_between(graph, conv, last)
    arguments = bound(conv)
    image, weight, bias = (arguments[name] for name in ("input", "weight", "bias"))
    patch = list(graphs.val(weight).shape[2:])
    require(all(type(size) is int for size in patch), f"the kernel's size {patch} is known only at run time")
    stride = _pair(arguments["stride"])
    require(stride == patch, f"the stride {stride} is not the kernel's size {patch}: patches overlap or leave gaps")
    padding = arguments["padding"]
    require(padding == "valid" or (padding != "same" and _pair(padding) == [0, 0]), f"the image is padded by {padding}")
    require(_pair(arguments["dilation"]) == [1, 1], f"the kernel is dilated by {_pair(arguments['dilation'])}")
    require(arguments["groups"] == 1, f"the convolution has {arguments['groups']} groups")
    height, width = graphs.val(image).shape[2:]
    counted, patches = (height // patch[0]) * (width // patch[1]), graphs.val(last).shape[1]
    require(proved(counted == patches), f"the image's size {height} x {width} is known only at run time")
    fused = add_fused(graph, OPERATOR, (image, weight, bias), last)
    last.replace_all_uses_with(fused)
    erase_unused(graph, path)
    return f"{conv.name} with {first.name} and {last.name}"


def _pair(value: int | list[int]) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * 2 if len(sizes) == 1 else sizes
