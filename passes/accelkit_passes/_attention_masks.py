"""What is added to attention's scores, or takes keys out of them, in its simplest form.

    and(key_mask[:, None, None, :], ones[1, 1, L, 1])   ->  keep key_mask[:, None, None, :]   no expanded copy
    where(m, 0, -3.4e38), masked_fill(0, ~m, -inf)      ->  keep m
    where(m, bias, -3.4e38)                             ->  keep m, add bias
    (1 - m) * -10000                                    ->  keep m                        where m is boolean
    a constant: all True, or all 0; arange(n) >= 0      ->  nothing
    a number a query, the same for every key            ->  nothing                       softmax takes it off again
    a constant: lower triangular, static sizes          ->  causal
    expand(m), index(m, [arange, arange])               ->  m                             a view

A term is a node with the views that bring it to the scores. A number of -10000 or less counts as "no": exp(-10000) is 0
in every dtype, so that a query that may attend to any key at all gets the same result. A query that may attend to none
gets the average of the values from such numbers (where rounding absorbs the scores), NaN from -inf, and 0 from
accelkit.attention's boolean mask: models do not use these rows, and 0 spoils no other row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, val
from accelkit.pass_api import Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_gather import gathered
from accelkit_passes._attention_layout import Layout, Opaque, moved, source_of, whole

aten = torch.ops.aten

EXCLUDES = -1e4
"""A score of at most this takes a key out: what models of transformers before finfo.min used (BERT's -10000)."""

View = Callable[[Layout], Layout]
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_ARANGE = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)


def broadcast_to(shape: Sequence[Any]) -> View:
    """The view that expands a layout to this shape."""
    return lambda layout: layout.broadcast(shape)


@dataclass(frozen=True)
class Term:
    """Part of a mask.

    Attributes:
        node: a boolean tensor, or one that is added.
        views: what brings it to the shape of the scores, in order.
        keeps: True keeps the keys where the node is True, False those where it is False; None: the node is added.
        factor: what an added node is multiplied with.
    """

    node: fx.Node
    views: tuple[View, ...]
    keeps: bool | None = None
    factor: float = 1.0

    def part(self, node: fx.Node, **changes: Any) -> Term:
        """A term for one operand of the node, which it is broadcast to."""
        return replace(self, node=node, views=(broadcast_to(val(self.node).shape), *self.views), **changes)

    def layout(self) -> Layout:
        """The node as a view in the scores' shape.

        Raises:
            Refused: it is no such view.
        """
        layout = whole(self.node)
        try:
            for view in self.views:
                layout = view(layout)
        except Opaque:
            raise Refused(f"the mask {self.node.name} cannot be followed to the scores' dimensions") from None
        return layout


@dataclass(frozen=True)
class Masks:
    """All of an attention's masks: to keep (boolean terms), to add, and whether a query sees earlier keys only."""

    keep: tuple[Term, ...] = ()
    add: tuple[Term, ...] = ()
    causal: bool = False


