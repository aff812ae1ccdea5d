"""Operators that work on each token alone, and the same call on rows that are packed.

    linear(x [batch, length, width], w, b)       ->   linear_activation(x [rows, width], w, b, counted rows)
    reshape(x, [batch, length, heads, width])    ->   reshape(x, [-1, heads, width])
    slice(x, dim=2, ...), layer_norm, add, ...   ->   the same, a dimension earlier

`call_on_rows` reads a node under the premise that its leading dimensions are those of `Tokens`, and says which operands have
them too. What it does not know, or what mixes tokens, is None.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.graph import val
from accelkit_passes._fusion import RESHAPES, bound
from accelkit_passes._proofs import proved, same_sizes

aten = torch.ops.aten
LINEAR = ops.linear_activation.OPERATOR.overload


class Given(enum.Enum):
    """What a packed call takes that the unpacked one does not have."""

    ROWS = "rows"
    OFFSETS = "offsets"
    LONGEST = "longest"


class Role(enum.Enum):
    """How an operand lies beside the tokens.

    Attributes:
        TOKENS: it has their dimensions: packed.
        BROADCAST: it is the same for every sequence, or for every token of one: expanded, then packed.
        LEADING_ONES: it is the same for all, but has dimensions of size 1 in their place: squeezed.
    """

    TOKENS = "tokens"
    BROADCAST = "broadcast"
    LEADING_ONES = "leading ones"


@dataclass(frozen=True)
class Tokens:
    """The leading dimensions: [batch, length], or those of what was picked out of them.

    Attributes:
        sizes: the dimensions' sizes, symbolic ones too.
    """

    sizes: tuple[Any, ...]

    @property
    def count(self) -> int:
        return len(self.sizes)

    def lead(self, value: Any) -> bool:
        """Whether the tensor (each of the tensors) begins with these dimensions, for every size."""
        if isinstance(value, (tuple, list)):
            return bool(value) and all(map(self.lead, value))
        return isinstance(value, torch.Tensor) and same_sizes(value.shape[: self.count], self.sizes)


@dataclass(frozen=True)
class Call:
    """A call on packed rows.

    Attributes:
        target, args, kwargs: as to be called, with the unpacked operands.
        roles: how each operand that has to be changed lies; the others are taken as they are.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    roles: dict[fx.Node, Role] = field(default_factory=dict)

    def reads_tokens(self, node: fx.Node) -> bool:
        """Whether the node is an operand whose rows are read each for itself."""
        return self.roles.get(node) is Role.TOKENS


Rule = Callable[[fx.Node, dict[str, Any], Tokens], "Call | None"]


def call_on_rows(node: fx.Node, tokens: Tokens) -> Call | None:
    """The call on packed rows, given that the node's result begins with the tokens' dimensions; None where there is none."""
    if node.op != "call_function" or not tokens.lead(val(node)) or graphs.is_mutating(node) or graphs.is_random(node):
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        known = isinstance(source, fx.Node) and tokens.lead(val(source))
        return Call(node.target, node.args, roles={source: Role.TOKENS}) if known else None  # type: ignore[dict-item]
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    rule = _RULES.get(target)
    if rule is None and torch.Tag.pointwise in target.tags:
        rule = _elementwise
    return None if rule is None else rule(node, bound(node), tokens)


def is_worth_packing(node: fx.Node) -> bool:
    """Whether it costs more than the copy that packs its operand; views and elementwise operators do not."""
    return node.target in _COSTLY


def is_linear(node: fx.Node) -> bool:
    """Whether the node is a linear layer."""
    return node.target in (aten.linear.default, LINEAR)


