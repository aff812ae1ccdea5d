"""Who reads what positions of padding hold, and what comes of it.

    unpacked -> output                              the output's padding is unspecified
    unpacked -> gelu -> output                      the same
    unpacked -> select(1, 0) -> linear -> output    unspecified for a sequence whose first token is padding
    unpacked * mask -> sum(1)                       nothing: it is 0 either way
    unpacked -> mean(1)                             refused: padding would go into a result for the kept tokens

In plain PyTorch these positions hold numbers that mean nothing; without padding they hold zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.graph import val
from accelkit_passes._fusion import bound, require
from accelkit_passes._padding_masks import KeyMask, Values, hides_padding, leaves_out
from accelkit_passes._token_rules import Call, Tokens, call_on_rows

aten = torch.ops.aten

_SHAPE_ONLY = (
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default,
)  # fmt: skip


@dataclass(frozen=True)
class Open:
    """A value that holds something else at padding than before.

    Attributes:
        tokens: its leading dimensions.
        picks: what picked positions out of [batch, length], in order: operators with their arguments after the first.
    """

    tokens: Tokens
    picks: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = ()


def open_outputs(
    graph: fx.GraphModule, region: dict[fx.Node, Call], mask: KeyMask, values: Values
) -> dict[int, Callable[..., torch.Tensor]]:
    """The outputs that hold something else at padding, by number, and what computes of the graph's inputs where they do not.

    Args:
        region: the nodes that will be computed on packed rows.

    Raises:
        Refused: what padding holds would reach a result that is not padding's.
    """
    found = {node: Open(mask.tokens) for node in region}
    stack = [(node, user) for node in region for user in node.users]
    outputs: dict[int, Callable[..., torch.Tensor]] = {}
    while stack:
        node, reader = stack.pop()
        value = found[node]
        if reader.op == "output":
            numbers = [n for n, output in enumerate(reader.args[0]) if output is node]  # type: ignore[arg-type]
            outputs |= dict.fromkeys(numbers, _kept(graph, mask, value))
        elif reader in region:
            packed = not value.picks and region[reader].reads_tokens(node)
            require(packed, f"{_named(reader)} reads {node.name}, which may be padding, for other tokens")
        elif (after := _after(node, reader, value, mask, values)) is not None and found.get(reader) != after:
            require(reader not in found, f"{_named(reader)} reads different positions of the sequences")
            found[reader] = after
            stack += [(reader, user) for user in reader.users]
    return outputs


def _after(node: fx.Node, reader: fx.Node, value: Open, mask: KeyMask, values: Values) -> Open | None:
    """What the reader's result holds; None where padding does not show in it."""
    if graphs.is_size(reader) or reader.target in _SHAPE_ONLY:
        return None
    if not value.picks and (hides_padding(reader, node, mask, values) or leaves_out(reader, node, mask, values)):
        return None
    call = call_on_rows(reader, value.tokens)
    if call is not None and call.reads_tokens(node):
        return value
    picked = _picked(node, reader, value)
    require(picked is not None, f"{_named(reader)} reads padding into results of other tokens")
    return picked


def _picked(node: fx.Node, reader: fx.Node, value: Open) -> Open | None:
    """What picks positions and mixes none: a select, a slice, an index along the leading dimensions."""
    rank, count, arguments = val(node).dim(), value.tokens.count, bound(reader)
    if arguments.get("self") is not node:
        return None
    if reader.target in (aten.select.int, aten.slice.Tensor) and arguments["dim"] % rank < count:
        left = count - (reader.target is aten.select.int)
    elif reader.target is aten.index.Tensor and len(arguments["indices"]) <= count:
        left = val(reader).dim() - (rank - count)
    else:
        return None
    pick = (reader.target, tuple(reader.args[1:]), dict(reader.kwargs))
    return Open(Tokens(tuple(val(reader).shape[:left])), (*value.picks, pick)) if left else None


def _named(node: fx.Node) -> str:
    return f"{node.name} ({node.target})"


def _kept(graph: fx.GraphModule, mask: KeyMask, value: Open) -> Callable[..., torch.Tensor]:
    """A graph of the same inputs that gives the mask at the value's positions."""
    needed: set[fx.Node] = {mask.node}
    fx.node.map_arg([pick[1:] for pick in value.picks], needed.add)
    for node in reversed(graph.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = copied.node_copy(node, lambda n: copies[n])
    result = copies[mask.node]
    if val(mask.node).dim() == 4:
        result = copied.call_function(aten.squeeze.dims, (result, [1, 2]))
    for target, args, kwargs in value.picks:
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: copies[n])
        result = copied.call_function(target, (result, *args), kwargs)
    copied.output(result)
    return fx.GraphModule(graph, copied)
