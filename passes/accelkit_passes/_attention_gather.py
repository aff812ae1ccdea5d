"""index(mask, [arange(batch)[:, None, None, None], arange(keys)]) -> mask[:, None, None, :]

How transformers brings a [batch, keys] mask to the scores: by looking up every element at its own place, which a view does
for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, val
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_layout import Layout, Opaque
from accelkit_passes._proofs import proved

aten = torch.ops.aten


def gathered(node: fx.Node, layout: Layout, editor: Editor) -> Layout:
    """The view that an index operator makes of `layout`, its source.

    Raises:
        Opaque: it does not look up every element once, each dimension in its own order.
    """
    bound = bound_arguments(node) or {}
    indices, rank = bound["indices"], val(node).dim()
    if len(indices) != len(layout.dims) or None in indices:
        raise Opaque
    dims: list[tuple[Any, ...]] = [()] * rank
    last = -1
    for index, size, group in zip(indices, layout.shape, layout.dims, strict=True):
        place = _own_place(index, size, rank, editor)
        if group:
            if place is None or place <= last:
                raise Opaque
            dims[place], last = group, place
    return replace(layout, dims=tuple(dims))


def _own_place(index: fx.Node, size: Any, rank: int, editor: Editor) -> int | None:
    """The dimension of the result along which an index counts 0, 1, ... size - 1; None where there is but one element.

    Raises:
        Opaque: it does not count so.
    """
    layout = editor.layout(index)
    places = [place for place, group in enumerate(layout.dims) if group]
    if not layout.in_order or len(places) > 1 or not _counts(layout.root, size, editor):
        raise Opaque
    return places[0] + rank - len(layout.dims) if places else None


def _counts(node: fx.Node, size: Any, editor: Editor) -> bool:
    constant = editor.constant(node)
    if constant is not None:
        return type(size) is int and torch.equal(constant.flatten(), torch.arange(size).to(constant))
    bound = bound_arguments(node) or {}
    if node.target not in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        return False
    return bound.get("start", 0) == 0 and bound.get("step", 1) == 1 and proved(val(node).shape[0] == size)