class Simplifier:
    """Simplifies terms over one graph; constants are looked at once."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.seen: dict[Any, Any] = {}

    def simplified(self, terms: Sequence[Term]) -> Masks:
        """The terms' parts, without those that change nothing."""
        parts = [part for term in terms for part in self._parts(term)]
        keep: dict[Any, Term] = {}
        add, causal = [], False
        for part in parts:
            kind = "nothing" if _same_for_every_key(part) else self._constant_kind(part)
            causal |= kind == "causal"
            if kind in ("causal", "nothing"):
                continue
            if part.keeps is None:
                add.append(part)
            else:
                keep[part.node, part.keeps, str(part.layout().shape)] = part
        return Masks(tuple(keep.values()), tuple(add), causal)

    # --- parts

    def _gather(self, node: fx.Node, layout: Layout) -> Layout:
        return gathered(node, layout, self.editor)

    def _parts(self, term: Term) -> list[Term]:
        source = source_of(term.node)
        if source is not None and source not in self.editor.written and _is_view(term.node, source, moved):
            view = functools.partial(moved, term.node)
            return self._parts(replace(term, node=source, views=(view, *term.views)))
        bound = bound_arguments(term.node) or {}
        if term.node.target is aten.index.Tensor and _is_view(term.node, bound["self"], self._gather):
            view = functools.partial(self._gather, term.node)
            return self._parts(replace(term, node=bound["self"], views=(view, *term.views)))
        parts = self._added(term, bound) if term.keeps is None else self._kept(term, bound)
        return [term] if parts is None else [p for part in parts for p in self._parts(part)]

    def _kept(self, term: Term, bound: dict[str, Any]) -> list[Term] | None:
        target = term.node.target
        if target in _NOT:
            return [replace(term, node=bound["self"], keeps=not term.keeps)]
        splits = _AND if term.keeps else _OR
        if target in splits and all(isinstance(bound[k], fx.Node) for k in ("self", "other")):
            return [term.part(bound["self"]), term.part(bound["other"])]
        if self._filled_with(term.node) == float(bool(term.keeps)):
            return []
        if target is aten.to.dtype and (flag := _flag(term.node)) is not None:
            return [replace(term, node=flag[0], keeps=term.keeps is flag[1])]
        return None

    def _added(self, term: Term, bound: dict[str, Any]) -> list[Term] | None:
        target = term.node.target
        if self._filled_with(term.node) == 0.0:
            return []
        if target is aten.add.Tensor and isinstance(bound["other"], fx.Node) and bound["alpha"] == 1:
            return [term.part(bound["self"]), term.part(bound["other"])]
        if target is aten.mul.Tensor and (number := self.editor.number(bound["other"])) is not None:
            return self._scaled(term, bound["self"], number)
        if target is aten.to.dtype and all(val(n).is_floating_point() for n in (term.node, bound["self"])):
            inner = self._parts(replace(term, node=bound["self"]))
            return None if len(inner) == 1 and inner[0].node is bound["self"] else inner
        if target in _WHERE or target in _FILL:
            return self._chosen(term, bound)
        return None

    def _scaled(self, term: Term, node: fx.Node, number: float) -> list[Term] | None:
        if number * term.factor <= EXCLUDES and (flag := _flag(node)) is not None:
            return [replace(term, node=flag[0], keeps=not flag[1], factor=1.0)]
        return [replace(term, node=node, factor=term.factor * number)]

    def _chosen(self, term: Term, bound: dict[str, Any]) -> list[Term] | None:
        """where(m, x, -inf): keep m, add x; masked_fill(x, m, -inf): keep not m, add x."""
        if term.node.target in _FILL:
            condition, chosen, other, keeps = bound["mask"], bound["value"], bound["self"], False
        else:
            condition, chosen, other, keeps = bound["condition"], bound["other"], bound["self"], True
            if not self.excludes(chosen, term.factor):
                chosen, other, keeps = other, chosen, False
        if not self.excludes(chosen, term.factor):
            return None
        parts = [replace(term.part(condition), keeps=keeps, factor=1.0)]
        if isinstance(other, fx.Node):
            # masked_fill(x, x.to(bool), -inf): what is not filled is 0
            zero_elsewhere = not keeps and condition.target is aten.to.dtype and condition.args[0] is other
            parts += [] if zero_elsewhere else [term.part(other)]
        elif other != 0:
            return None
        return parts

    def excludes(self, value: Any, factor: float = 1.0) -> bool:
        """Whether a key whose score becomes this is out."""
        number = self.editor.number(value)
        if number is None and isinstance(value, fx.Node):
            number = self._filled_with(value)
        return number is not None and number * factor <= EXCLUDES

    # --- constants

    def _filled_with(self, node: fx.Node) -> float | None:
        """The number that every element is, whatever the sizes."""
        if node.target in _ZEROS:
            return 0.0
        if node.target in _ONES:
            return 1.0
        if node.target in _FULL:
            value = (bound_arguments(node) or {})["fill_value"]
            return float(value) if isinstance(value, (bool, int, float)) else None
        if node.target is aten.ge.Scalar and node.args[1] == 0 and _counts_up(node.args[0]):
            return 1.0  # transformers' mask that lets every query attend, at dynamic lengths
        return None

    def _constant_kind(self, term: Term) -> str:
        """nothing, causal, or other."""
        constant = self.editor.constant(term.node)
        if constant is None or constant.numel() == 0:
            return "other"
        layout = term.layout().without_broadcast()
        shape = tuple(map(str, layout.shape))
        key = (term.node.target, term.keeps, term.factor, shape, layout.in_order)
        if key not in self.seen:
            self.seen[key] = _kind(term, constant, layout)
        return str(self.seen[key])


