"""layers(x [batch, length, width], mask)  ->  unpack(layers(pack(x) [rows, width]))

    x -> linear -> attention(mask) -> residual_layer_norm -> ...
    x -> pack_rows -> linear(rows) -> variable_length_attention(offsets) -> residual_layer_norm(rows) -> ... -> unpack_rows

With an attention mask, tokens that are padding are dropped before the layers and put back after them (FasterTransformer's
"effective transformer"). A batch of sentences of different lengths is often more than half padding, and everything but
attention treats padding like any token. The kept tokens of all sequences are packed to the front of a buffer that has room
for all; how many there are stays on the device, and kernels skip the rest: shapes are static, nothing waits, a CUDA graph
holds it. On a CPU the linear layers and norms compute the rows that count alone.

The mask may hold padding anywhere: keys are the kept tokens in order, so causal attention is the same too. What comes before
the layers (position embeddings) and after them sees the tokens in their places.

RESULTS AT PADDING DIFFER, by design: plain PyTorch computes numbers there that mean nothing, here they are zeros. So the pass
runs on request only, says so in the report, and `optimize` compares the kept tokens alone with float64. Who reads one position
(BERT's pooler reads the first) gets zeros where that is padding. What would carry padding into the results of other tokens
(a mean without the mask, an attention without it, a convolution over tokens) is refused, with the operator's name.

Runs after the fusions: `default_passes(precision, remove_padding=True)`. Made for the targets fastertransformer and eager:
others run variable-length attention in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._fusion import require
from accelkit_passes._packed_graph import ATTENTION, PackedGraph, attention_on_rows
from accelkit_passes._padding_masks import KeyMask, Values, hides_padding, key_mask
from accelkit_passes._padding_readers import open_outputs
from accelkit_passes._token_rules import Call, call_on_rows, is_worth_packing

aten = torch.ops.aten


@dataclass(frozen=True)
class RemovePadding(GraphPass):
    """layers(x, mask) -> unpack(layers(pack(x)))"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in graph.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
            result.refused(node, "recognise_attention has to run before, and has left it as it is")
        values = Values(graph)
        groups: dict[fx.Node, tuple[KeyMask, list[fx.Node]]] = {}
        for node in graph.graph.find_nodes(op="call_function", target=ATTENTION):
            try:
                mask = key_mask(node, values)
            except Refused as refusal:
                result.refused(node, str(refusal))
            else:
                groups.setdefault(mask.node, (mask, []))[1].append(node)
        for mask, attentions in groups.values():
            try:
                region = _region(graph, mask, attentions, values)
                outputs = open_outputs(graph, region, mask, values)
                PackedGraph(graph, mask, region).build()
            except Refused as refusal:
                result.refused(attentions[0], str(refusal))
            else:
                _tell(result, attentions, region, outputs)
        return result


def _tell(
    result: PassResult,
    attentions: list[fx.Node],
    region: dict[fx.Node, Call],
    outputs: dict[int, Callable[..., torch.Tensor]],
) -> None:
    listed = ", ".join(node.name for node in attentions)
    result.rewrote(f"{len(region)} operators on the tokens that are kept, attention in {listed}")
    for index, kept in outputs.items():
        result.leaves_open(index, kept, "padding removed: zeros there")


def _region(graph: fx.GraphModule, mask: KeyMask, attentions: list[fx.Node], values: Values) -> dict[fx.Node, Call]:
    """The nodes to compute on packed rows, in the graph's order, each with its call: all that are connected with these
    attentions through operators on each token alone."""
    require(not any(map(graphs.is_mutating, graph.graph.nodes)), "the graph writes to memory")
    found: dict[fx.Node, Call] = {node: attention_on_rows(node) for node in attentions}
    stack = list(attentions)
    while stack:
        node = stack.pop()
        for operand in node.all_input_nodes:
            if operand not in found and found[node].reads_tokens(operand):
                _add(operand, call_on_rows(operand, mask.tokens), found, stack)
        for user in node.users:
            call = call_on_rows(user, mask.tokens) if user not in found else None
            if call is not None and call.reads_tokens(node):
                _add(user, call, found, stack)
    return _trimmed({node: found[node] for node in graph.graph.nodes if node in found}, mask, values)


def _add(node: fx.Node, call: Call | None, found: dict[fx.Node, Call], stack: list[fx.Node]) -> None:
    if call is not None:
        found[node] = call
        stack.append(node)


def _trimmed(region: dict[fx.Node, Call], mask: KeyMask, values: Values) -> dict[fx.Node, Call]:
    """Without what is cheap at either end, which would only be packed or unpacked in another form."""
    for node in reversed(list(region)):
        operands = [source for source in node.all_input_nodes if source in region]
        # the last sum of a pre-norm model stays: both of its operands would be unpacked instead of it
        one_for_one = len(operands) < 2 or any(hides_padding(node, read, mask, values) for read in operands)
        if not is_worth_packing(node) and one_for_one and not any(user in region for user in node.users):
            del region[node]
    for node in list(region):
        if not is_worth_packing(node) and not any(source in region for source in node.all_input_nodes):
            del region[node]
    return region
