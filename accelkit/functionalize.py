"""Takes in-place operators on intermediates out of a captured graph, one by one, leaving composite operators whole.

    y = aten.relu_(x); uses of x and y after it  ->  y = aten.relu(x); all of them use y

torch's own functionalisation decomposes `batch_norm`, `dropout` and others on the way, so it is the second choice: used only where
the written memory is a view, a buffer or an input of the model.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from accelkit import graph as graphs


def remove_in_place_operators(graph: fx.Graph) -> bool:
    """Rewrite what is provably local; True when no mutating operator is left."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    families = _families(graph)
    for node in list(graph.nodes):
        if graphs.is_mutating(node):
            written = node.args[0] if node.args else None
            functional = _functional_overload(node)
            if (
                functional is None
                or not isinstance(written, fx.Node)
                or not _is_private(node, written, families, order)
            ):
                return False
            before, after = graphs.val(node), _value_of(functional, node)
            if after is None or _layout(after) != _layout(before):
                return False  # a later view may need the strides that the written tensor had
            node.target = functional
            result = node if after.dtype == before.dtype else _cast(graph, node, after)
            written.replace_all_uses_with(result, delete_user_cb=lambda user, at=node: order.get(user, 0) > order[at])  # type: ignore[misc]
            order[result], families[result] = order[node], families[node]
    return True


def _layout(value: torch.Tensor) -> str:
    return f"{value.shape} {value.stride()} {value.device}"  # as text: comparing symbolic sizes would add guards


def _value_of(functional: torch._ops.OpOverload, node: fx.Node) -> torch.Tensor | None:
    """The fake result of the functional form: it may promote where writing in place keeps the dtype (`y.add_(a_double)`)."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), graphs.val)
    mode = next((v.fake_mode for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, FakeTensor)), None)
    if mode is None:
        return None
    with mode, torch.no_grad():
        result = functional(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def _cast(graph: fx.Graph, node: fx.Node, promoted: torch.Tensor) -> fx.Node:
    # PyTorch computes in the promoted dtype and rounds to the written tensor's: so do these two
    with graph.inserting_after(node):
        cast = graph.call_function(torch.ops.aten.to.dtype, (node, graphs.val(node).dtype))
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    node.meta = dict(node.meta) | {"val": promoted}
    return cast


def _functional_overload(node: fx.Node) -> torch._ops.OpOverload | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    written = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or written != [target._schema.arguments[0].name]:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional = getattr(packet, target._overloadname, None)
    if not isinstance(functional, torch._ops.OpOverload):
        return None
    ours, theirs = list(target._schema.arguments), list(functional._schema.arguments)
    fits = (
        # the written argument may be named otherwise: dropout_(self, ...), dropout(input, ...)
        [str(a.type) for a in ours] == [str(a.type) for a in theirs[: len(ours)]]
        and [a.name for a in ours[1:]] == [a.name for a in theirs[1 : len(ours)]]
        and all(a.has_default_value() for a in theirs[len(ours) :])
    )
    return functional if fits else None


def _families(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For each node, the nodes whose results may share its memory."""
    families: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        family = {node}
        for parent in graphs.aliases(node):
            family |= families[parent]
        for member in family:
            families[member] = family
    return families


def _is_private(
    node: fx.Node, written: fx.Node, families: dict[fx.Node, set[fx.Node]], order: dict[fx.Node, int]
) -> bool:
    for member in families[written]:
        if member.op in ("placeholder", "get_attr"):
            return False
        # what is made after the write is made from its result; an older view that is read later would miss the write
        if member is written or order[member] >= order[node]:
            continue
        if any(order[user] > order[node] for user in member.users):
            return False
    value, result = graphs.val(written), graphs.val(node)
    return isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor) and value.shape == result.shape
