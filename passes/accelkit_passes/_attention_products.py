"""Matrix products in one shape, and what may stand before an operand: views, casts, and numbers it is multiplied with.

matmul(q, k), bmm(q, k), baddbmm(mask, q, k), einsum("bqhd,bkhd->bhqk", q, k)
->  left [lead..., rows, inner] times right [lead..., inner, columns]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, is_random, val
from accelkit.pass_api import Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_layout import Layout, Opaque, moved, source_of, whole

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.mm.default, aten.einsum.default)


@dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
        left, right: its operands, [lead..., rows, inner] and [lead..., inner, columns] when permuted by
        left_dims, right_dims: None for an operand that lies so already.
        order: how the result's dimensions [lead..., rows, columns] lie in the node's.
        added: what is added to it, and the number that is multiplied with (baddbmm).
        factor: what the product is multiplied with.
    """

    left: fx.Node
    right: fx.Node
    left_dims: tuple[int, ...] | None
    right_dims: tuple[int, ...] | None
    order: tuple[int, ...]
    added: tuple[fx.Node, float] | None = None
    factor: float = 1.0

    def plain_left(self, layout: Layout) -> Layout:
        """The left operand's layout as [lead..., rows, inner]."""
        return layout if self.left_dims is None else layout.permuted(self.left_dims)

    def plain_right(self, layout: Layout) -> Layout:
        """The right operand's layout as [lead..., inner, columns]."""
        return layout if self.right_dims is None else layout.permuted(self.right_dims)

    def shape(self, result: Sequence[Any]) -> list[Any]:
        """[lead..., rows, columns] of a result of this shape."""
        return [result[self.order.index(d)] for d in range(len(self.order))]


def product_of(node: fx.Node) -> Product | None:
    """The matrix product that a node computes; None for others, and for products with a vector."""
    if node.target not in PRODUCTS:
        return None
    bound, rank = bound_arguments(node) or {}, val(node).dim()
    order = tuple(range(rank))
    if node.target is aten.einsum.default:
        return _einsum(bound)
    if node.target is aten.baddbmm.default:
        added = None if bound["beta"] == 0 else (bound["self"], float(bound["beta"]))
        return Product(bound["batch1"], bound["batch2"], None, None, order, added, float(bound["alpha"]))
    left, right = bound["self"], bound["mat2" if "mat2" in bound else "other"]
    if min(val(left).dim(), val(right).dim()) < 2:
        return None
    return Product(left, right, None, None, order)


def _einsum(bound: dict[str, Any]) -> Product | None:
    equation, operands = bound["equation"].replace(" ", ""), bound["tensors"]
    inputs, arrow, output = equation.partition("->")
    names = inputs.split(",")
    if not arrow or len(names) != 2 or "." in equation or any(len(set(n)) != len(n) for n in (*names, output)):
        return None
    left, right = names
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    if rows and columns and rows[0] in output and output.find(columns[0]) < output.index(rows[0]):
        (left, right), (rows, columns), operands = (right, left), (columns, rows), operands[::-1]
    lead = [c for c in output if c in left and c in right]
    inner = [c for c in left if c in right and c not in output]
    plain = [*lead, *rows, *columns]
    if not len(inner) == len(rows) == len(columns) == 1 or set(output) != set(plain):
        return None
    return Product(
        operands[0],
        operands[1],
        tuple(left.index(c) for c in (*lead, *rows, *inner)),
        tuple(right.index(c) for c in (*lead, *inner, *columns)),
        tuple(plain.index(c) for c in output),
    )


# --- operands


def operand(node: fx.Node, editor: Editor) -> tuple[Layout, float]:
    """A query's or key's layout, and the number that it is multiplied with on the way."""
    factor, moves, inner = 1.0, [], node
    while True:
        if (multiplied := scaled(inner, editor)) is not None:
            inner, factor = multiplied[0], factor * multiplied[1]
        elif (source := source_of(inner)) is not None and source not in editor.written:
            moves.append(inner)
            inner = source
        else:
            break
    layout = whole(inner)
    try:
        for move in reversed(moves):
            layout = moved(move, layout)
    except Opaque:
        return editor.layout(node), 1.0
    return layout, factor


def scaled(node: fx.Node, editor: Editor) -> tuple[fx.Node, float] | None:
    """x and c of x * c and x / c, where c is one number."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return None
    bound = bound_arguments(node) or {}
    source, number = bound["self"], editor.number(bound["other"])
    if number is None or val(source).dtype is not val(node).dtype or not val(node).is_floating_point():
        return None
    factor = number if node.target in (aten.mul.Tensor, aten.mul.Scalar) else (1 / number if number else math.inf)
    return (source, factor) if math.isfinite(factor) and factor != 0 else None


def through(node: fx.Node) -> fx.Node | None:
    """What a node is, but for its dtype, shape or dropout that is off."""
    if (source := source_of(node)) is not None:
        return source
    if node.target is aten.to.dtype and all(val(n).is_floating_point() for n in (node, *node.all_input_nodes)):
        return node.all_input_nodes[0]
    if is_dropout(node) and not is_random(node):
        return node.all_input_nodes[0]
    return None


def is_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout, on or off."""
    return node.target is aten.dropout.default


def require_one_dtype(tensors: Sequence[fx.Node]) -> None:
    """Refuse operands of several dtypes, which a fused operator would not promote."""
    dtypes = list(dict.fromkeys(str(val(tensor).dtype) for tensor in tensors))
    if len(dtypes) > 1:
        raise Refused(f"queries, keys and values differ in dtype: {', '.join(dtypes)}")
