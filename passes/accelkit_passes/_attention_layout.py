"""Views as regroupings of one tensor's dimensions, so that a chain of them can be written in its shortest form.

    permute(reshape(select(permute(reshape(linear, [B, L, 3, H, D]), [2, 0, 3, 1, 4]), 0, 1), ...), [0, 2, 1, 3])
    ->  select(reshape(linear, [B, L, 3, H, D]), 2, 1)

Each dimension of the root is split into atoms as later reshapes need it; a layout says which atoms, in which order, make
up each dimension of the view, which are fixed to one index, and which are broadcast. A reshape that fits no such split
is opaque: the chain then starts at its result. Sizes may be symbolic: a split is made only where it is proved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, val
from accelkit_passes._proofs import proved, same_sizes

aten = torch.ops.aten


class Opaque(Exception):
    """A view that is no regrouping of its source's dimensions."""


@dataclass(frozen=True, eq=False)
class Atom:
    """A factor of a dimension of the root, or (broadcast) a repetition of the same elements."""

    size: Any
    dim: int | None = None  # of the root; None: broadcast


Group = tuple[Atom, ...]


@dataclass(frozen=True)
class Layout:
    """A view of `root`.

    Attributes:
        root: what it is a view of.
        order: the root's atoms, in memory order if it is contiguous; dimensions of size 1 have none.
        dims: the view's dimensions, each a product of atoms, the last one varying fastest; () is of size 1.
        fixed: the atoms that are held at one index.
    """

    root: fx.Node
    order: Group
    dims: tuple[Group, ...]
    fixed: dict[Atom, int] = field(default_factory=dict)

    @property
    def shape(self) -> list[Any]:
        return [product(group) for group in self.dims]

    @property
    def flat(self) -> Group:
        return tuple(atom for group in self.dims for atom in group)

    def permuted(self, dims: Sequence[int]) -> Layout:
        return replace(self, dims=tuple(self.dims[d] for d in dims))

    def regrouped(self, shape: Sequence[Any]) -> Layout:
        """The view reshaped.

        Raises:
            Opaque: the new dimensions are no products of (provable) factors of the old ones.
        """
        layout, groups = self, []
        done = 0  # atoms of layout.flat that have a group
        for size in shape:
            group_size: Any = 1
            start = done
            while not proved(group_size == size):
                if done == len(layout.flat):
                    raise Opaque
                atom = layout.flat[done]
                if not proved(size % (group_size * atom.size) == 0):
                    if not proved(size % group_size == 0):
                        raise Opaque
                    layout = layout._split(atom, plain(size // group_size))
                    atom = layout.flat[done]
                group_size = group_size * atom.size
                done += 1
            groups.append((start, done))
        if done != len(layout.flat):
            raise Opaque
        return replace(layout, dims=tuple(layout.flat[start:end] for start, end in groups))

    def _split(self, atom: Atom, outer: Any) -> Layout:
        if proved(outer == 1) or not proved(atom.size % outer == 0):
            raise Opaque
        parts = (Atom(outer, atom.dim), Atom(plain(atom.size // outer), atom.dim))

        def swap(group: Group) -> Group:
            return tuple(new for old in group for new in (parts if old is atom else (old,)))

        return replace(self, order=swap(self.order), dims=tuple(swap(group) for group in self.dims))

    def broadcast(self, shape: Sequence[Any]) -> Layout:
        """The view expanded to `shape`, new dimensions in front."""
        dims: list[Group] = [()] * (len(shape) - len(self.dims)) + list(self.dims)
        for i, size in enumerate(shape):
            if not proved(product(dims[i]) == size):
                if dims[i]:
                    raise Opaque
                dims[i] = (Atom(size),)
        return replace(self, dims=tuple(dims))

    def selected(self, dim: int, index: int) -> Layout:
        """The view at one index of a dimension, which goes."""
        fixed, rest = dict(self.fixed), index
        for atom in reversed(self.dims[dim]):
            if type(atom.size) is not int:
                if len(self.dims[dim]) > 1:
                    raise Opaque
                rest, digit = 0, rest
            else:
                rest, digit = divmod(rest, atom.size)
            if atom.dim is not None:
                fixed[atom] = digit
        return replace(self, dims=self.dims[:dim] + self.dims[dim + 1 :], fixed=fixed)

    def narrowed(self, dim: int, start: Any, length: Any) -> Layout:
        """Part of a dimension, where it is one of several equal parts."""
        size = product(self.dims[dim])
        if proved(size == length):
            return self
        if not all(type(n) is int for n in (size, start, length)) or length < 1 or size % length or start % length:
            raise Opaque
        shape = self.shape
        parts = self.regrouped([*shape[:dim], size // length, length, *shape[dim + 1 :]])
        return parts.selected(dim, start // length)

    def without_broadcast(self) -> Layout:
        """Dimensions that only repeat one element, of size 1 instead."""
        return replace(self, dims=tuple(() if all(a.dim is None for a in group) else group for group in self.dims))

    @property
    def in_order(self) -> bool:
        """Whether the elements lie as in the root, so that the view is one reshape of it."""
        return self.flat == self.order


def product(group: Sequence[Atom]) -> Any:
    size: Any = 1
    for atom in group:
        size = size * atom.size
    return plain(size)


def plain(size: Any) -> Any:
    """A number where a size is symbolic in name only (4 * s0 // s0); asks nothing of it."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
        return int(size.node.expr)
    return size


def whole(node: fx.Node) -> Layout:
    """The node as a view of itself."""
    dims = tuple(() if proved(size == 1) else (Atom(size, dim),) for dim, size in enumerate(val(node).shape))
    return Layout(node, tuple(atom for group in dims for atom in group), dims)


def same_end(layout: Layout, value: torch.Tensor) -> bool:
    """Whether the last two dimensions are as long as the tensor's."""
    return len(layout.dims) >= 2 and same_sizes(layout.shape[-2:], value.shape[-2:])


def source_of(node: fx.Node) -> fx.Node | None:
    """What the node is a view (or a plain copy) of; None where it computes something."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        pieces = node.args[0]
        if isinstance(pieces, fx.Node) and pieces.target in _PIECES:
            return pieces.all_input_nodes[0]
        return None
    return node.all_input_nodes[0] if node.target in _MOVES else None


def moved(move: fx.Node, layout: Layout) -> Layout:
    """The view that `move` makes of `layout`.

    Raises:
        Opaque: it is no regrouping.
    """
    if move.target is operator.getitem:
        pieces, index = move.args
        assert isinstance(pieces, fx.Node)
        assert isinstance(index, int)
        return _PIECES[pieces.target](pieces, index, layout)
    return _MOVES[move.target](move, layout)


def layout_of(node: fx.Node, root: fx.Node | None = None, written: frozenset[fx.Node] = frozenset()) -> Layout:
    """The node as a view of what was computed last before it, or of `root`, which it is made of by views alone.

    The memory of the nodes in `written` changes: what is made of them is not looked through.
    """
    moves = []
    while node is not root and (source := source_of(node)) is not None and source not in written:
        moves.append(node)
        node = source
    layout = whole(node)
    for move in reversed(moves):
        try:
            layout = moved(move, layout)
        except Opaque:
            layout = whole(move)
    return layout


# --- what each operator does to a layout


def _reshape(move: fx.Node, layout: Layout) -> Layout:
    return layout.regrouped(val(move).shape)


def _permute(move: fx.Node, layout: Layout) -> Layout:
    rank = len(layout.dims)
    return layout.permuted([d % rank for d in (bound_arguments(move) or {})["dims"]])


def _transpose(move: fx.Node, layout: Layout) -> Layout:
    bound, dims = bound_arguments(move) or {}, list(range(len(layout.dims)))
    one, other = bound["dim0"] % len(dims), bound["dim1"] % len(dims)
    dims[one], dims[other] = dims[other], dims[one]
    return layout.permuted(dims)


def _unsqueeze(move: fx.Node, layout: Layout) -> Layout:
    dim = (bound_arguments(move) or {})["dim"] % (len(layout.dims) + 1)
    return replace(layout, dims=(*layout.dims[:dim], (), *layout.dims[dim:]))


def _expand(move: fx.Node, layout: Layout) -> Layout:
    return layout.broadcast(val(move).shape)


def _same(move: fx.Node, layout: Layout) -> Layout:
    return layout


def _select(move: fx.Node, layout: Layout) -> Layout:
    bound = bound_arguments(move) or {}
    return _at(layout, bound["dim"] % len(layout.dims), bound["index"])


def _at(layout: Layout, dim: int, index: Any) -> Layout:
    size = layout.shape[dim]
    if type(index) is not int or (index < 0 and type(size) is not int):
        raise Opaque
    return layout.selected(dim, index if index >= 0 else index + size)


def _slice(move: fx.Node, layout: Layout) -> Layout:
    bound = bound_arguments(move) or {}
    if bound["step"] != 1:
        raise Opaque
    dim = bound["dim"] % len(layout.dims)
    return _range(layout, dim, bound["start"] or 0, val(move).shape[dim])


def _range(layout: Layout, dim: int, start: Any, length: Any) -> Layout:
    if type(start) is int and start < 0:
        start += layout.shape[dim]
    return layout.narrowed(dim, start, length)


def _repeat_interleave(move: fx.Node, layout: Layout) -> Layout:
    bound = bound_arguments(move) or {}
    if bound["dim"] is None or type(bound["repeats"]) is not int:
        raise Opaque
    dim = bound["dim"] % len(layout.dims)
    dims = list(layout.dims)
    dims[dim] = (*dims[dim], Atom(bound["repeats"])) if bound["repeats"] != 1 else dims[dim]
    return replace(layout, dims=tuple(dims))


def _unbound(pieces: fx.Node, index: int, layout: Layout) -> Layout:
    return _at(layout, (bound_arguments(pieces) or {})["dim"] % len(layout.dims), index)


def _part(pieces: fx.Node, index: int, layout: Layout) -> Layout:
    dim = (bound_arguments(pieces) or {})["dim"] % len(layout.dims)
    sizes = [piece.shape[dim] for piece in val(pieces)]
    return _range(layout, dim, sum(sizes[:index]), sizes[index])


_MOVES: dict[Any, Callable[[fx.Node, Layout], Layout]] = {
    **dict.fromkeys(
        (
            aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.reshape_as.default,
            aten.view_as.default,
        ),
        _reshape,
    ),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _expand),
    **dict.fromkeys((aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default), _same),
    **dict.fromkeys((aten.transpose.int, aten.swapaxes.default, aten.swapdims.default), _transpose),
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.repeat_interleave.self_int: _repeat_interleave,
}  # fmt: skip
_PIECES: dict[Any, Callable[[fx.Node, int, Layout], Layout]] = {
    aten.unbind.int: _unbound,
    aten.split.Tensor: _part,
    aten.split_with_sizes.default: _part,
    aten.chunk.default: _part,
}
