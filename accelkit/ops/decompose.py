"""accelkit.attention(q, k, v)  ->  permute, scaled_dot_product_attention, permute: a fused operator's meaning back in ATen

For backends that do not know the operator. The meaning is traced on the node's own fake tensors at the level at which
torch.export captures: `linear`, `gelu`, `layer_norm` and `scaled_dot_product_attention` stay whole, sizes stay symbolic,
and no shape guard is added.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.ops.operator import operator_of
from accelkit.pass_api import Refusal
from accelkit.pass_runner import PassRecord, count_operators, fake_mode_of

aten = torch.ops.aten

_WHOLE = {
    "variable_length_attention": "where its sequences begin is known at run time only, so that it has no form of plain "
    "operators; a target that knows the operator, or passes without remove_padding, run it",
}
"""Operators without a decomposition, and why."""


@dataclass
class Decomposition:
    """What `decompose` did.

    Attributes:
        replaced: operator name -> names of the nodes that were replaced.
        whole: nodes that call an operator without a decomposition, and why.
    """

    replaced: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    whole: dict[fx.Node, str] = field(default_factory=dict)


def decompose(graph: fx.GraphModule, keep: Collection[str] = ()) -> Decomposition:
    """Replace, in place, the calls of fused operators by their meanings' ATen operators.

    Args:
        graph: an accelkit graph, every node with its fake tensor in `meta["val"]`.
        keep: short names (`attention`) of the operators to leave as they are.
    """
    done = Decomposition()
    for node in list(graph.graph.nodes):
        fused = operator_of(node)
        if fused is None or fused.name in keep:
            continue
        if fused.name in _WHOLE:
            done.whole[node] = _WHOLE[fused.name]
            continue
        traced, given = _traced(fused.meaning, node.args, node.kwargs)
        if (written := next((n for n in traced.nodes if graphs.is_mutating(n)), None)) is not None:
            done.whole[node] = f"its meaning writes to a tensor ({written.target}), so that it cannot be taken apart"
            continue
        done.replaced[fused.name].append(node.name)
        _replace(node, _insert(node, traced, given))
    if done.replaced:
        graph.recompile()
    return done


def decomposed_for(
    backend: str, known: Collection[str], graph: fx.GraphModule, ledger: list[PassRecord]
) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """What a backend that knows the fused operators `known` gets for `graph`, and the nodes that must stay in PyTorch, with
    the reason; the graph itself where there is nothing to do, else a copy and a line in the ledger."""
    if all(fused is None or fused.name in known for fused in map(operator_of, graph.graph.nodes)):
        return graph, {}
    started, copied = time.perf_counter(), fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)
    done = decompose(copied, known)
    ledger.append(
        PassRecord(
            f"decompose for {backend}",
            tuple(f"accelkit.{name}: {node}" for name, nodes in done.replaced.items() for node in nodes),
            tuple(Refusal(node.name, why) for node, why in done.whole.items()),
            count_operators(graph), count_operators(copied), time.perf_counter() - started,
        )
    )  # fmt: skip
    return copied, done.whole


def inlined(graph: fx.GraphModule, node: fx.Node, function: Callable[..., Any], arguments: Sequence[Any]) -> fx.Node:
    """Put what `function` computes in the place of `node`, as ATen operators; returns the result's node.

    Args:
        graph: an accelkit graph, every argument with its fake tensor in `meta["val"]` (or inferable: see below).
        function: of tensors and plain values, with one tensor as its result.
        arguments: what it is called with: nodes, or plain values. Nodes that a pass has just made and that were not inferred
            yet are inferred here.
    """
    mode = fake_mode_of(graph)
    for argument in arguments:
        if isinstance(argument, fx.Node):
            _infer_new(graph, argument, mode)
    traced, given = _traced(function, arguments, {}, mode)
    result: fx.Node = _insert(node, traced, given)
    _replace(node, result)
    return result


def _infer_new(graph: fx.GraphModule, node: fx.Node, mode: Any) -> None:
    if graphs.val(node) is not None:
        return
    for source in node.all_input_nodes:
        _infer_new(graph, source, mode)
    if node.op == "get_attr":
        node.meta["val"] = mode.from_tensor(graphs.attribute(graph, str(node.target)), static_shapes=True)
    else:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), graphs.val)
        node.meta["val"] = graphs.inferred(node.target, args, kwargs, mode)


def _traced(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], mode: Any = None
) -> tuple[fx.Graph, list[fx.Node]]:
    """The function as a graph, and the node that stands for each of its placeholders."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.experimental.proxy_tensor import make_fx  # imports sympy

    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)), is_leaf=lambda x: isinstance(x, fx.Node))
    given = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def called(*values: Any) -> Any:
        rest = iter(values)
        args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, fx.Node) else x for x in leaves], spec)
        return function(*args, **kwargs)

    mode = mode or next(v.fake_mode for v in map(graphs.val, given) if isinstance(v, FakeTensor))
    guards = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with mode, torch.no_grad(), enable_python_dispatcher(), guards:
        # a tensor of its own for each argument: two nodes may carry one fake
        fakes = [v.detach() if isinstance(v, torch.Tensor) else v for v in map(graphs.val, given)]
        traced = make_fx(called, pre_dispatch=True)(*fakes).graph
    return traced, given


