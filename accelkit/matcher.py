"""Finds a RewritePass's pattern in a graph and puts the replacement there. The only file that knows how matching is done.

    every node, in order: does the pattern's first result fit here?  ->  check  ->  replacement recorded, old nodes left to die

Torch's own `replace_pattern_with_filters` promises no stability, drops partial matches without a word, and leaves literals
to callbacks; a pattern here is a tree of operators below one result, matched on schema-normalised arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from accelkit.graph import bound_arguments, is_pure
from accelkit.pass_api import Match, PassResult, Refused, RewritePass


@dataclass(frozen=True)
class _Pattern:
    results: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]  # operators, in order
    parameters: tuple[str, ...]


def _trace(function: Callable[..., Any]) -> _Pattern:
    graph = fx.Graph()
    parameters = tuple(inspect.signature(function).parameters)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    returned = function(*(fx.Proxy(graph.placeholder(name), tracer) for name in parameters))
    results = tuple(proxy.node for proxy in (returned if isinstance(returned, (tuple, list)) else (returned,)))
    nodes = tuple(node for node in graph.nodes if node.op != "placeholder")
    missing = set(nodes) - _ancestors(results[0])
    if missing:
        raise ValueError(
            f"pattern {function.__qualname__}: the first result must depend on all nodes, not so on {missing}"
        )
    return _Pattern(results, nodes, parameters)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def _fits(wanted: Any, given: Any, bindings: dict[fx.Node, Any]) -> bool:
    if isinstance(wanted, fx.Node):
        if wanted in bindings:
            return _same(bindings[wanted], given)
        if wanted.op == "placeholder":
            bindings[wanted] = given
            return True
        return isinstance(given, fx.Node) and _node_fits(wanted, given, bindings)
    if isinstance(wanted, (tuple, list)):
        if not isinstance(given, (tuple, list)) or len(wanted) != len(given):
            return False
        return all(_fits(w, g, bindings) for w, g in zip(wanted, given, strict=True))
    return _same(wanted, given)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        return left is right
    if isinstance(left, bool) != isinstance(right, bool):  # True == 1 in Python, but not in a schema
        return False
    return bool(left == right)


def _node_fits(wanted: fx.Node, given: fx.Node, bindings: dict[fx.Node, Any]) -> bool:
    if wanted.op != given.op or wanted.target != given.target:
        return False
    ours, theirs = _arguments(wanted), _arguments(given)
    if ours.keys() != theirs.keys():
        return False
    trial = dict(bindings)
    if not all(_fits(ours[name], theirs[name], trial) for name in ours):
        return False
    bindings.update(trial)
    bindings[wanted] = given
    return True


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = bound_arguments(node)
    if bound is not None:
        return bound
    return {str(position): value for position, value in enumerate(node.args)}  # operator.getitem and the like


def _match(pattern: _Pattern, root: fx.Node, graph: fx.GraphModule) -> Match | None:
    bindings: dict[fx.Node, Any] = {}
    if not _node_fits(pattern.results[0], root, bindings):
        return None
    arguments = {node.target: value for node, value in bindings.items() if node.op == "placeholder"}
    return Match(
        graph,
        {name: arguments.get(name) for name in pattern.parameters},
        tuple(bindings[node] for node in pattern.nodes),
        tuple(bindings[node] for node in pattern.results),
    )


def _require_contained(match: Match) -> None:
    inside = set(match.nodes)
    for node in match.nodes:
        match.require(is_pure(node), f"{node.name} has a side effect or is random")
        outside = [user.name for user in node.users if user not in inside]
        if node not in match.results:
            match.require(not outside, f"{node.name} is also used by {', '.join(outside)}")


def _uncovered_first_use(match: Match) -> None:
    # The new nodes stand where the first result stood; another result's users must all come after that.
    order = {node: index for index, node in enumerate(match.graph.graph.nodes)}
    inside = set(match.nodes)
    for result in match.results[1:]:
        early = [u.name for u in result.users if u not in inside and order[u] < order[match.root]]
        match.require(not early, f"{result.name} is used by {', '.join(early)} before {match.root.name} is computed")


def rewrite(rewriting: RewritePass, graph: fx.GraphModule) -> PassResult:
    """Apply a RewritePass everywhere it fits, from the first node to the last."""
    outcome = PassResult()
    patterns = [_trace(p) for p in rewriting.patterns()]
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        for pattern in patterns:
            match = _match(pattern, node, graph)
            if match is None:
                continue
            try:
                _require_contained(match)
                _uncovered_first_use(match)
                rewriting.check(match)
            except Refused as refusal:
                outcome.refused(node, str(refusal))
                continue
            _replace(rewriting, match)
            outcome.rewrote(node)
            break
    return outcome


def _replace(rewriting: RewritePass, match: Match) -> None:
    graph = match.graph.graph
    tracer = fx.proxy.GraphAppendingTracer(graph)
    arguments = [_proxied(value, tracer) for value in match.arguments.values()]
    last = match.root
    with graph.inserting_before(last):
        returned = rewriting.replacement(*arguments)
    results = returned if isinstance(returned, (tuple, list)) else (returned,)
    if len(results) != len(match.results):
        raise ValueError(
            f"{rewriting.name}: the pattern has {len(match.results)} results, the replacement {len(results)}"
        )
    for old, new in zip(match.results, results, strict=True):
        _use_instead(old, new.node if isinstance(new, fx.Proxy) else new)
    for old in reversed(match.nodes):
        if not old.users:
            graph.erase_node(old)


def _use_instead(old: fx.Node, new: fx.Node) -> None:
    # the replacement itself may read the old result
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _proxied(value: Any, tracer: fx.proxy.GraphAppendingTracer) -> Any:
    if isinstance(value, fx.Node):
        return fx.Proxy(value, tracer)
    if isinstance(value, (tuple, list)):
        return type(value)(_proxied(v, tracer) for v in value)
    return value
