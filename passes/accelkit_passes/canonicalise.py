"""Graphs that mean the same get one form, so that every later pass needs one pattern.

    1. linear(input=x, weight=w, bias=None)        ->  linear(x, w)            positional, defaults dropped
    2. add(w, x), mul(w, x), add(old, new)         ->  add(x, w), mul(x, w), add(new, old)  weights and older second
    3. softmax(x, -1), permute(x, [0, -1, -2])     ->  softmax(x, 2), permute(x, [0, 2, 1])
    4. slice(x, 1, None, 2**63 - 1), select(x, 0, -1)  ->  slice(x, 1, 0), select(x, 0, 7)
    5. view, flatten, unflatten, _unsafe_view      ->  reshape, known sizes as numbers, one unknown size as -1
    6. transpose, t, mT, numpy_T, swapaxes, movedim    ->  permute
    7. to.device, to.other, type_as, _to_copy, ... ->  to.dtype(x, dtype)      where only the dtype changes
    8. expand(x, [2, 8, 8]) of x: [1, 8, 8]        ->  expand(x, [2, -1, -1])  sizes that stay are -1

Why these: rewrite patterns are written with positional arguments, with the bias or the residual second, and with these
spellings of views (1, 2, 3, 5, 6, 7); equal nodes become textually equal for eliminate_common_subexpressions (4, 8);
and fewer nodes compute sizes (5, 8). Matrix products stay as they are: swapping between mm, matmul and linear may
change the last bits.

Bit for bit the same: in case 2 addition and multiplication commute, but for the payload of a NaN; a swap that could
change the memory layout of the result, and with it the order of a later sum, is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, memory_family, val
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._proofs import contiguous, proved, same_sizes, same_strides

aten = torch.ops.aten
Target = torch._ops.OpOverload
Call = tuple[Target, dict[str, Any]]
"""An operator and its arguments by the schema's names."""


@dataclass(frozen=True)
class Canonicalise(GraphPass):
    """One form for graphs that mean the same; see the module's numbered cases."""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        ranks = _commuting_ranks(graph)
        for node in graph.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, Target):
                continue
            try:
                target, arguments = _canonical(node, ranks)
            except Refused as refusal:
                result.refused(node, str(refusal))
                target, arguments = node.target, bound_arguments(node) or {}
            args, kwargs = _spelled(target, arguments)
            if (node.target, node.args, node.kwargs) != (target, args, kwargs):
                node.target, node.args, node.kwargs = target, args, kwargs
                result.rewrote(node)
        return result


def _canonical(node: fx.Node, ranks: dict[fx.Node, tuple[bool, int]]) -> Call:
    target = node.target
    assert isinstance(target, Target)
    arguments = bound_arguments(node) or {}
    if target in _COMMUTATIVE:
        return _commuted(node, target, arguments, ranks)
    if target in _RESHAPES:
        return _reshape(node, target, arguments)
    if target in _PERMUTES:
        return _permute(node, target, arguments)
    if target in _CASTS:
        return _cast(node, target, arguments)
    arguments = _non_negative(node, target, arguments)
    if target in _INDEXING:
        return target, _INDEXING[target](node, arguments)
    return target, arguments


# --- case 1: arguments


