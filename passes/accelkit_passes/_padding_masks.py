"""Which tokens an attention's mask keeps, and what else in a graph is 0 for the others.

    attention(q, k, v, reshape(m, [batch, 1, 1, length]))    ->   m [batch, length]: keys where it is False are padding
    x * unsqueeze(m.to(dtype), 2)                            ->   0 at padding, whatever x holds there

Two nodes that compute the same from the same are one value here: each layer of a model may bring its own view of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.graph import val
from accelkit_passes._fusion import RESHAPES, bound, require
from accelkit_passes._proofs import proved, same_sizes
from accelkit_passes._token_rules import Tokens, call_on_rows, is_linear

aten = torch.ops.aten
ATTENTION = ops.attention.OPERATOR.overload

_VIEWS = (*RESHAPES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
_NOT = (aten.logical_not.default, aten.bitwise_not.default)


class Values:
    """Which nodes of a graph compute the same value from the same inputs."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._first: dict[fx.Node, fx.Node] = {}
        known: dict[Any, fx.Node] = {}
        for node in graph.graph.nodes:
            pure = node.op == "call_function" and graphs.is_pure(node)
            key = self._key((node.target, node.args, node.kwargs)) if pure else node
            self._first[node] = known.setdefault(key, node)

    def same(self, node: fx.Node) -> fx.Node:
        """The first node that computes this value."""
        return self._first.get(node, node)

    def _key(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.same(value)
        if isinstance(value, dict):
            return tuple((name, self._key(v)) for name, v in value.items())
        if isinstance(value, (tuple, list)):
            return tuple(map(self._key, value))
        return type(value), value  # 1, 1.0 and True are not the same argument


@dataclass(frozen=True)
class KeyMask:
    """The tokens that attentions attend to.

    Attributes:
        node: boolean, [batch, length] or [batch, 1, 1, length]; True for those that are kept.
        tokens: batch and length.
    """

    node: fx.Node
    tokens: Tokens

    def origins(self, values: Values) -> set[fx.Node]:
        """What the mask is made of that is 0 or False for all tokens that are not kept."""
        found, node = {self.node}, self.node
        while _is_view(node, self.tokens) or _is_truth(node):
            node = values.same(node.args[0])  # type: ignore[arg-type]
            found.add(node)
        return found


def key_mask(attention: fx.Node, values: Values) -> KeyMask:
    """The mask of a self-attention that leaves keys out, the same for every head and query.

    Raises:
        Refused: it has none, or one that says more than which tokens are padding.
    """
    arguments = bound(attention)
    mask = arguments["mask"]
    require(mask is not None, "it has no mask, so that nothing says which tokens are padding")
    value, query, key = (val(arguments[name] if name != "mask" else mask) for name in ("mask", "query", "key"))
    shape = graphs.describe_value(value)
    require(
        value.dtype is torch.bool, f"its mask ({mask.name}, {shape}) is added to the scores: no mask of padding alone"
    )
    by_key = value.dim() == 4 and all(proved(size == 1) for size in value.shape[1:3])
    require(by_key, f"its mask ({mask.name}, {shape}) differs by query or head: no mask of padding alone")
    sizes = (query.shape[0], query.shape[1])
    require(same_sizes(sizes, key.shape[:2]), "it has other numbers of queries than of keys, or they may differ")
    one_a_token = same_sizes((value.shape[0], value.shape[3]), sizes)
    require(
        one_a_token, f"its mask ({mask.name}, {shape}) is not one number for each of {list(query.shape[:2])} tokens"
    )
    kind = arguments["kind"]
    require(kind in ("auto", "triton"), f"it was asked to run as {kind!r}, which takes no packed rows")
    tokens = Tokens(sizes)
    queries, *others = (_projected(arguments[name], tokens, values) for name in ("query", "key", "value"))
    require(bool(queries.intersection(*others)), "its queries, keys and values are not projections of the same tokens")
    return KeyMask(_as_tokens(mask, tokens, values), tokens)


def _projected(node: fx.Node, tokens: Tokens, values: Values) -> set[fx.Node]:
    """What the linear layers nearest to the node project: equal sizes alone do not tell self-attention from cross-attention."""
    found: set[fx.Node] = set()
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        call = call_on_rows(node, tokens)
        operands = [] if call is None else [o for o in call.roles if call.reads_tokens(o)]
        if not operands or is_linear(node):
            found.update(map(values.same, operands or [node]))
            continue
        stack += [operand for operand in operands if operand not in seen]
        seen.update(operands)
    return found


def _as_tokens(mask: fx.Node, tokens: Tokens, values: Values) -> fx.Node:
    """The mask as [batch, length], where it is a view of such a one."""
    node = mask
    while node.target in (*RESHAPES, aten.unsqueeze.default) and isinstance(source := node.args[0], fx.Node):
        node = source
        if val(node).dim() == 2 and tokens.lead(val(node)):
            return values.same(node)
    return values.same(mask)


def leaves_out(attention: fx.Node, node: fx.Node, mask: KeyMask, values: Values) -> bool:
    """Whether the node is keys or values of an attention that leaves out what the mask does (other tokens' queries)."""
    if attention.target is not ATTENTION:
        return False
    arguments = bound(attention)
    other = arguments["mask"]
    if other is None or node is arguments["query"]:
        return False
    shape = val(other).shape
    by_key = len(shape) == 4 and all(proved(size == 1) for size in shape[1:3])
    same = by_key and same_sizes((shape[0], shape[3]), mask.tokens.sizes)
    return same and _as_tokens(other, mask.tokens, values) is mask.node


def hides_padding(node: fx.Node, read: fx.Node, mask: KeyMask, values: Values) -> bool:
    """Whether the operator's result is the same whatever its operand `read` holds at padding: it is multiplied by 0 or filled."""
    arguments = bound(node)
    if node.target is aten.mul.Tensor:
        return any(_is_zero(arguments[name], node, mask, values) for name in ("self", "other"))
    if node.target in (aten.where.self, aten.where.ScalarOther):
        return arguments["other"] is not read and _is_zero(arguments["condition"], node, mask, values)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        filled = arguments["mask"]
        return _beside(filled, node, mask.tokens) and _is_inverse(filled, mask, values)
    return False


def _is_zero(operand: Any, node: fx.Node, mask: KeyMask, values: Values) -> bool:
    """Whether the operand is 0 or False for every token that is not kept."""
    return isinstance(operand, fx.Node) and _beside(operand, node, mask.tokens) and _comes_from(operand, mask, values)


def _comes_from(node: fx.Node, mask: KeyMask, values: Values) -> bool:
    origins = mask.origins(values)
    while values.same(node) not in origins:
        if not (_is_view(node, mask.tokens) or _is_truth(node) or node.target is aten.to.dtype):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


def _is_inverse(node: fx.Node, mask: KeyMask, values: Values) -> bool:
    while _is_view(node, mask.tokens):
        node = node.args[0]  # type: ignore[assignment]
    inverts = node.target in _NOT and val(node.args[0]).dtype is torch.bool  # type: ignore[arg-type]
    return bool(inverts) and _comes_from(node.args[0], mask, values)  # type: ignore[arg-type]


def _is_view(node: fx.Node, tokens: Tokens) -> bool:
    """Whether the node has its operand's elements in their order, or repeats each token's."""
    if node.target is aten.expand.default:
        source = val(node.args[0])  # type: ignore[arg-type]
        return bool(source.dim() == val(node).dim() and tokens.lead(source))
    return node.target in _VIEWS


def _is_truth(node: fx.Node) -> bool:
    """Whether the node says where its operand is not 0."""
    if node.target is aten.to.dtype:
        return bool(val(node).dtype is torch.bool)
    return bool(node.target is aten.ne.Scalar and node.args[1] == 0)


def _beside(operand: fx.Node, node: fx.Node, tokens: Tokens) -> bool:
    """Whether the operand's dimensions are the tokens' in the result's place."""
    return bool(val(operand).dim() == val(node).dim() and tokens.lead(val(operand)))