def _insert(node: fx.Node, traced: fx.Graph, given: list[fx.Node]) -> Any:
    """Copy the meaning in front of `node`; returns its results: a node, or a tuple of them."""
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), given, strict=True))
    traced.eliminate_dead_code()
    (returned,) = traced.output_node().args
    with node.graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "output" or inner in copies:
                continue
            if _is_no_cast(inner):
                copies[inner] = copies[inner.args[0]]
                continue
            copies[inner] = node.graph.node_copy(inner, lambda n: copies[n])
            copies[inner].meta = {k: v for k, v in node.meta.items() if k != "val"} | {"val": graphs.val(inner)}
            _spell_as_permute(copies[inner])
        return fx.node.map_arg(returned, lambda n: _contiguous(copies[n]))


def _is_no_cast(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.target is aten.to.dtype
        and isinstance(source, fx.Node)
        and graphs.val(source).dtype == graphs.val(node).dtype
    )  # fmt: skip


def _spell_as_permute(node: fx.Node) -> None:
    """transpose(x, 1, 2) -> permute(x, [0, 2, 1, 3]): the one form that passes and backends look for."""
    if node.target is not aten.transpose.int:
        return
    source, one, other = node.args
    order = list(range(graphs.val(node).dim()))
    order[one], order[other] = order[other], order[one]  # type: ignore[index]
    node.target, node.args = aten.permute.default, (source, order)


def _contiguous(result: fx.Node) -> fx.Node:
    # The trace drops `.contiguous()` where the fake's layout is contiguous already; which kernel really runs, and how
    # it lays out its result, is decided later, and what follows may be a view that needs the promised layout.
    if not graphs.aliases(result) or result.target is aten.contiguous.default:
        return result
    node = result.graph.call_function(aten.contiguous.default, (result,))
    value = graphs.val(result)
    node.meta = dict(result.meta) | {"val": graphs.inferred(node.target, (value,), {}, value.fake_mode)}
    return node


def _replace(node: fx.Node, results: Any) -> None:
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"{user.name} reads all results of {node.name} at once")
            user.replace_all_uses_with(results[user.args[1]])
            node.graph.erase_node(user)
    graph, unused = node.graph, list(results) if isinstance(results, (tuple, list)) else [results]
    unused += node.all_input_nodes
    graph.erase_node(node)
    while unused:  # a result that nobody reads; a row count that the meaning does without
        candidate = unused.pop()
        if not candidate._erased and not candidate.users and graphs.is_pure(candidate) and candidate.op != "get_attr":
            unused += candidate.all_input_nodes
            graph.erase_node(candidate)
