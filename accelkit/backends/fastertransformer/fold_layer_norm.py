"""linear -> residual_layer_norm -> linear   ->   folded_linear -> row_moments -> folded_linear

    1. what a residual_layer_norm adds up comes out of the epilogue of the linear layer before it, with its rows' statistics
    2. linear layers that read the normalised rows multiply the sum itself, with folded weights, and normalise in their epilogue
    3. a later residual that is the normalised rows (post-norm models) is normalised in the epilogue that adds it; the last
       norm of such a chain, whose rows the model returns, is a layer norm of its own

so that no kernel reads or writes activations for a layer norm's sake. It pays where rows are many; `prepare` measures. The
norm's weight is folded in float32 and rounded once more to the weights' dtype.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops import OPERATORS
from accelkit.ops.row_moments import GROUP

_LINEAR = OPERATORS["linear_activation"].overload
_NORM = OPERATORS["residual_layer_norm"].overload
_FOLDED = OPERATORS["folded_linear"].overload
_MOMENTS = OPERATORS["row_moments"].overload


@dataclass
class _Norm:
    """A residual_layer_norm that folds away."""

    node: fx.Node
    linear: fx.Node  # gives its x
    bound: dict[str, Any]
    normalised: list[fx.Node]  # getitem(node, 0)
    sums: list[fx.Node]  # getitem(node, 1)
    folds: bool = False  # nobody needs the normalised rows
    total: fx.Node | None = field(default=None)  # once rewritten: the sum, and its rows' moments
    moments: fx.Node | None = field(default=None)


def fold_layer_norms(graph: fx.GraphModule) -> int:
    """Fold what can be folded, in place; returns how many layer norms."""
    candidates = {node: norm for node in graph.graph.nodes if (norm := _foldable(graph, node)) is not None}
    for norm in candidates.values():
        uses = [(use, user) for use in norm.normalised for user in use.users]
        norm.folds = bool(uses) and all(_absorbs(user, use, candidates) for use, user in uses)
    folded_rows = {use: norm for norm in candidates.values() if norm.folds for use in norm.normalised}
    # One that does not fold, but whose residual does, adds it in the epilogue and is a layer norm of its own after that.
    found = {n: norm for n, norm in candidates.items() if norm.folds or norm.bound["residual"] in folded_rows}
    before_norms = {norm.linear for norm in found.values()}
    for node in list(graph.graph.nodes):
        # A linear layer before a norm is rewritten where the norm stands: by then its residual has been.
        after = found.get(node)
        linear = node if after is None else after.linear
        rows: Any = linear.args[0] if linear.target is _LINEAR else None
        if after is not None or (rows in folded_rows and node not in before_norms):
            _rewrite(graph, linear, folded_rows.get(rows), after, folded_rows)
    dead = {use for norm in found.values() for use in (*norm.normalised, *norm.sums, norm.node, norm.linear)}
    for node in reversed(graph.graph.nodes):
        if node in dead:
            graph.graph.erase_node(node)
    return sum(norm.folds for norm in found.values())


def _foldable(graph: fx.GraphModule, node: fx.Node) -> _Norm | None:
    if node.target is not _NORM:
        return None
    bound = graphs.bound_arguments(node) or {}
    linear, weights = bound["x"], (bound["weight"], bound["bias"])
    if (
        not isinstance(linear, fx.Node)
        or linear.target is not _LINEAR
        or len(linear.users) != 1
        or bound["residual"] is linear
        or bound["rows"] is not None
    ):
        return None
    inner = graphs.bound_arguments(linear) or {}
    if inner["activation"] != "none" or inner["residual"] is not None or inner["rows"] is not None:
        return None
    if any(not isinstance(w, fx.Node) or w.op != "get_attr" for w in weights):
        return None
    if graphs.val(linear).shape[-1] % GROUP or graphs.val(bound["residual"]).dtype is not graphs.val(linear).dtype:
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    normalised, sums = ([u for u in node.users if u.args[1] == position] for position in (0, 1))
    return _Norm(node, linear, bound, normalised, sums)


def _absorbs(user: fx.Node, use: fx.Node, norms: dict[fx.Node, _Norm]) -> bool:
    """Whether a reader of normalised rows can take the sum and its moments instead."""
    if user.target is _LINEAR:
        bound = graphs.bound_arguments(user) or {}
        readers = [name for name, value in bound.items() if value is use]
        return (
            readers == ["x"] and bound["weight"].op == "get_attr" and bound["rows"] is None and _constant(bound["bias"])
        )
    if user.target is _NORM and user in norms:
        return norms[user].bound["residual"] is use and norms[user].bound["x"] is not use
    return False


def _constant(node: Any) -> bool:
    return node is None or (isinstance(node, fx.Node) and node.op == "get_attr")


def _rewrite(
    graph: fx.GraphModule, linear: fx.Node, before: _Norm | None, after: _Norm | None, by_rows: dict[fx.Node, _Norm]
) -> None:
    bound = graphs.bound_arguments(linear) or {}
    where = linear if after is None else after.node  # the residual may be computed after the linear layer
    options: dict[str, Any] = {"statistics": after is not None and after.folds}
    x, weight, bias = bound["x"], bound["weight"], bound["bias"]
    with graph.graph.inserting_before(where):
        if before is not None:
            x, options["moments"] = before.total, before.moments
            weight, bias, options["column_sums"] = _folded_weights(graph, before, weight, bias)
        # read afresh: an earlier rewrite may have put its sum there
        options["residual"] = (
            bound["residual"] if after is None else (graphs.bound_arguments(after.node) or {})["residual"]
        )
        if (source := by_rows.get(options["residual"])) is not None:
            options |= {
                "residual": source.total,
                "residual_moments": source.moments,
                "residual_weight": source.bound["weight"],
                "residual_bias": source.bound["bias"],
            }
        options = {name: value for name, value in options.items() if value is not None}
        both = _call(graph, _FOLDED, (x, weight, bias, bound["activation"]), options)
        result = _call(graph, operator.getitem, (both, 0))
        if after is None:
            linear.replace_all_uses_with(result)
            graph.graph.erase_node(linear)
            return
        after.total = result
        weights = (after.bound["weight"], after.bound["bias"], after.bound["eps"])
        if after.folds:
            after.moments = _call(graph, _MOMENTS, (_call(graph, operator.getitem, (both, 1)), weights[2]))
        else:
            normalised = _call(
                graph, torch.ops.aten.layer_norm.default, (result, [graphs.val(result).shape[-1]], *weights)
            )
            for use in after.normalised:
                use.replace_all_uses_with(normalised)
    for use in after.sums:
        use.replace_all_uses_with(result)


def _folded_weights(
    graph: fx.GraphModule, norm: _Norm, weight: fx.Node, bias: fx.Node | None
) -> tuple[fx.Node, fx.Node, fx.Node]:
    with torch.no_grad():
        scale, shift, w = (
            graphs.attribute(graph, str(n.target)).float() for n in (norm.bound["weight"], norm.bound["bias"], weight)
        )
        folded = (w * scale).to(graphs.val(weight).dtype)
        offset = w @ shift
        if bias is not None:
            offset += graphs.attribute(graph, str(bias.target)).float()
        sums = folded.float().sum(1)  # of what is multiplied: the mean has to cancel
    return tuple(
        _attribute(graph, f"{weight.name}_{name}", value)
        for name, value in (("folded", folded), ("offset", offset), ("sums", sums))
    )  # type: ignore[return-value]


def _attribute(graph: fx.GraphModule, hint: str, value: torch.Tensor) -> fx.Node:
    node = graph.graph.get_attr(graphs.set_attribute(graph, hint, value))
    mode = _mode(graph)
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    return node


def _call(graph: fx.GraphModule, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    node = graph.graph.call_function(target, args, kwargs or {})
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), graphs.val)
    node.meta["val"] = graphs.inferred(target, args, kwargs, _mode(graph))
    return node


def _mode(graph: fx.GraphModule) -> Any:
    return next(v.fake_mode for n in graph.graph.nodes if isinstance(v := graphs.val(n), torch._subclasses.FakeTensor))
