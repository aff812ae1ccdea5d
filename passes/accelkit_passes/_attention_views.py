"""A layout as the fewest views of its root: reshape, select, permute, expand, reshape, each only where it is needed.

The other way round than `_attention_layout.layout_of`, which reads a chain of views into a layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accelkit.graph import val
from accelkit_passes._attention_layout import Atom, Layout, product
from accelkit_passes._proofs import same_sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """One view of a chain: an operator and its argument; sizes may be symbolic, -1 in an expand keeps one."""

    target: Any
    argument: Any


def steps(layout: Layout) -> list[Step]:
    """The views that make `layout` of its root, as few as possible."""
    if layout.in_order:
        return _reshaped(val(layout.root).shape, layout.shape)
    return min((_chain(layout, _runs(layout, cut)) for cut in (False, True)), key=len)


def is_copy(layout: Layout) -> bool:
    """Whether the view cannot be taken of a contiguous root without a copy: a reshape of what is permuted or repeated."""
    moves = [step.target for step in steps(layout)]
    return len(moves) > 1 and moves[-1] is aten.reshape.default and moves[:-1] != [aten.select.int] * (len(moves) - 1)


def _chain(layout: Layout, targets: list[list[Atom]]) -> list[Step]:
    root_shape = list(val(layout.root).shape)
    blocks = _root_blocks(layout, targets)
    chain = _reshaped(root_shape, [_stored(block) for block in blocks])
    for position in reversed(range(len(blocks))):
        if blocks[position] and blocks[position][0] in layout.fixed:
            chain.append(Step(aten.select.int, (position, layout.fixed[blocks[position][0]])))
            del blocks[position]
    places = [next(i for i, block in enumerate(blocks) if block is target) for target in targets]
    if places != sorted(places):
        chain.append(Step(aten.permute.default, places))
    shape = [product(target) for target in targets]
    if any(_is_broadcast(target) for target in targets):
        sizes = [size if _is_broadcast(target) else -1 for size, target in zip(shape, targets, strict=True)]
        chain.append(Step(aten.expand.default, sizes))
    return chain + _reshaped(shape, layout.shape)


def _reshaped(before: Sequence[Any], after: Sequence[Any]) -> list[Step]:
    return [] if same_sizes(before, after) else [Step(aten.reshape.default, list(after))]


def _is_broadcast(block: list[Atom]) -> bool:
    return bool(block) and block[0].dim is None


def _stored(block: list[Atom]) -> Any:
    return 1 if _is_broadcast(block) else product(block)


def _runs(layout: Layout, cut: bool) -> list[list[Atom]]:
    """The view's dimensions, cut where they are not adjacent in the root, and between its dimensions where `cut` says so.

    A list's identity says which run it is.
    """
    place = {atom: i for i, atom in enumerate(layout.order)}
    runs: list[list[Atom]] = []
    for group in layout.dims:
        runs.append([])
        for atom in group:
            last = runs[-1]
            if last and not _adjacent(last[-1], atom, place, cut):
                runs.append([])
            runs[-1].append(atom)
    return runs


def _adjacent(one: Atom, other: Atom, place: dict[Atom, int], cut: bool) -> bool:
    if one.dim is None or other.dim is None:
        return False
    return place[other] == place[one] + 1 and not (cut and one.dim != other.dim)


def _root_blocks(layout: Layout, runs: list[list[Atom]]) -> list[list[Atom]]:
    """The runs and the fixed atoms in the root's order; what takes no room stands behind the run before it."""
    starts = {run[0]: run for run in runs if run and not _is_broadcast(run)}
    blocks = [starts.get(atom, [atom]) for atom in layout.order if atom in starts or atom in layout.fixed]
    for position, run in enumerate(runs):
        if not run or _is_broadcast(run):
            before = next(i for i, b in enumerate(blocks) if b is runs[position - 1]) + 1 if position else 0
            blocks.insert(before, run)
    return blocks
