"""softmax(scale Q K^T + mask) V -> accelkit.attention(Q, K, V, mask, causal, scale)

    q, k, v = permute(reshape(linear(x)))     [batch, heads, length, width]
    y = reshape(permute(matmul(softmax(matmul(q, k^T) / sqrt(d)), v)))
    ->
    q, k, v = reshape(linear(x))              [batch, length, heads, width]
    y = reshape(accelkit.attention(q, k, v, None, False, 1 / sqrt(d)))

Why: the fused operator never writes the scores to memory, and takes its operands as linear layers give them, so that
the transposed copies of Q, K, V and of the result go too.

Recognised: scaled_dot_product_attention; matmul, bmm, baddbmm or einsum around a softmax, the scale on the queries, the
keys, both or the scores, masks that are added, filled in or chosen by where, casts to float32 and back, dropout that is off;
heads of keys and values that are repeated for several heads of queries (grouped queries). Masks are simplified on the
way (see _attention_masks, which also says what becomes of queries that may attend to no key).

Not fused, with the reason: dropout that is on, attention weights or scores that something else reads, a softmax over
another dimension, scores that are scaled by a tensor, operands of several dtypes, or that the graph writes to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from accelkit import ops
from accelkit.graph import val
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_forms import Found, find
from accelkit_passes._attention_layout import Layout, Opaque, product, whole
from accelkit_passes._attention_masks import Simplifier, emit
from accelkit_passes._proofs import proved

ATTENTION = ops.attention.OPERATOR.overload


@dataclass(frozen=True)
class RecogniseAttention(GraphPass):
    """softmax(scale Q K^T + mask) V -> accelkit.attention"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        if not any(isinstance(val(node), torch.Tensor) for node in graph.graph.nodes):
            return result
        editor = Editor(graph)
        masks = Simplifier(editor)
        for node in list(graph.graph.nodes):
            if node.op != "call_function" or node not in editor.live:
                continue
            try:
                found = find(node, editor, masks)
                if found is None:
                    continue
                with editor.all_or_nothing():
                    attention = _fuse(found, editor, masks)
                result.rewrote(f"{node.name} into {attention.name}")
                editor.shorten_views(attention)
            except Refused as refusal:
                result.refused(node, str(refusal))
        if result.changed:
            editor.erase_dead()
        return result


def _fuse(found: Found, editor: Editor, masks: Simplifier) -> fx.Node:
    node = found.node
    batch, heads = _batch_and_heads(found)
    query = _four(found.query, batch, heads, "queries")
    key, value = _ungrouped(_four(found.key, batch, heads, "keys"), _four(found.value, batch, heads, "values"))
    simple = masks.simplified(found.terms)
    for root in (query.root, key.root, value.root, *(term.node for term in found.terms)):
        if root in editor.written:  # it may be written to between the two products
            raise Refused(f"the graph writes to {root.name}")
    scores = [*query.shape[:3], key.shape[2]]
    mask = emit(simple, scores, val(query.root).dtype, editor, node)
    operands = [editor.emit(layout.permuted((0, 2, 1, 3)), node) for layout in (query, key, value)]
    causal = found.causal or simple.causal
    arguments: list[Any] = [*operands, mask, causal, found.scale]
    while arguments[-1] is None or arguments[-1] is False:
        arguments.pop()
    attention = editor.call(ATTENTION, tuple(arguments), node)
    shape = [val(node).shape[found.order.index(d)] for d in range(len(found.order))]
    back = whole(attention).permuted((0, 2, 1, 3)).regrouped(shape).permuted(found.order)
    editor.stand_in(node, editor.emit(back, node))
    return attention


def _batch_and_heads(found: Found) -> tuple[Any, Any]:
    """How the leading dimensions multiply to a batch and heads; any split is right, this one leaves views views."""
    query = found.query
    for lead in (query.shape[:-2], list(found.lead), found.value.shape[:-2]):
        if len(lead) >= 2:
            return math.prod(lead[:-1]), lead[-1]
    if not query.dims[:-2]:
        return 1, 1
    for layout in (query, found.value, found.key):
        # what lies beside the width in one dimension of a linear layer's result are heads
        *lead_atoms, heads = *layout.dims[0], 1
        features = {atom.dim for atom in layout.dims[-1]} - {None}
        while lead_atoms and lead_atoms[-1].dim in features:
            heads = heads * lead_atoms.pop().size
        if not proved(heads == 1):
            return product(lead_atoms), heads
    return query.shape[0], 1


def _four(layout: Layout, batch: Any, heads: Any, what: str) -> Layout:
    """[batch, heads, length, width]"""
    if len(layout.dims) == 4:
        return layout
    try:
        return layout.regrouped([batch, heads, *layout.shape[-2:]])
    except Opaque:
        raise Refused(f"the {what} are not {batch} x {heads} (batch x heads) as the queries are") from None


def _ungrouped(key: Layout, value: Layout) -> tuple[Layout, Layout]:
    """Keys and values without the repetition for several heads of queries, where both are repeated alike."""
    stripped = []
    for layout in (key, value):
        heads = layout.dims[1]
        while heads and heads[-1].dim is None:
            heads = heads[:-1]
        stripped.append(replace(layout, dims=(layout.dims[0], heads, *layout.dims[2:])))
    return (stripped[0], stripped[1]) if proved(stripped[0].shape[1] == stripped[1].shape[1]) else (key, value)
