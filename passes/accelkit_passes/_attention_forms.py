"""The forms in which attention is written, read into one description.

    scaled_dot_product_attention(q, k, v, mask, is_causal, scale)
    matmul(softmax(q k^T * scale + mask), v)      matmul, bmm, baddbmm or einsum; scales, masks and casts anywhere

All operands become layouts (views of what was computed), so that transposes and copies made for one form are seen through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, is_random, val
from accelkit.pass_api import Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_layout import Layout, Opaque, moved, same_end, source_of, whole
from accelkit_passes._attention_masks import Simplifier, Term, broadcast_to
from accelkit_passes._attention_products import Product, is_dropout, operand, product_of, require_one_dtype, through
from accelkit_passes._attention_scores import Scores
from accelkit_passes._proofs import same_sizes

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@dataclass(frozen=True)
class Found:
    """One attention.

    Attributes:
        node: its result in the graph.
        query, key: [lead..., length, width]; value: [lead..., keys, value width]; leads multiply to batch x heads.
        terms: what is done to the scores, [score lead..., length, keys].
        lead: the sizes that the scores' leading dimensions have where they meet softmax.
        order: how the result's dimensions [lead..., length, value width] lie in the node's.
    """

    node: fx.Node
    query: Layout
    key: Layout
    value: Layout
    terms: tuple[Term, ...]
    lead: tuple[Any, ...]
    causal: bool
    scale: float | None
    order: tuple[int, ...]


def find(node: fx.Node, editor: Editor, masks: Simplifier) -> Found | None:
    """The attention whose result is `node`, or None where it is none.

    Raises:
        Refused: it looks like one, but is not what accelkit.attention computes.
    """
    if node.target is aten.scaled_dot_product_attention.default:
        return _fused(node, editor)
    product = product_of(node)
    softmax = None if product is None else _softmax_before(product.left)
    if product is None or softmax is None:
        return None
    return _written_out(node, product, softmax, editor, masks)


# --- scaled_dot_product_attention


def _fused(node: fx.Node, editor: Editor) -> Found:
    bound = bound_arguments(node) or {}
    tensors = [bound[name] for name in ("query", "key", "value")]
    shapes = [val(tensor).shape for tensor in tensors]
    if is_random(node):
        raise Refused(f"dropout is on (dropout_p={bound['dropout_p']})")
    require_one_dtype(tensors)
    lead = shapes[0][:-2]
    alike = lead[:-1] if bound["enable_gqa"] else lead
    if not all(len(s) == len(shapes[0]) and same_sizes(s[: len(alike)], alike) for s in shapes[1:]):
        raise Refused("queries, keys and values differ in their leading dimensions, so that one is broadcast")
    (query, query_factor), (key, key_factor) = (operand(tensor, editor) for tensor in tensors[:2])
    scale, width = bound["scale"], shapes[0][-1]
    if query_factor * key_factor != 1.0:
        if scale is None and type(width) is not int:
            raise Refused("the width of the heads, on which the scale depends, is known only at run time")
        scale = query_factor * key_factor * (1 / math.sqrt(width) if scale is None else scale)
    terms: tuple[Term, ...] = ()
    if (mask := bound["attn_mask"]) is not None:
        scores = (*lead, shapes[0][-2], shapes[1][-2])
        terms = (Term(mask, (broadcast_to(scores),), True if val(mask).dtype is torch.bool else None),)
    order, causal = tuple(range(len(shapes[0]))), bool(bound["is_causal"])
    return Found(node, query, key, editor.layout(tensors[2]), terms, tuple(lead), causal, scale, order)


# --- products around a softmax


def _written_out(node: fx.Node, product: Product, softmax: fx.Node, editor: Editor, masks: Simplifier) -> Found:
    if product.added is not None or product.factor != 1.0:
        raise Refused(f"{node.name} adds to the product with the values, or scales it")
    _require_weights(node, product, softmax, editor)
    scores = Scores(editor, masks)
    inner = scores.walk((bound_arguments(softmax) or {})["self"], softmax)
    tensors = (inner.left, inner.right, product.right)
    require_one_dtype(tensors)
    if val(node).dtype is not val(inner.left).dtype:
        raise Refused(f"the queries are {val(inner.left).dtype}, the result is {val(node).dtype}")
    (query, query_factor), (key, key_factor) = (operand(tensor, editor) for tensor in tensors[:2])
    query, key = inner.plain_left(query), inner.plain_right(key)
    value = product.plain_right(editor.layout(product.right))
    rank = len(key.dims)
    key = key.permuted([*range(rank - 2), rank - 1, rank - 2])
    try:
        query, key = (one.broadcast([*val(scores.base).shape[:-2], *one.shape[-2:]]) for one in (query, key))
        value = value.broadcast([*product.shape(val(node).shape)[:-2], *value.shape[-2:]])
    except Opaque:
        raise Refused("queries, keys and values differ in their leading dimensions") from None
    scale = query_factor * key_factor * scores.factor * inner.factor
    lead = tuple(val(softmax).shape[:-2])
    return Found(node, query, key, value, tuple(scores.terms), lead, False, scale, product.order)


def _require_weights(node: fx.Node, product: Product, softmax: fx.Node, editor: Editor) -> None:
    """Refuse attention weights that are not softmax over the keys, or that something else reads or changes."""
    path = _between(product.left, softmax)
    layout = whole(softmax)
    try:
        for step in reversed([step for step in path[:-1] if source_of(step) is not None]):
            layout = moved(step, layout)
        layout = product.plain_left(layout)
    except Opaque:
        raise Refused("the attention weights' dimensions cannot be followed to the product with the values") from None
    if not layout.in_order or not same_end(layout, val(softmax)):
        raise Refused("the attention weights are transposed, cut or repeated before they meet the values")
    dim, rank = (bound_arguments(softmax) or {})["dim"], val(softmax).dim()
    if dim % rank != rank - 1:
        raise Refused(f"softmax is over dimension {dim % rank} of {rank}, not over the keys")
    for one in path:
        others = [user.name for user in editor.readers(one) if user is not node and user not in path]
        if others:
            raise Refused(f"the attention weights ({one.name}) are also used by {', '.join(others)}")


def _softmax_before(node: fx.Node) -> fx.Node | None:
    """The softmax that a product's left operand comes from; None where there is none.

    Raises:
        Refused: there is one, but something changes its result on the way.
    """
    while node.target not in _SOFTMAX:
        before = through(node)
        if before is None:
            if is_dropout(node) and _softmax_before(node.all_input_nodes[0]) is not None:
                raise Refused(f"dropout is on ({node.name})")
            if node.op == "call_function" and any(source.target in _SOFTMAX for source in node.all_input_nodes):
                raise Refused(f"the attention weights are changed by {node.name} before they meet the values")
            return None
        node = before
    return node


def _between(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    path = [last]
    while path[-1] is not first:
        before = through(path[-1])
        assert before is not None
        path.append(before)
    return path
