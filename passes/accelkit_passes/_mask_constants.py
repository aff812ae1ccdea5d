"""Constants beyond the low precision's range: a mask's torch.finfo(torch.float32).min becomes the low precision's own.

    where(mask, 0, -3.4e38)  ->  where(mask, 0, -3.39e38 (bfloat16) or -65504 (float16))

Rounded instead, the constant would be -inf, and a row of scores that is masked everywhere NaN. The clamp happens where
the constant is made, and comparisons against the same number follow it (`mask == torch.finfo(torch.float32).min`). Real
infinities stay. Only values on their way into a low-precision tensor are touched: a rotary base of 500000 in float32
arithmetic is not a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit_passes._precision_rules import CASTS, COMPARISONS, FILLS, MASK_ARITHMETIC, MASK_MOVES, MOVES

aten = torch.ops.aten


def operator_name(node: fx.Node) -> str:
    """`masked_fill` for `aten.masked_fill.Scalar`; empty for what is no operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.partition("::")[2]


@dataclass
class MaskConstants:
    """Clamps the constants of one graph to the range of `dtype`; `report` is told of each."""

    graph: fx.GraphModule
    dtype: torch.dtype
    report: Callable[[str], None]
    clamped: dict[fx.Node, float] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    protected: set[fx.Node] = field(default_factory=set)

    @property
    def limit(self) -> float:
        return float(torch.finfo(self.dtype).max)

    def beyond(self, value: Any) -> bool:
        """Whether a plain number is finite and would overflow."""
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and abs(value) > self.limit
        )

    def clamp_arguments(self, node: fx.Node) -> None:
        """Clamp the numbers that an operator which runs in the low precision puts into its result or compares with."""
        name = operator_name(node)
        scales = name == "mul" and any(is_zero_or_one(i) for i in node.all_input_nodes)
        if name in FILLS or name in COMPARISONS or name in ("add", "sub") or scales:
            self._clamp_numbers(node)

    def protect(self, reader: fx.Node) -> None:
        """Leave the constants that reach `reader` as they are: it reads them in float32, beside values of their
        size."""
        self.protected.update(one for value in reader.all_input_nodes for one in self._ancestry(value))

    def prepare(self, node: fx.Node) -> bool:
        """Clamp the constants that reach `node` (float32) before it is cast; True where the cast itself must
        saturate."""
        found = self._ancestry(node)
        before = set(self.clamped)
        large = added = infinite = False
        if not self.protected.isdisjoint(found):
            return self._has_finite_beyond(found)
        for one in found:
            name = operator_name(one)
            if one.op == "get_attr":
                attribute_large, attribute_infinite = self._clamp_attribute(one, found)
                large, infinite = large or attribute_large, infinite or attribute_infinite
                continue
            numbers = _numbers(one)
            infinite |= any(math.isinf(n) for n in numbers)
            if any(self.beyond(n) for n in numbers):
                large = True
                if name in FILLS or (name == "mul" and any(is_zero_or_one(i) for i in one.all_input_nodes)):
                    self._clamp_numbers(one)
            added |= name in MASK_ARITHMETIC
        large |= bool(set(found) & set(self.clamped))
        self._follow([n for n in self.clamped if n not in before])
        return large and added and not infinite

    def _has_finite_beyond(self, found: list[fx.Node]) -> bool:
        """Whether the numbers reach beyond the range, and none is infinite (a cast that saturates would change it)."""
        numbers = [n for one in found for n in _numbers(one)]
        tensors = [graphs.attribute(self.graph, str(one.target)) for one in found if one.op == "get_attr"]
        if any(map(math.isinf, numbers)) or any(bool(t.isinf().any()) for t in tensors):
            return False
        return any(map(self.beyond, numbers)) or any(bool((t.abs() > self.limit).any()) for t in tensors)

    def _ancestry(self, node: fx.Node) -> list[fx.Node]:
        """What the numbers of `node` are made from, as far as they only move, fill and add up."""
        found: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            one = stack.pop()
            value = graphs.val(one)
            if one in found or not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                continue
            name = operator_name(one)
            if one.op == "get_attr" or name in FILLS:
                found[one] = None
            if name in MASK_MOVES or name in MASK_ARITHMETIC:
                found[one] = None
                stack.extend(one.all_input_nodes)
        return list(found)

    def _clamp_numbers(self, node: fx.Node) -> None:
        def clamp(value: Any) -> Any:
            if not self.beyond(value):
                return value
            limited = math.copysign(self.limit, value)
            self.clamped[node] = float(value)
            self.report(f"{node.name}: the constant {value:.6g} became {limited:.6g}, {self.dtype}'s own limit")
            return limited

        node.args = tuple(clamp(a) for a in node.args)
        node.kwargs = {k: clamp(v) for k, v in node.kwargs.items()}

    def _clamp_attribute(self, node: fx.Node, chain: Iterable[fx.Node]) -> tuple[bool, bool]:
        """Whether the tensor had finite values out of range (it is replaced by a copy without), and infinite ones."""
        value = graphs.attribute(self.graph, str(node.target)).detach()
        if value.numel() == 0:
            return False, False
        low, high = torch.aminmax(value)
        if bool(low >= -self.limit) and bool(high <= self.limit):
            return False, False
        infinite = bool(torch.isinf(value).any())
        large = torch.isfinite(value) & (value.abs() > self.limit)
        if not bool(large.any()):
            return False, infinite
        fitting = torch.where(large, value.clamp(-self.limit, self.limit), value)
        with self.graph.graph.inserting_after(node):
            new = self.graph.graph.get_attr(graphs.set_attribute(self.graph, f"{node.target}_in_range", fitting))
        new.meta = dict(node.meta)
        users = set(chain)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user in users)
        self.clamped[new] = float(value[large].flatten()[0])
        self.replaced[node] = new
        self.report(f"{node.name}: {int(large.sum())} values beyond {self.limit:.6g} became {self.dtype}'s own limit")
        return True, infinite

    def _follow(self, fresh: list[fx.Node]) -> None:
        """Comparisons with the number that was clamped must compare with what it became."""
        seen: set[fx.Node] = set()
        stack = list(fresh)
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen.add(one)
            for user in list(one.users):
                name = operator_name(user)
                if name in COMPARISONS:
                    self._clamp_numbers(user)
                elif name in MASK_MOVES or name in MASK_ARITHMETIC:
                    stack.append(user)


def _numbers(node: fx.Node) -> list[float]:
    bound = graphs.bound_arguments(node) or {}
    return [v for v in bound.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]


def is_zero_or_one(node: fx.Node) -> bool:
    """Whether a tensor provably comes from a 0-or-1 mask: made of integers or booleans, or `1 - x`."""
    while operator_name(node) in MOVES or operator_name(node) in CASTS:
        node = node.args[0]  # type: ignore[assignment]
        value = graphs.val(node)
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex():
            return True
    bound = graphs.bound_arguments(node) or {}
    if operator_name(node) == "rsub":
        return bound.get("other") == 1
    return operator_name(node) == "sub" and bound.get("self") == 1