def _elementwise(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
    if not isinstance(val(node), torch.Tensor) or arguments.get("memory_format") in _FOR_IMAGES:
        return None
    roles = {}
    for operand in node.all_input_nodes:
        value = val(operand)
        if isinstance(value, torch.Tensor) and (role := _role(value, val(node).dim(), tokens)) is not None:
            roles[operand] = role
    return Call(node.target, node.args, dict(node.kwargs), roles)


def _role(value: torch.Tensor, dims: int, tokens: Tokens) -> Role | None:
    """How an operand lies that is broadcast to `dims` dimensions; None where it has none in the tokens' place."""
    own = value.shape[: max(0, tokens.count - (dims - value.dim()))]
    if same_sizes(own, tokens.sizes):
        return Role.TOKENS
    if all(proved(size == 1) for size in own):
        return Role.LEADING_ONES if own else None
    return Role.BROADCAST


def _linear(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
    x, residual = (arguments.get(name) for name in ("input" if "input" in arguments else "x", "residual"))
    if not _all_lead((x, residual), node, tokens) or arguments.get("rows") is not None:
        return None
    if val(node).dim() != tokens.count + 1:  # rows are counted in [rows, width] alone
        return Call(node.target, node.args, dict(node.kwargs), _tokens(x, residual))
    args = (x, arguments["weight"], arguments["bias"], arguments.get("activation", "none"), residual, Given.ROWS)
    return Call(LINEAR, args, roles=_tokens(x, residual))


def _residual_norm(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
    x, residual = arguments["x"], arguments["residual"]
    if not _all_lead((x, residual), node, tokens) or arguments["rows"] is not None:
        return None
    if val(x).dim() != tokens.count + 1:
        return Call(node.target, node.args, dict(node.kwargs), _tokens(x, residual))
    *others, _ = arguments.values()
    return Call(node.target, (*others, Given.ROWS), roles=_tokens(x, residual))


def _norm(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
    x = arguments["input"]
    if len(arguments["normalized_shape"]) > val(node).dim() - tokens.count:
        return None
    return Call(node.target, node.args, dict(node.kwargs), _tokens(x)) if tokens.lead(val(x)) else None


def _same_order(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
    """A reshape that leaves the leading dimensions alone: each token keeps its elements."""
    x = next(iter(arguments.values()))
    rest = list(val(node).shape[tokens.count :])
    if not tokens.lead(val(x)) or not all(isinstance(size, int) and size > 0 for size in rest):
        return None
    return Call(aten.reshape.default, (x, [-1, *rest]), roles=_tokens(x))


def _permute(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
    x = arguments["self"]
    order = [dim % val(x).dim() for dim in arguments["dims"]]
    if not tokens.lead(val(x)) or order[: tokens.count] != list(range(tokens.count)):
        return None
    moved = [0, *(dim - tokens.count + 1 for dim in order[tokens.count :])]
    return Call(node.target, (x, moved), roles=_tokens(x))


def _along(name: str = "dim") -> Rule:
    """Works along the dimension (or dimensions) that this argument names, which has to be none of the tokens'."""

    def rule(node: fx.Node, arguments: dict[str, Any], tokens: Tokens) -> Call | None:
        x, dims = next(iter(arguments.values())), arguments[name]
        operands = x if isinstance(x, (list, tuple)) else (x,)
        if not all(isinstance(o, fx.Node) and tokens.lead(val(o)) for o in operands):
            return None
        rank = val(operands[0]).dim()
        listed = dims if isinstance(dims, (list, tuple)) else (dims,)
        if not listed or any(not isinstance(d, int) or d % rank < tokens.count for d in listed):
            return None
        moved = [dim % rank - tokens.count + 1 for dim in listed]
        args, kwargs = _changed(node, name, moved if isinstance(dims, (list, tuple)) else moved[0])
        return Call(node.target, args, kwargs, _tokens(*operands))

    return rule


def _changed(node: fx.Node, name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with another value for one of them."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if place < len(node.args):
        return (*node.args[:place], value, *node.args[place + 1 :]), dict(node.kwargs)
    return node.args, {**node.kwargs, name: value}


def _all_lead(operands: Sequence[Any], node: fx.Node, tokens: Tokens) -> bool:
    """Whether the operands, where there are any, have the tokens' dimensions and as many as the result."""
    value = val(node)
    dims = (value[0] if isinstance(value, (tuple, list)) else value).dim()
    return all(o is None or (tokens.lead(val(o)) and val(o).dim() == dims) for o in operands) and dims > tokens.count


def _tokens(*operands: fx.Node | None) -> dict[fx.Node, Role]:
    return {operand: Role.TOKENS for operand in operands if operand is not None}


_FOR_IMAGES = (torch.channels_last, torch.channels_last_3d)
_RESIDUAL_NORMS = (ops.residual_layer_norm.OPERATOR.overload, ops.residual_rms_norm.OPERATOR.overload)
_COSTLY = frozenset({
    aten.linear.default, LINEAR, aten.layer_norm.default, aten.rms_norm.default, *_RESIDUAL_NORMS,
    ops.attention.OPERATOR.overload, operator.getitem,  # with what it takes apart
})  # fmt: skip
_RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    LINEAR: _linear,
    **dict.fromkeys(_RESIDUAL_NORMS, _residual_norm),
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    **dict.fromkeys((*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.unflatten.int), _same_order),
    aten.permute.default: _permute,
    **dict.fromkeys((aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.dropout.default), _elementwise),
    **dict.fromkeys(
        (
            aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
            aten.unbind.int, aten.softmax.int, aten.log_softmax.int, aten.mean.dim, aten.sum.dim_IntList, aten.cat.default,
        ),
        _along(),
    ),
}  # fmt: skip
