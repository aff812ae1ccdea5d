"""slices of linear(x, cat(wq, wk, wv))  ->  linear(x, wq), linear(x, wk), linear(x, wv): merge_qkv undone, for ONNX

    1. slice(linear(x, W, b), last dimension, from, to)                  ->  linear(x, W[from:to], b[from:to])
    2. select(reshape(linear(x, W, b), [..., 3, heads, width]), -3, i)   ->  reshape(linear(x, W[i], b[i]), [..., heads, width])

Kernels that take the pieces of a packed product as they lie gain by the larger product. ONNX operators take whole tensors:
each piece would be a copy of [batch, length, width]. The weights' pieces are views of the merged weight (of a
quantised one: of its integers and scales). All readers of the product must be such pieces, else it stays whole.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_runner import fake_mode_of

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default)
_DEQUANTIZE = (
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_channel.default,
)


class _Piece(NamedTuple):
    """A reader of some columns of a product, `reshaped` to (heads, width) where that is not None."""

    node: fx.Node
    start: int
    stop: int
    reshaped: tuple[int, int] | None


def split_linears(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of `graph` with its packed products taken apart; the graph itself where there are none."""
    names = {node.name for node in graph.graph.nodes if _pieces(node)}
    if not names:
        return graph
    graph = fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    for node in list(graph.graph.nodes):
        if not node._erased and node.name in names:
            _split(graph, node, _pieces(node) or [])
    graph.recompile()
    return graph


def _pieces(node: fx.Node) -> list[_Piece] | None:
    """The product's readers, where all are pieces of it and its weights are attributes."""
    if node.target is not aten.linear.default or not all(map(_is_constant, node.all_input_nodes[1:])):
        return None
    if node.args[0] in node.all_input_nodes[1:]:
        return None
    columns, rank = graphs.val(node).shape[-1], graphs.val(node).dim()
    pieces = []
    for user in node.users:
        found = _sliced(user, columns, rank) if user.target is aten.slice.Tensor else _selected(user, columns, rank)
        if found is None:
            return None
        pieces += found
    whole = len(pieces) == 1 and pieces[0].stop - pieces[0].start == columns
    return None if whole or not pieces else pieces


def _is_constant(node: fx.Node) -> bool:
    """Whether the node is an attribute, or one that is dequantised: [rows, ...] with one scale a row, or one for all."""
    return node.op == "get_attr" or bool(
        node.target in _DEQUANTIZE
        and all(i.op == "get_attr" for i in node.all_input_nodes)
        and (node.target is _DEQUANTIZE[0] or (node.args[2] is None and node.args[3] == 0))
    )


def _sliced(user: fx.Node, columns: int, rank: int) -> list[_Piece] | None:
    bound = graphs.bound_arguments(user) or {}
    start, stop = bound["start"] or 0, columns if bound["end"] is None else bound["end"]
    if bound["dim"] % rank != rank - 1 or bound["step"] != 1 or not isinstance(start, int) or not isinstance(stop, int):
        return None
    start, stop = (min(i + columns if i < 0 else i, columns) for i in (start, stop))
    return [_Piece(user, start, stop, None)] if 0 <= start < stop else None


def _selected(user: fx.Node, columns: int, rank: int) -> list[_Piece] | None:
    shape = tuple(graphs.val(user).shape) if user.target in _RESHAPES else ()
    if len(shape) != rank + 2 or not all(isinstance(size, int) for size in shape[-3:]):
        return None
    count, heads, width = shape[-3:]
    leading = tuple(graphs.val(user.args[0]).shape)[:-1]  # type: ignore[arg-type]
    # compared as text: asking symbolic sizes would add a guard
    if count * heads * width != columns or list(map(str, shape[:-3])) != list(map(str, leading)):
        return None
    if any(select.target is not aten.select.int for select in user.users):
        return None
    pieces, span = [], heads * width
    for select in user.users:
        bound = graphs.bound_arguments(select) or {}
        index = bound["index"]
        if bound["dim"] % len(shape) != rank - 1 or not isinstance(index, int):
            return None
        index %= count
        pieces.append(_Piece(select, index * span, (index + 1) * span, (heads, width)))
    return pieces


def _split(graph: fx.GraphModule, product: fx.Node, pieces: list[_Piece]) -> None:
    x, *weights = product.args
    assert isinstance(x, fx.Node)
    made: dict[tuple[int, int], fx.Node] = {}
    for piece in pieces:
        rows = (piece.start, piece.stop)
        with graph.graph.inserting_before(product):
            if rows not in made:
                parts = [_rows(graph, weight, *rows) for weight in weights if isinstance(weight, fx.Node)]
                made[rows] = call(graph, aten.linear.default, (x, *parts))
            result = made[rows]
        if piece.reshaped is not None:
            with graph.graph.inserting_before(piece.node):
                shape = [size_of(graph, result, d) for d in range(graphs.val(result).dim() - 1)]
                result = call(graph, aten.reshape.default, (result, [*shape, *piece.reshaped]))
        piece.node.replace_all_uses_with(result)
    for piece in pieces:
        reshaped = piece.node.args[0]
        graph.graph.erase_node(piece.node)
        if isinstance(reshaped, fx.Node) and reshaped is not product and not reshaped.users:
            graph.graph.erase_node(reshaped)
    graph.graph.erase_node(product)


def size_of(graph: fx.GraphModule, node: fx.Node, dim: int) -> int | fx.Node:
    """A size of the node's value: a number, or the node that has it; where the graph inserts."""
    size = graphs.val(node).shape[dim]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, (node, dim))


def _rows(graph: fx.GraphModule, weight: fx.Node, start: int, stop: int) -> fx.Node:
    if weight.op != "get_attr":
        given = [_rows(graph, a, start, stop) if isinstance(a, fx.Node) else a for a in weight.args]
        assert isinstance(weight.target, torch._ops.OpOverload)
        return call(graph, weight.target, tuple(given))
    tensor = graphs.attribute(graph, str(weight.target))[start:stop].detach()
    name = graphs.set_attribute(graph, f"{weight.target}_rows_{start}", tensor)
    node = graph.graph.get_attr(name)
    node.meta["val"] = fake_mode_of(graph).from_tensor(tensor, static_shapes=True)
    return node


def call(graph: fx.GraphModule, target: torch._ops.OpOverload, args: tuple[Any, ...]) -> fx.Node:
    """A call with its fake tensor, where the graph inserts."""
    node = graph.graph.call_function(target, args)
    given = fx.node.map_arg(args, graphs.val)
    node.meta["val"] = graphs.inferred(target, given, {}, fake_mode_of(graph))
    return node
