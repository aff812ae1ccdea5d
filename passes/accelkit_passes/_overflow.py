"""Which float32 nodes must stay so in a precision that ends early: what they hold, or read, lies beyond its range.

    x (reaches 7.1e+04) -> add -> layer_norm -> linear      add and layer_norm in float32, linear in float16

The ranges come from a run in float32 on the example (`GraphPass.wants_ranges`). A node whose result is beyond the range
stays in float32, and so does everything that reads such a value: a residual stream until its values are in range again,
and at each of its readers. The rest is as it would be.

Masks are no overflow: where(mask, scores, -3.4e+38) holds that number for what softmax makes 0, and set_precision clamps
it (`_mask_constants`). So where such a constant travels by moves and additions, only values below half of it count. That
ends at a matrix product or a multiplication by anything but 0 and 1: a constant that scales is no mask. A mask that is
read beside values beyond the range keeps its own number, in float32: -65504 would not mask them. An input that does
nothing but be added to scores, or be the mask of an attention operator, is a mask as well: its cast saturates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_api import Range
from accelkit_passes._mask_constants import is_zero_or_one, operator_name
from accelkit_passes._precision_rules import MASK_ARITHMETIC, MASK_MOVES, MASK_SOURCES, MATRIX_PRODUCTS, SELECTIONS

HEADROOM = 2.0
"""Values within this factor of the limit stay in float32: other inputs than those tried go somewhat higher. A binary
digit of float16's exponent; chosen, not measured."""


class Overflow:
    """The masks of a graph, found when made, and what is beyond `dtype`'s range in it."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.limit = float(torch.finfo(dtype).max)
        self.mask_inputs = {p for p in graph.graph.find_nodes(op="placeholder") if _is_float32(p) and _only_masks(p)}
        self.masks: dict[fx.Node, float] = {}  # what mask constants reach -> the smallest of them
        self.unclamped: set[fx.Node] = set()  # of these: stayed in float32, the constants as the model has them
        self.measured = any("range" in node.meta for node in graph.graph.nodes)
        self.nodes = [node for node in graph.graph.nodes if node.op != "output" and _has_float32(node)]
        for node in self.nodes:
            constants = list(self._constants(graph, node))
            if constants:
                self.masks[node] = min(constants)
        self.read_wide: dict[fx.Node, fx.Node] = {}  # masks that are to keep their own numbers -> who reads them
        for node in reversed(graph.graph.nodes) if self.measured else ():
            if node in self.read_wide or self.reason(node):
                self.read_wide |= {i: node for i in node.all_input_nodes if i in self.masks}

    def wanted(self) -> dict[fx.Node, float]:
        """The nodes to measure, with the magnitude from which on a value is a mask."""
        travelling = self.masks.keys() - self.mask_inputs
        return {node: self.masks[node] / 2 if node in travelling else math.inf for node in self.nodes}

    def reason(self, node: fx.Node) -> str:
        """Why the node has to stay in float32; empty where it need not, or where nothing was measured."""
        if not self.measured:
            return ""
        if self.is_beyond(node):
            return f"its largest value on the inputs tried is {self._shown(_range(node).largest)}: stays in float32"
        if (inside := _range(node).inside) > self.limit / HEADROOM:
            return f"its scores may reach {self._shown(inside)} on the inputs tried: stays in float32"
        if node in self.read_wide:
            reader = self.read_wide[node].name
            return f"it holds a mask, which {reader} reads beside values beyond the range: stays in float32"
        for value in node.all_input_nodes:
            if value in self.unclamped:
                return f"it reads {value.name}, which holds a mask in float32: stays in float32"
            if value in self.masks and value not in self.mask_inputs and _scales(node, value):
                constant = f"the constant {self._shown(self.masks[value])}"
                return f"it multiplies by {value.name}, which holds {constant}: stays in float32"
            if self.is_beyond(value):
                largest = f"whose largest value on the inputs tried is {self._shown(_range(value).largest)}"
                return f"it reads {value.name}, {largest}: stays in float32"
        return ""

    def is_beyond(self, node: fx.Node) -> bool:
        """Whether the node's own values do not fit, or hardly."""
        return _range(node).largest > self.limit / HEADROOM and node not in self.mask_inputs

    def saturating(self) -> set[fx.Node]:
        """Masks given as inputs whose numbers the cast must not turn into infinities (their own infinities stay)."""
        return {n for n in self.mask_inputs if _range(n).largest > self.limit and not _range(n).special}

    def stayed(self, node: fx.Node) -> None:
        """Be told that a node was left in float32 for `reason`."""
        if node in self.masks:
            self.unclamped.add(node)

    def _shown(self, number: float) -> str:
        where = "beyond" if number > self.limit else f"within a factor of {HEADROOM:g} of"
        return f"{number:.2g}, {where} {str(self.dtype).removeprefix('torch.')}'s {self.limit:.0f}"

    def _constants(self, graph: fx.GraphModule, node: fx.Node) -> Iterable[float]:
        """Magnitudes beyond the range that the node's own arguments put into its result, or that travel through it."""
        name = operator_name(node)
        if node in self.mask_inputs:
            yield self.limit * (1 + 2**-10)
        if node.op == "get_attr" and any(operator_name(u) in MASK_MOVES | MASK_ARITHMETIC for u in node.users):
            yield from self._in_buffer(graph, node)
        numbers = [abs(a) for a in _plain_numbers(node) if math.isfinite(a)]
        masked_product = name == "mul" and any(_is_flag(i) for i in node.all_input_nodes)
        if name in MASK_SOURCES or masked_product:
            yield from (n for n in numbers if n > self.limit)
        travelling = [self.masks[i] for i in node.all_input_nodes if i in self.masks]
        if name in MASK_MOVES | SELECTIONS or (name in MASK_ARITHMETIC and name != "mul") or masked_product:
            yield from travelling
        elif name in ("mul", "div") and len(node.all_input_nodes) == 1 and numbers and numbers[0]:
            yield from (t * numbers[0] if name == "mul" else t / numbers[0] for t in travelling)

    def _in_buffer(self, graph: fx.GraphModule, node: fx.Node) -> Iterable[float]:
        value = graphs.attribute(graph, str(node.target)).detach()
        if isinstance(graphs.attribute(graph, str(node.target)), torch.nn.Parameter):
            return
        large = value[value.isfinite() & (value.abs() > self.limit)].abs().unique()
        if large.numel() == 1:  # several are data
            yield float(large)