def _spelled(target: Target, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional = [a for a in target._schema.arguments if not a.kwarg_only]
    args = [arguments[a.name] for a in positional]
    while args and _is_default(positional[len(args) - 1], args[-1]):
        args.pop()
    named = (a for a in target._schema.arguments if a.kwarg_only)
    return tuple(args), {a.name: arguments[a.name] for a in named if not _is_default(a, arguments[a.name])}


def _is_default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    return type(value) is type(default) and bool(value == default)


# --- case 2: commutative operators

_COMMUTATIVE = frozenset({
    aten.add.Tensor, aten.mul.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.__and__.Tensor,
    aten.__or__.Tensor, aten.logical_and.default, aten.logical_or.default,
})  # fmt: skip


def _commuting_ranks(graph: fx.GraphModule) -> dict[fx.Node, tuple[bool, int]]:
    """(computed from an input, position): the larger goes first."""
    ranks: dict[fx.Node, tuple[bool, int]] = {}
    for position, node in enumerate(graph.graph.nodes):
        computed = node.op == "placeholder" or any(ranks[i][0] for i in node.all_input_nodes)
        ranks[node] = (computed, position)
    return ranks


def _commuted(node: fx.Node, target: Target, arguments: dict[str, Any], ranks: dict[fx.Node, tuple[bool, int]]) -> Call:
    first, second = arguments["self"], arguments["other"]
    if not isinstance(second, fx.Node) or ranks[first] >= ranks[second]:
        return target, arguments
    left, right = val(first), val(second)
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return target, arguments  # a size: the schema wants the tensor first
    if arguments.get("alpha", 1) != 1:
        raise Refused(f"alpha={arguments['alpha']} scales the second operand only")
    if not _same_layout_either_way(left, right):
        raise Refused("swapping the operands could change the result's memory layout")
    return target, {**arguments, "self": second, "other": first}


def _same_layout_either_way(left: torch.Tensor, right: torch.Tensor) -> bool:
    if min(left.dim(), right.dim()) <= 1:  # PyTorch orders dimensions by strides; one dimension has no order
        return True
    if same_sizes(left.shape, right.shape) and same_strides(left, right):
        return True
    return contiguous(left) and contiguous(right)


# --- case 3: dimensions counted from the front

_DIM_NAMES = ("dim", "dim0", "dim1", "start_dim", "end_dim", "dims")
_WITH_DIMS = frozenset(
    f"aten::{name}"
    for name in (
        "softmax", "log_softmax", "_softmax", "_log_softmax", "cat", "concat", "stack", "select", "slice", "narrow",
        "split", "split_with_sizes", "chunk", "unbind", "squeeze", "unsqueeze", "sum", "mean", "prod", "amax", "amin",
        "max", "min", "argmax", "argmin", "all", "any", "cumsum", "logsumexp", "index_select", "gather", "scatter",
        "flip", "var", "std", "topk", "sort", "glu", "roll",
    )
)  # fmt: skip


def _non_negative(node: fx.Node, target: Target, arguments: dict[str, Any]) -> dict[str, Any]:
    name = target._schema.name
    if name not in _WITH_DIMS:
        return arguments
    first = node.all_input_nodes[0]
    rank = val(first).dim() + (name in ("aten::unsqueeze", "aten::stack"))
    return {k: _positive(v, rank) if k in _DIM_NAMES else v for k, v in arguments.items()}


def _positive(dim: Any, rank: int) -> Any:
    if isinstance(dim, (tuple, list)):
        return [_positive(d, rank) for d in dim]
    return dim + max(rank, 1) if type(dim) is int and dim < 0 else dim


# --- case 4: slices and indices


def _slice(node: fx.Node, arguments: dict[str, Any]) -> dict[str, Any]:
    size = val(arguments["self"]).shape[arguments["dim"]]
    start, end = arguments["start"] or 0, arguments["end"]
    if type(size) is int and type(start) is int and (end is None or type(end) is int):
        start, end, _ = slice(start, end).indices(size)
        end = None if end == size else end
    elif type(end) is int and end == 2**63 - 1:
        end = None
    return {**arguments, "start": start, "end": end}


def _select(node: fx.Node, arguments: dict[str, Any]) -> dict[str, Any]:
    size, index = val(arguments["self"]).shape[arguments["dim"]], arguments["index"]
    if type(size) is int and type(index) is int and index < 0:
        index += size
    return {**arguments, "index": index}


# --- case 5: reshape

_RESHAPES = {
    aten.view.default: "size", aten.reshape.default: "shape", aten._unsafe_view.default: "size",
    aten.flatten.using_ints: None, aten.unflatten.int: None,
}  # fmt: skip


def _reshape(node: fx.Node, target: Target, arguments: dict[str, Any]) -> Call:
    source, name = arguments["self"], _RESHAPES[target]
    # _unsafe_view hides that it is a view: as a reshape, an output of it would newly share its source's memory
    if target is aten._unsafe_view.default and any(n.op in ("placeholder", "get_attr") for n in memory_family(source)):
        raise Refused(f"_unsafe_view of {source.name}, which is not the graph's own memory")
    shape = val(node).shape
    given = list(arguments[name]) if name is not None else [None] * len(shape)
    return aten.reshape.default, {"self": source, "shape": _reshape_sizes(given, val(source), shape)}


def _reshape_sizes(given: list[Any], source: torch.Tensor, shape: torch.Size) -> list[Any]:
    sizes = [size if type(size) is int else entry for size, entry in zip(shape, given, strict=True)]
    unknown = [i for i, size in enumerate(shape) if type(size) is not int]
    if len(unknown) == 1 and _is_the_rest(source, shape, unknown[0]):
        sizes[unknown[0]] = -1
    if None in sizes:
        raise Refused(f"the shape {list(shape)} has several sizes that are known only at run time")
    return sizes


def _is_the_rest(source: torch.Tensor, shape: torch.Size, index: int) -> bool:
    # -1 divides the number of elements; it must come out as the very same expression, and with no zero to divide by
    known = math.prod(size for i, size in enumerate(shape) if i != index)
    total: Any = 1
    for size in source.shape:
        total = total * size
    return known != 0 and proved(total % known == 0) and str(total // known) == str(shape[index])


# --- case 6: permute

_PERMUTES = frozenset({
    aten.t.default, aten.transpose.int, aten.permute.default, aten.swapaxes.default, aten.swapdims.default,
    aten.numpy_T.default, aten.mT.default, aten.movedim.int, aten.movedim.intlist,
})  # fmt: skip


def _permute(node: fx.Node, target: Target, arguments: dict[str, Any]) -> Call:
    sizes = [dimension + 1 for dimension in range(val(arguments["self"]).dim())]  # each size tells its dimension
    probe = torch.empty(sizes, device="meta")
    moved = target(**{**arguments, "self": probe})
    return aten.permute.default, {"self": arguments["self"], "dims": [size - 1 for size in moved.shape]}


# --- case 7: casts

_CASTS = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default,
})  # fmt: skip


