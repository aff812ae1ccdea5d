"""From softmax back to the product of queries and keys: the scale, the masks and the views on the way.

softmax(masked_fill(matmul(q, k) / 8 + bias, m, -inf))  ->  product matmul(q, k), factor 1/8, terms [not m, bias]
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, val
from accelkit.pass_api import Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_layout import Opaque, moved, same_end, source_of, whole
from accelkit_passes._attention_masks import EXCLUDES, Simplifier, Term, View, broadcast_to
from accelkit_passes._attention_products import PRODUCTS, Product, product_of, scaled, through
from accelkit_passes._proofs import same_sizes

aten = torch.ops.aten

_SHAPE_OF = (aten.expand_as.default, aten.view_as.default)
_FLOORS = (aten.maximum.default, aten.max.other, aten.clamp_min.default)


class Scores:
    """Walks from softmax back to the product of queries and keys."""

    def __init__(self, editor: Editor, masks: Simplifier) -> None:
        self.editor, self.masks = editor, masks
        self.factor = 1.0
        self.views: tuple[View, ...] = ()
        self.terms: list[Term] = []

    def walk(self, node: fx.Node, softmax: fx.Node) -> Product:
        """Sets factor, terms and base (the product's node).

        Raises:
            Refused: something on the way is no scale, mask, cast or view.
        """
        reader = softmax
        while (product := product_of(node)) is None:
            self._require_one_reader(node, reader)
            reader, node = node, self._step(node)
        self._require_one_reader(node, reader)
        if product.order != tuple(range(len(product.order))):
            raise Refused(f"the scores ({node.name}) are transposed")
        self.base = node
        if product.added is not None:
            self._add(product.added[0], product.added[1], node)
        base = whole(node)
        try:
            for view in self.views:
                base = view(base)
        except Opaque:
            raise Refused("the scores' dimensions cannot be followed to softmax") from None
        if not base.in_order or base.root is not node or not same_end(base, val(node)):
            raise Refused("the scores are transposed, cut or repeated before softmax")
        return product

    def _require_one_reader(self, node: fx.Node, reader: fx.Node) -> None:
        readers = self.editor.readers(node)
        others = [u.name for u in readers if u is not reader and not (u.target in _SHAPE_OF and u.args[1] is node)]
        if others:
            raise Refused(f"the scores ({node.name}) are also used by {', '.join(others)}")

    def _step(self, node: fx.Node) -> fx.Node:
        """What the scores are before `node`."""
        if (multiplied := scaled(node, self.editor)) is not None:
            self.factor *= multiplied[1]
            return multiplied[0]
        if (source := source_of(node)) is not None:
            self.views = (functools.partial(moved, node), *self.views)
            return source
        before = through(node)
        if before is not None:
            return before
        bound = bound_arguments(node) or {}
        target = node.target
        if target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(bound["other"], fx.Node):
            return self._sum(node, bound)
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            return self._replaced(node, bound["self"], bound["mask"], bound["value"], keeps=False)
        if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            keeps = isinstance(bound["self"], fx.Node) and _leads_to_product(bound["self"])
            scores, other = (bound["self"], bound["other"]) if keeps else (bound["other"], bound["self"])
            return self._replaced(node, scores, bound["condition"], other, keeps=keeps)
        if (
            target in _FLOORS
            and self.factor > 0
            and self.masks.excludes(bound.get("other", bound.get("min")), self.factor)
        ):
            return bound["self"]  # type: ignore[no-any-return]
        if target in (aten.add.Tensor, aten.sub.Tensor) and self.editor.number(bound["other"]) is not None:
            return bound["self"]  # type: ignore[no-any-return]  # one number more for every key: softmax is the same
        if target in (aten.mul.Tensor, aten.div.Tensor):
            raise Refused(f"the scores are scaled by a tensor ({node.name}), not by one number")
        raise _no_product(node)

    def _sum(self, node: fx.Node, bound: dict[str, Any]) -> fx.Node:
        first: fx.Node = bound["self"]
        second: fx.Node = bound["other"]
        sign = float(bound["alpha"]) * (1 if node.target is aten.add.Tensor else -1)
        if not _leads_to_product(first):
            if _leads_to_product(second) and sign == 1.0:
                first, second = second, first
            elif first.op != "call_function":
                raise _no_product(node)
        if not same_sizes(val(first).shape, val(node).shape):
            raise Refused(f"the scores are broadcast by {node.name}")
        self._add(second, sign, node)
        return first

    def _add(self, term: fx.Node, factor: float, node: fx.Node) -> None:
        shape = val(node).shape
        self.terms.append(Term(term, (broadcast_to(shape), *self.views), None, factor * self.factor))

    def _replaced(self, node: fx.Node, scores: Any, condition: fx.Node, value: Any, keeps: bool) -> fx.Node:
        if not isinstance(scores, fx.Node) or not self.masks.excludes(value, self.factor):
            raise Refused(
                f"{node.name} replaces scores by {value}, which is not at most {EXCLUDES:g}: such keys are not left out"
            )
        if not same_sizes(val(scores).shape, val(node).shape):
            raise Refused(f"the scores are broadcast by {node.name}")
        views = (broadcast_to(val(node).shape), *self.views)
        self.terms.append(Term(condition, views, keeps))
        return scores


def _no_product(node: fx.Node) -> Refused:
    return Refused(f"the scores come from {node.name} ({node.target}), not from a product of queries and keys")


_ON_SCORES = (
    aten.mul.Tensor, aten.div.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.add.Tensor,
    aten.sub.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, *_FLOORS,
)  # fmt: skip


def _leads_to_product(node: Any) -> bool:
    """Whether a node is a product, but for what may be done to scores."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target not in PRODUCTS:
        bound = bound_arguments(node) or {}
        before = through(node)
        if before is None and node.target not in _ON_SCORES:
            return False
        if before is None and _leads_to_product(bound.get("other")):
            return True
        node = before if before is not None else bound["self"]
    return isinstance(node, fx.Node) and node.target in PRODUCTS
