"""Operators that provably do nothing go.

    1. to(x, x's own dtype), contiguous, detach, alias, lift_fresh  ->  x   they return x itself
    2. clone(x), _to_copy(x), cat([x]), repeat(x, [1, 1]), pad(x, [0, 0])  ->  x   copies
    3. reshape, permute, expand, slice, squeeze, split with one piece    ->  x   where the shape and the order stay
    4. reshape(reshape(x, a), b)  ->  reshape(x, b)        permute(permute(x, a), b)  ->  x where they cancel
    5. x * 1, x / 1, x ** 1, x - 0; x + 0 of integers    ->  x   where dtype and shape stay
    6. to(to(x, wider dtype), x's own dtype)             ->  x   every value survives the way there and back

Bit for bit the same, so x + 0 of floats stays: it turns -0.0 into 0.0. RemoveNoOps(ignore_negative_zero=True) removes
it too. x + -0.0 and x - 0 change nothing, nor does any of these change a NaN into a number.

A copy is not nothing where somebody could tell: when an output would become an input's, a weight's or another output's
memory, or when x is written to before the copy is read. Whether x is contiguous must not depend on how the caller lays
out an input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.graph import bound_arguments, val
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._proofs import contiguous, fixed_layouts, same_sizes, same_strides, sharing_problem

aten = torch.ops.aten


@dataclass(frozen=True)
class RemoveNoOps(GraphPass):
    """Remove operators that provably do nothing.

    Attributes:
        ignore_negative_zero: remove x + 0 of floating-point tensors too, so that -0.0 stays -0.0 instead of becoming
        0.0.
    """

    ignore_negative_zero: bool = False

    def run(self, graph: fx.GraphModule) -> PassResult:
        result, fixed = PassResult(), fixed_layouts(graph)
        for node in list(graph.graph.nodes):
            rule = _RULES.get(node.target) if node.op == "call_function" and node.users else None
            if rule is None:
                continue
            try:
                source = rule(_Place(graph, node, fixed, self.ignore_negative_zero))
            except Refused as refusal:
                result.refused(node, str(refusal))
                continue
            if source is None:
                continue
            if source is not node:  # else it was shortened in place
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
            result.rewrote(node)
        return result


@dataclass(frozen=True)
class _Place:
    """A node that may do nothing. A rule returns the node to read instead, None where it does something, or refuses."""

    graph: fx.GraphModule
    node: fx.Node
    fixed: set[fx.Node]
    ignore_negative_zero: bool

    @property
    def arguments(self) -> dict[str, Any]:
        return bound_arguments(self.node) or {}

    @property
    def source(self) -> fx.Node:
        return self.node.all_input_nodes[0]

    def copy(self, source: fx.Node) -> fx.Node:
        """For a node that returns a copy of `source`."""
        if not same_strides(val(self.node), val(source)):
            raise Refused(f"it lays out {source.name} anew")
        # without the copy, a view of it must fit however the caller lays out the input
        views = [user.name for user in self.node.users if user.target in _NEED_LAYOUT]
        if views and source not in self.fixed:
            raise Refused(f"{views[0]} needs a layout, and that of {source.name} is the caller's")
        if problem := sharing_problem(self.graph, self.node, source):
            raise Refused(problem)
        return source


_NEED_LAYOUT = frozenset({
    aten.view.default, aten.view.dtype, aten.view_as_complex.default, aten.as_strided.default, aten.sym_stride.int,
})  # fmt: skip


def _unchanged(place: _Place, source: fx.Node) -> bool:
    old, new = val(source), val(place.node)
    return (
        isinstance(old, torch.Tensor)
        and (old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout)
        and same_sizes(old.shape, new.shape)
    )


# --- cases 1, 2 and 6: identities, casts, copies


def _same(place: _Place) -> fx.Node | None:
    return place.source


def _copied(place: _Place) -> fx.Node | None:
    return place.copy(place.source) if _unchanged(place, place.source) else None


def _cast(place: _Place) -> fx.Node | None:
    source, arguments = place.source, place.arguments
    if arguments.get("memory_format") not in (None, torch.preserve_format):
        return None
    if _unchanged(place, source):
        copies = arguments.get("copy") or place.node.target is aten._to_copy.default
        return place.copy(source) if copies else source
    return _there_and_back(place, source)


def _there_and_back(place: _Place, cast: fx.Node) -> fx.Node | None:
    if cast.target is not aten.to.dtype or place.node.target is not aten.to.dtype:
        return None
    source = cast.args[0]
    assert isinstance(source, fx.Node)
    if not _unchanged(place, source):
        return None
    if val(cast).dtype not in _WIDER.get(val(source).dtype, ()):
        raise Refused(f"{val(cast).dtype} does not hold every {val(source).dtype}")
    return place.copy(source)


_FLOATS, _INTEGERS = (torch.float32, torch.float64), (torch.int16, torch.int32, torch.int64)
_WIDER: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float16: _FLOATS, torch.bfloat16: _FLOATS, torch.float32: (torch.float64,), torch.int8: _INTEGERS,
    torch.uint8: _INTEGERS, torch.int16: _INTEGERS[1:], torch.int32: _INTEGERS[2:],
    torch.bool: (*_FLOATS, *_INTEGERS, torch.float16, torch.bfloat16, torch.int8, torch.uint8),
}  # fmt: skip


def _contiguous(place: _Place) -> fx.Node | None:
    source = place.source
    wanted = place.node.kwargs.get("memory_format", torch.contiguous_format)
    if wanted is not torch.contiguous_format or not contiguous(val(source)):
        return None
    if source not in place.fixed:
        raise Refused(f"the layout of {source.name} is the caller's")
    return source


def _repeat(place: _Place) -> fx.Node | None:
    # the shape alone proves nothing: an empty tensor repeated is as empty
    source = place.source
    repeats = next(v for k, v in place.arguments.items() if k in ("repeats", "dims"))
    return place.copy(source) if _unchanged(place, source) and all(r == 1 for r in repeats) else None


def _cat(place: _Place) -> fx.Node | None:
    tensors = place.arguments["tensors"]
    return place.copy(tensors[0]) if len(tensors) == 1 else None


def _pad(place: _Place) -> fx.Node | None:
    source, pad = place.source, place.arguments["pad"]
    return place.copy(source) if all(type(p) is int and p == 0 for p in pad) else None


# --- cases 3 and 4: views


def _shape_view(place: _Place) -> fx.Node | None:
    return place.source if _unchanged(place, place.source) else None


def _slice(place: _Place) -> fx.Node | None:
    source, start = place.source, place.arguments["start"]
    whole = start in (None, 0) and place.arguments["step"] == 1
    return source if whole and _unchanged(place, source) else None


def _reshape(place: _Place) -> fx.Node | None:
    inner = place.source
    if _unchanged(place, inner):
        return inner
    if inner.target is not place.node.target:
        return None
    source = inner.all_input_nodes[0]
    # view never copies; reshape does where the layout does not fit, so that one and two of them may differ
    if place.node.target is aten.reshape.default and not (contiguous(val(source)) and source in place.fixed):
        raise Refused(f"{source.name} is not provably contiguous, so that {inner.name} may be a copy")
    if _unchanged(place, source):
        return source
    place.node.update_arg(0, source)
    return place.node


def _permute(place: _Place) -> fx.Node | None:
    inner, dims = place.node.args[0], place.arguments["dims"]
    assert isinstance(inner, fx.Node)
    dims = [d % len(dims) for d in dims]
    if dims == list(range(len(dims))):
        return inner
    if inner.target is not aten.permute.default:
        return None
    source, first = inner.args[0], (bound_arguments(inner) or {})["dims"]
    assert isinstance(source, fx.Node)
    # Two that do not cancel stay two: nobody computes anything for either, and Inductor's attention patterns ignore a
    # permutation's dimensions, so that a composed one is taken for the plain transpose of the keys (torch 2.11, 2.13).
    return source if [first[d] % len(dims) for d in dims] == list(range(len(dims))) else None


def _piece(place: _Place) -> fx.Node | None:
    pieces = place.node.args[0]
    if not isinstance(pieces, fx.Node) or pieces.target not in _SPLITS:
        return None
    source = pieces.all_input_nodes[0]
    return source if len(val(pieces)) == 1 and _unchanged(place, source) else None


_SPLITS = frozenset({
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.tensor_split.sections,
})  # fmt: skip


# --- case 5: arithmetic with a number


def _arithmetic(place: _Place) -> fx.Node | None:
    source: Any = place.node.args[0]
    number: Any = place.node.args[1]
    if not isinstance(source, fx.Node) or isinstance(number, fx.Node) or number != _NEUTRAL[place.node.target]:
        return None
    old, new = val(source), val(place.node)
    if old.dtype != new.dtype:
        raise Refused(f"it turns {old.dtype} into {new.dtype}")
    if old.is_complex():
        raise Refused("complex arithmetic with a number turns an infinite part into NaN")
    if place.node.target in (aten.add.Tensor, aten.sub.Tensor) and not old.dtype.is_floating_point:
        return place.copy(source)
    alpha: Any = place.arguments.get("alpha", 1)
    if not math.isfinite(alpha):
        raise Refused(f"{alpha} times 0 is NaN")
    added = number * alpha if place.node.target is aten.add.Tensor else -(float(number) * alpha)
    zero = place.node.target in (aten.add.Tensor, aten.sub.Tensor) and math.copysign(1.0, added) > 0
    if zero and not place.ignore_negative_zero:
        raise Refused("it turns -0.0 into 0.0; RemoveNoOps(ignore_negative_zero=True) removes it all the same")
    return place.copy(source)


_NEUTRAL: dict[Any, int] = {
    aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.pow.Tensor_Scalar: 1,
}  # fmt: skip

_RULES: dict[Any, Callable[[_Place], fx.Node | None]] = {
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.positive.default), _same),
    **dict.fromkeys((aten.clone.default, aten.lift_fresh_copy.default, aten.lift.default), _copied),
    **dict.fromkeys(
        (
            aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default,
            aten._to_copy.default,
        ),
        _cast,
    ),
    **dict.fromkeys((aten.repeat.default, aten.tile.default), _repeat),
    **dict.fromkeys((aten.cat.default, aten.concat.default), _cat),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _pad),
    **dict.fromkeys((aten.reshape.default, aten.view.default), _reshape),
    **dict.fromkeys(
        (
            aten.expand.default, aten.expand_as.default, aten.view_as.default, aten.reshape_as.default,
            aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
            aten.broadcast_to.default,
        ),
        _shape_view,
    ),
    **dict.fromkeys(_NEUTRAL, _arithmetic),
    aten.contiguous.default: _contiguous,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    operator.getitem: _piece,
}  # fmt: skip