def _cast(node: fx.Node, target: Target, arguments: dict[str, Any]) -> Call:
    source, result = val(arguments["self"]), val(node)
    if source.dtype == result.dtype or source.device != result.device or arguments.get("pin_memory"):
        return target, arguments  # one dtype: a copy or nothing, which remove_no_ops tells apart
    if source.layout != result.layout or arguments.get("memory_format") not in (None, torch.preserve_format):
        return target, arguments
    # with another dtype it is a copy anyway
    plain = {"self": arguments["self"], "dtype": result.dtype, "non_blocking": False, "copy": False}
    return aten.to.dtype, {**plain, "memory_format": None}


# --- case 8: expand


def _expand(node: fx.Node, arguments: dict[str, Any]) -> dict[str, Any]:
    source, shape, sizes = val(arguments["self"]).shape, val(node).shape, list(arguments["size"])
    new = len(shape) - len(source)
    for i in range(new, len(shape)):
        if proved(operator.eq(source[i - new], shape[i])):
            sizes[i] = -1
        elif type(shape[i]) is int:
            sizes[i] = shape[i]
    return {**arguments, "size": sizes}


_INDEXING: dict[Target, Callable[[fx.Node, dict[str, Any]], dict[str, Any]]] = {
    aten.slice.Tensor: _slice, aten.select.int: _select, aten.expand.default: _expand,
}  # fmt: skip
