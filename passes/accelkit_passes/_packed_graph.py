"""The graph of packed rows beside the unpacked one, and what leads from one to the other.

node in the region                     ->    its call on packed rows
operand from outside of the region     ->    pack_rows, once for all that read it
reader outside of the region           ->    reads unpack_rows
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.graph import val
from accelkit_passes._fusion import bound, require
from accelkit_passes._padding_masks import KeyMask
from accelkit_passes._token_rules import Call, Given, Role

aten = torch.ops.aten
ATTENTION = ops.attention.OPERATOR.overload
_VARIABLE = ops.variable_length_attention.OPERATOR.overload
_LAYOUT, _PACK, _UNPACK = (o.OPERATOR.overload for o in (ops.packed_layout, ops.pack_rows, ops.unpack_rows))


def attention_on_rows(node: fx.Node) -> Call:
    """Self-attention by a mask of padding on packed rows."""
    arguments = bound(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    args = (query, key, value, Given.OFFSETS, Given.LONGEST, arguments["causal"], arguments["scale"])
    return Call(_VARIABLE, args, roles=dict.fromkeys((query, key, value), Role.TOKENS))


class PackedGraph:
    """Puts the packed calls in the place of a region's nodes."""

    def __init__(self, graph: fx.GraphModule, mask: KeyMask, region: dict[fx.Node, Call]) -> None:
        self._graph, self._mask, self._region = graph.graph, mask, region
        self._packed: dict[fx.Node, fx.Node] = {}
        self._outside: dict[tuple[fx.Node, int | None], fx.Node] = {}

    def build(self) -> None:
        """Rewrite the graph in place.

        Raises:
            Refused: the mask is computed from what the region computes; nothing was changed.
        """
        first = next(iter(self._region))
        self._move_mask_before(first)
        with self._graph.inserting_before(first):
            self._make_layout()
        for node, call in self._region.items():
            with self._graph.inserting_before(node):
                self._packed[node] = self._call(call, node)
                self._unpack(node)
        masks = [bound(node)["mask"] for node in self._region if node.target is ATTENTION]
        for node in reversed(self._region):
            self._graph.erase_node(node)
        self._erase_unused(masks)

    def _move_mask_before(self, first: fx.Node) -> None:
        """What computes the mask goes before the first node that needs it; in most graphs it is there already."""
        order = {node: position for position, node in enumerate(self._graph.nodes)}
        needed = {self._mask.node}
        for node in reversed(self._graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        inside = [node.name for node in needed if node in self._region]
        require(not inside, f"its mask is computed from {', '.join(inside)}, which it masks")
        late = sorted((node for node in needed if order[node] > order[first]), key=lambda node: order[node])
        fixed = [node.name for node in late if node.op == "call_function" and not graphs.is_pure(node)]
        require(not fixed, f"its mask is computed by {', '.join(fixed)} after {first.name}")
        for node in late:
            first.prepend(node)

    def _make_layout(self) -> None:
        mask = self._mask.node
        if val(mask).dim() == 4:
            mask = self._graph.call_function(aten.squeeze.dims, (mask, [1, 2]))
        self._sizes = [
            size if isinstance(size, int) else self._graph.call_function(aten.sym_size.int, (mask, dim))
            for dim, size in enumerate(self._mask.tokens.sizes)
        ]
        layout = self._graph.call_function(_LAYOUT, (mask,))
        sources, positions, offsets, rows = (
            self._graph.call_function(operator.getitem, (layout, index)) for index in range(4)
        )
        self._sources, self._positions = sources, positions
        self._given: dict[Any, Any] = {Given.ROWS: rows, Given.OFFSETS: offsets, Given.LONGEST: self._sizes[1]}

    def _call(self, call: Call, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), lambda n: self._operand(n, call, node))
        args = tuple(self._given.get(value, value) if isinstance(value, Given) else value for value in args)
        packed = self._graph.call_function(call.target, args, kwargs)
        packed.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        return packed

    def _operand(self, operand: fx.Node, call: Call, node: fx.Node) -> fx.Node:
        role = call.roles.get(operand)
        if role is None:
            return operand
        if role is Role.TOKENS:
            return self._packed[operand] if operand in self._region else self._pack(operand, None)
        rest = val(node).dim() - self._mask.tokens.count
        if role is Role.BROADCAST:
            return self._pack(operand, rest)
        return self._graph.call_function(aten.squeeze.dims, (operand, list(range(val(operand).dim() - rest))))

    def _pack(self, operand: fx.Node, rest: int | None) -> fx.Node:
        """The operand's rows, where `rest` is given expanded to all tokens before (with so many dimensions after them)."""
        key = (operand, rest)
        if key not in self._outside:
            if rest is not None:
                operand = self._graph.call_function(aten.expand.default, (operand, [*self._sizes, *[-1] * rest]))
            self._outside[key] = self._graph.call_function(_PACK, (operand, self._sources, self._given[Given.ROWS]))
        return self._outside[key]

    def _unpack(self, node: fx.Node) -> None:
        readers = [user for user in node.users if user not in self._region]
        if not readers:
            return
        unpacked = self._graph.call_function(_UNPACK, (self._packed[node], self._positions))
        unpacked.meta = dict(self._packed[node].meta)
        for reader in readers:
            reader.replace_input_with(node, unpacked)

    def _erase_unused(self, nodes: list[fx.Node]) -> None:
        """Views of the mask that only the attentions have read, and what only they have read."""
        while nodes:
            node = nodes.pop()
            if not node._erased and not node.users and node.op == "call_function" and graphs.is_pure(node):
                nodes += node.all_input_nodes
                self._graph.erase_node(node)
