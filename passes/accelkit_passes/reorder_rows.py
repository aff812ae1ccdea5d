"""linear(permute(x, [1, 0, 2])) -> permute(linear(x), [1, 0, 2])

    x [batch, length, width] -> permute -> linear -> ... -> permute     x [batch, length, width] -> linear -> ...

A linear layer acts on each row for itself, so rows may be put in another order after it as well as before it. There the
permutation meets the one that undoes it, or the views that an attention reads as they lie, and the transposed copy is
gone: nn.MultiheadAttention with `batch_first=True` computes in the order of its input throughout.

Runs after recognise_attention. The same numbers, but that a matrix product takes its rows in another order. Refused where
the features are moved along with the rows, where rows are left out or repeated (it would compute others), and where
somebody reads the result in the old order: it would be copied for each of them instead of once for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from accelkit import ops
from accelkit.graph import bound_arguments, val
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_layout import Atom, Group, Layout, Opaque, moved, source_of, whole
from accelkit_passes._attention_views import is_copy

aten = torch.ops.aten
ATTENTION = ops.attention.OPERATOR.overload


@dataclass(frozen=True)
class ReorderRows(GraphPass):
    """linear(permute(x)) -> permute(linear(x))"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        linears = [node for node in graph.graph.nodes if node.target is aten.linear.default]
        if not linears:
            return result
        editor = Editor(graph)
        for linear in linears:
            try:
                rows = _reordered(linear, editor)
                if rows is None:
                    continue
                with editor.all_or_nothing():
                    moved = _move(linear, rows, editor)
                result.rewrote(linear)
                editor.shorten_views(moved)
            except Refused as refusal:
                result.refused(linear, str(refusal))
        if result.changed:
            editor.erase_dead()
        return result


def _reordered(linear: fx.Node, editor: Editor) -> Layout | None:
    """The input as a view of rows that lie in another order; None where they lie in this one."""
    layout = editor.layout((bound_arguments(linear) or {})["input"])
    *rows, features = layout.dims
    flat = [atom for group in rows for atom in group]
    if layout.root.op == "get_attr" or flat == [atom for atom in layout.order if atom in flat]:
        return None
    if not features or layout.order[-len(features) :] != features:
        raise Refused(f"the features of {linear.name}'s input are moved too, not only its rows")
    if set(flat) != set(layout.order) - set(features):
        raise Refused(f"the rows of {linear.name}'s input are taken in part or repeated")
    return layout


def _move(linear: fx.Node, layout: Layout, editor: Editor) -> fx.Node:
    """Put the linear layer in front of the permutation; returns the new one."""
    bound = bound_arguments(linear) or {}
    *rows, features = layout.dims
    natural = _natural_rows(layout)
    source = editor.emit(replace(layout, dims=(*natural, features)), linear)
    arguments = (source, bound["weight"]) if bound["bias"] is None else (source, bound["weight"], bound["bias"])
    new = editor.call(aten.linear.default, arguments, linear)
    renamed = {atom: Atom(atom.size, dim) for dim, group in enumerate(natural) for atom in group}
    result = whole(new).dims[-1]
    order = (*(renamed[atom] for group in natural for atom in group), *result)
    back = Layout(new, order, (*(tuple(renamed[atom] for atom in group) for group in rows), result))
    _require_no_copy(linear, back, editor)
    editor.stand_in(linear, editor.emit(back, linear))
    return new


def _require_no_copy(node: fx.Node, layout: Layout, editor: Editor) -> None:
    """Refuse where a reader of `node` or of its views, being `layout`, would need it in the old order."""
    for user in editor.readers(node):
        views = [view for view in (user, *user.users) if source_of(view) is node]
        for view in views:
            try:
                _require_no_copy(view, moved(view, layout), editor)
            except Opaque:
                raise Refused(f"{view.name} needs {node.name} in the order it has now") from None
        if not views and not layout.in_order and (user.target is not ATTENTION or is_copy(layout)):
            raise Refused(f"{user.name} reads {node.name} in the order it has now: it would be copied there instead")


def _natural_rows(layout: Layout) -> list[Group]:
    """The rows' atoms in the root's own order and dimensions."""
    features = layout.dims[-1]
    groups: list[Group] = []
    for dim in range(len(val(layout.root).shape)):
        group = tuple(atom for atom in layout.order if atom.dim == dim and atom not in features)
        if group or not any(atom.dim == dim for atom in features):
            groups.append(group)
    return groups