def _counts_up(node: Any) -> bool:
    """Whether the node is a view of arange(n): no number in it is negative."""
    while isinstance(source := source_of(node), fx.Node):
        node = source
    bound = bound_arguments(node) or {}
    return node.target in _ARANGE and bound.get("start", 0) == 0 and bound.get("step", 1) == 1


def _same_for_every_key(term: Term) -> bool:
    """Whether one number is added to all scores of a query, which softmax takes off again."""
    return term.keeps is None and not term.layout().without_broadcast().dims[-1]


def _is_view(node: fx.Node, source: fx.Node, view: Callable[[fx.Node, Layout], Layout]) -> bool:
    try:
        view(node, whole(source))
    except Opaque:
        return False
    return True


def _flag(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The boolean tensor of the same shape that a tensor of zeros and ones is made of, and whether True became 1."""
    bound = bound_arguments(node) or {}
    if node.target is aten.to.dtype:
        inner = bound["self"]
        return (inner, True) if val(inner).dtype is torch.bool else _flag(inner)
    if node.target is aten.rsub.Scalar and bound["other"] == 1 and bound["alpha"] == 1:
        flag = _flag(bound["self"])
        return None if flag is None else (flag[0], not flag[1])
    return None


def _kind(term: Term, constant: torch.Tensor, layout: Layout) -> str:
    if term.keeps is None:
        scaled = constant.double() * term.factor
        if bool((scaled == 0).all()):
            return "nothing"
        if not bool(((scaled == 0) | (scaled <= EXCLUDES)).all()):
            return "other"
        kept = scaled == 0
    else:
        kept = constant if term.keeps else ~constant
        if bool(kept.all()):
            return "nothing"
    queries, keys = layout.shape[-2:]
    if not layout.in_order or not all(type(size) is int for size in layout.shape) or math.prod(layout.shape) == 0:
        return "other"
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=kept.device).tril()
    same = kept.numel() == math.prod(layout.shape) and bool((kept.reshape(-1, queries, keys) == triangle).all())
    return "causal" if same else "other"


# --- one tensor of all that is left


def emit(masks: Masks, shape: Sequence[Any], dtype: torch.dtype, editor: Editor, before: fx.Node) -> fx.Node | None:
    """The mask as one node of four dimensions that broadcasts to `shape`, [batch, heads, length, keys]; None: none.

    Args:
        dtype: of the queries, whose smallest number takes keys out where a bias is added too.

    Raises:
        Refused: a term's dimensions are not the scores'.
    """
    kept = [_emit_one(term, shape, dtype, editor, before) for term in masks.keep]
    added = [_emit_one(term, shape, dtype, editor, before) for term in masks.add]
    keep = functools.reduce(lambda a, b: editor.call(aten.logical_and.default, (a, b), before), kept) if kept else None
    if not added:
        return keep
    total = functools.reduce(lambda a, b: editor.call(aten.add.Tensor, (a, b), before), added)
    if keep is None:
        return total
    return editor.call(aten.where.ScalarOther, (keep, total, torch.finfo(dtype).min), before)


def _emit_one(term: Term, shape: Sequence[Any], dtype: torch.dtype, editor: Editor, before: fx.Node) -> fx.Node:
    try:
        layout = term.layout().regrouped(shape).without_broadcast()
    except Opaque:
        raise Refused(f"the mask {term.node.name} has other dimensions than the scores") from None
    root = layout.root
    if term.keeps is False:
        root = editor.call(aten.logical_not.default, (root,), before)
    if term.keeps is None and not val(root).is_floating_point():
        root = editor.call(aten.to.dtype, (root, dtype), before)
    if term.keeps is None and term.factor != 1.0:
        root = editor.call(aten.mul.Tensor, (root, term.factor), before)
    return editor.emit(replace(layout, root=root), before)
