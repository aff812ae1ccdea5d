"""linear(x, wq), linear(x, wk), linear(x, wv) -> slices of linear(x, cat(wq, wk, wv))

Linear layers that read one input become one: a single larger matrix product uses the chip better than three small ones,
and reads the input once. Queries, keys and values of self-attention, keys and values of cross-attention, the gate and
the up projection of gated networks. The pieces are views of the result.

Pieces that one attention reads come in the order query, key, value, all else as it stands in the graph. A bias that is
missing becomes zeros where another layer has one. The merged weights cost their own memory, unless they lie one after
another already (the packed projection of nn.MultiheadAttention); like every fold they are made anew by refit(). The
same numbers, but that a matrix product may add in another order.

Refused: a weight that is computed at run time, written to, or read by something else too (it would be in memory twice);
weights of another dtype than their neighbours'; a result that is an output (outputs would share memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.graph import bound_arguments, val
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_layout import source_of
from accelkit_passes._proofs import output_families

aten = torch.ops.aten
ATTENTION = ops.attention.OPERATOR.overload


@dataclass(frozen=True)
class MergeQkv(GraphPass):
    """linear layers of one input -> slices of one linear layer"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.graph.nodes:
            if node.target is aten.linear.default:
                groups.setdefault((bound_arguments(node) or {})["input"], []).append(node)
        if not any(len(linears) > 1 for linears in groups.values()):
            return result
        editor = Editor(graph)
        for linears in groups.values():
            fitting = [linear for linear in linears if linear in editor.live]
            if len(fitting) > 1:
                self._merge_group(fitting, editor, result)
        if result.changed:
            editor.erase_dead()
        return result

    def _merge_group(self, linears: list[fx.Node], editor: Editor, result: PassResult) -> None:
        fitting: list[_Layer] = []
        for linear in linears:
            try:
                layer = _layer(linear, editor)
                if fitting and layer.weight.dtype is not fitting[0].weight.dtype:
                    raise Refused(f"its weight is {layer.weight.dtype}, that of {fitting[0].node.name} differs")
                fitting.append(layer)
            except Refused as refusal:
                result.refused(linear, str(refusal))
        if len(fitting) > 1:
            ordered = _in_order(fitting, editor)
            names = ", ".join(layer.node.name for layer in ordered)
            size_bytes = _merge(ordered, first=fitting[0].node, editor=editor)
            result.rewrote(f"{names} into one (new weights of {size_bytes} bytes)")


@dataclass(frozen=True)
class _Layer:
    node: fx.Node
    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None


def _layer(linear: fx.Node, editor: Editor) -> _Layer:
    """The layer with its weights.

    Raises:
        Refused: they are not this layer's alone, or its result is an output.
    """
    bound = bound_arguments(linear) or {}
    if bound["input"] in editor.written:
        raise Refused(f"its input ({bound['input'].name}) is written to, perhaps before the next one reads it")
    weights: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        if bound[name] is None:
            weights.append(None)
            continue
        value = editor.constant(bound[name])
        if value is None:
            raise Refused(f"its {name} ({bound[name].name}) is computed at run time or written to")
        others = [reader.name for reader in _readers_of_memory(value, editor) if reader is not linear]
        if others:
            raise Refused(f"its {name} ({bound[name].name}) is also used by {', '.join(others)}")
        weights.append(value)
    if any(linear in family for family in output_families(editor.graph)):
        raise Refused("its result is an output, which would share memory with others")
    weight, bias = weights
    assert weight is not None
    return _Layer(linear, str(bound["weight"].target), weight, bias)


def _readers_of_memory(value: torch.Tensor, editor: Editor) -> list[fx.Node]:
    """What reads any of the tensor's elements, under whatever name."""
    found: list[fx.Node] = []
    for node, other in graphs.tensor_attributes(editor.graph):
        if other.untyped_storage()._cdata == value.untyped_storage()._cdata and _overlap(value, other):
            found += editor.readers(node)
    return found


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    start, other_start = one.storage_offset(), other.storage_offset()
    return start < other_start + _extent(other) and other_start < start + _extent(one)


def _extent(value: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))


def _in_order(layers: list[_Layer], editor: Editor) -> list[_Layer]:
    """Query, key, value where one attention reads them; the order of the graph otherwise."""
    roles = {layer.node: _role(layer.node, editor) for layer in layers}
    first: dict[fx.Node | None, int] = {}
    for position, layer in enumerate(layers):
        first.setdefault(roles[layer.node][0], position)

    def key(position: int) -> tuple[int, int]:
        attention, role = roles[layers[position].node]
        return (position, 0) if attention is None else (first[attention], role)

    return [layers[position] for position in sorted(range(len(layers)), key=key)]


def _role(linear: fx.Node, editor: Editor) -> tuple[fx.Node | None, int]:
    """The first attention that reads the layer's result or a view of it, and as which operand."""
    stack = [linear]
    while stack:
        node = stack.pop()
        for user in editor.readers(node):
            if user.target is ATTENTION and node in user.args[:3]:
                return user, user.args.index(node)
            if source_of(user) is node:
                stack.append(user)
    return None, 0


def _merge(layers: Sequence[_Layer], first: fx.Node, editor: Editor) -> int:
    """Put one layer in the place of all; returns the bytes of new weights."""
    weight, weight_bytes = _joined([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    arguments = [(bound_arguments(first) or {})["input"], editor.buffer(f"{layers[0].name}_merged", weight, first)]
    bias_bytes = 0
    if any(bias is not None for bias in biases):
        filled = [
            w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, (y.weight for y in layers), strict=True)
        ]
        bias, bias_bytes = _joined(filled)
        arguments.append(editor.buffer(f"{layers[0].name}_bias_merged", bias, first))
    merged = editor.call(aten.linear.default, tuple(arguments), first)
    dim, start = val(merged).dim() - 1, 0
    for position, layer in enumerate(layers):
        end = start + len(layer.weight)
        last = () if position == len(layers) - 1 else (end,)
        piece = editor.call(aten.slice.Tensor, (merged, dim, start, *last), first)
        layer.node.replace_all_uses_with(piece)
        start = end
    return weight_bytes + bias_bytes


def _joined(pieces: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The pieces one after another, and the bytes of new memory."""
    whole = pieces[0]
    if all(piece.is_contiguous() for piece in pieces):
        ends = [piece.storage_offset() + piece.numel() for piece in pieces]
        storages = {piece.untyped_storage()._cdata for piece in pieces}
        if len(storages) == 1 and all(p.storage_offset() == end for p, end in zip(pieces[1:], ends, strict=False)):
            rows = sum(len(piece) for piece in pieces)
            return whole.as_strided((rows, *whole.shape[1:]), whole.stride()), 0
    joined = torch.cat(tuple(pieces))
    return joined, joined.numel() * joined.element_size()