def _range(node: fx.Node) -> Range:
    found = node.meta.get("range")
    return found if isinstance(found, Range) else Range(0.0)


def _is_float32(node: fx.Node) -> bool:
    value = graphs.val(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _has_float32(node: fx.Node) -> bool:
    value = graphs.val(node)
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values)


def _plain_numbers(node: fx.Node) -> list[float]:
    bound: dict[str, Any] = graphs.bound_arguments(node) or {}
    return [float(v) for v in bound.values() if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _is_flag(node: fx.Node) -> bool:
    value = graphs.val(node)
    return is_zero_or_one(node) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)


def _scales(node: fx.Node, value: fx.Node) -> bool:
    """Whether `value` multiplies something that is not 0 or 1."""
    name = operator_name(node)
    if name == "mul":
        return not any(_is_flag(i) for i in node.all_input_nodes) and len(node.all_input_nodes) > 1
    return name in MATRIX_PRODUCTS and not _is_attention_mask(node, value)


def _is_attention_mask(node: fx.Node, value: fx.Node) -> bool:
    bound = graphs.bound_arguments(node) or {}
    return any(bound.get(name) is value for name in ("attn_mask", "attn_bias"))


def _only_masks(value: fx.Node) -> bool:
    """Whether all that is done with a value is to mask attention scores with it."""
    return bool(value.users) and all(_masks(user, value) for user in value.users)


def _masks(user: fx.Node, value: fx.Node) -> bool:
    if _is_attention_mask(user, value):
        return True
    if operator_name(user) == "add":
        others = [i for i in user.all_input_nodes if i is not value]
        return len(others) == 1 and _are_scores(others[0]) and _only_softmax(user)
    return operator_name(user) in MASK_MOVES and len(user.all_input_nodes) == 1 and _only_masks(user)


def _are_scores(node: fx.Node) -> bool:
    """Whether a value is a matrix product, moved and scaled."""
    while len(node.all_input_nodes) == 1 and operator_name(node) in MASK_MOVES | {"mul", "div"}:
        node = node.all_input_nodes[0]
    return operator_name(node) in ("matmul", "bmm", "baddbmm", "einsum")


def _only_softmax(node: fx.Node) -> bool:
    def leads(user: fx.Node) -> bool:
        name = operator_name(user)
        return name in ("softmax", "_softmax", "_safe_softmax") or (name in MASK_MOVES and _only_softmax(user))

    return bool(node.users) and all(leads(user) for user in node.users)
