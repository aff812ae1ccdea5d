"""The two ends of a recorded graph, where its static memory meets the caller's.

    x: f32, %0 = to(x, f16), ...               ->   x: f16, ...                     the copy into static memory casts
    ..., %9 = layer_norm(%8, ...); return %9   ->   ..., return %8  |  layer_norm(%8, ...)      outside, into fresh memory

Results are the caller's own, so what a recording leaves in static memory is copied out. Its last operators can give them
directly instead, launched after the recording: that costs the processor more than a copy does, so it is measured.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backends.fastertransformer.prepare import own_copy
from accelkit.ops import operator_of

_TO = torch.ops.aten.to.dtype
_CLONE = torch.ops.aten.clone.default


def without_casts(graph: fx.GraphModule) -> tuple[fx.GraphModule, tuple[torch.dtype | None, ...]]:
    """The graph without casts of its inputs, and for each input the dtype that it is cast to before, or None.

    An input that is read in its own dtype too keeps its cast. The graph itself is given back where there is nothing to do.
    """
    dtypes = tuple(_cast_of(node) for node in graph.graph.find_nodes(op="placeholder"))
    if not any(dtypes):
        return graph, dtypes
    own = own_copy(graph)
    for node, dtype in zip(own.graph.find_nodes(op="placeholder"), dtypes, strict=True):
        if dtype is not None:
            casts = list(node.users)
            node.meta = {**node.meta, "val": casts[0].meta["val"]}
            for cast in casts:
                cast.replace_all_uses_with(node)
                own.graph.erase_node(cast)
    own.graph.lint()
    own.recompile()
    return own, dtypes


def _cast_of(node: fx.Node) -> torch.dtype | None:
    users = list(node.users)
    if not users or any(user.target is not _TO or not _casts(user) for user in users):
        return None
    dtypes = {graphs.val(user).dtype for user in users}
    return dtypes.pop() if len(dtypes) == 1 else None


def _casts(node: fx.Node) -> bool:
    """Whether a `to` changes the dtype and nothing else: then it is a copy."""
    source = node.args[0]
    plain = len(node.args) == 2 and not node.kwargs
    return plain and isinstance(source, fx.Node) and graphs.val(source).dtype != graphs.val(node).dtype


def split_end(graph: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """The graph up to its last operators, and these: end(*head(*inputs)) is graph(*inputs), in memory of its own.

    A last operator is a fused one, or a cast, whose results are returned and read by nothing else. What no such
    operator gives is copied in `end`. None where there is none.
    """
    results: list[fx.Node] = list(graph.graph.output_node().args[0])  # type: ignore[arg-type]
    last = {source for result in results if _is_last(source := _source(result))}
    if not last:
        return None
    needed = [i for node in graph.graph.nodes if node in last for i in node.all_input_nodes if i.op != "get_attr"]
    given = list(dict.fromkeys([*needed, *(r for r in results if _source(r) not in last)]))

    end = fx.Graph()
    copies = {node: end.placeholder(node.name) for node in given}
    for node, placeholder in copies.items():
        placeholder.meta = dict(node.meta)
    returned = {r: end.call_function(_CLONE, (copies[r],)) for r in results if _source(r) not in last}
    for node in graph.graph.nodes:
        if node in last:
            for weight in node.all_input_nodes:
                if weight not in copies:
                    copies[weight] = end.node_copy(weight)
            copies[node] = end.node_copy(node, copies.__getitem__)
        elif node in results and _source(node) in last:
            copies[node] = end.node_copy(node, copies.__getitem__)
    end.output(tuple(returned.get(r, copies.get(r)) for r in results))

    head = own_copy(graph)
    names = {node.name: node for node in head.graph.nodes}
    output = head.graph.output_node()
    output.args = (tuple(names[node.name] for node in given),)
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "call_function" and _source(node) in last:
            head.graph.erase_node(names[node.name])
    head.graph.lint()
    head.recompile()
    return head, fx.GraphModule(graph, end, "End")


def _source(node: fx.Node) -> fx.Node:
    """The operator that a result is one of."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _is_last(node: fx.Node) -> bool:
    if operator_of(node) is None and not (node.target is _TO and _casts(node)):
        return False
    parts = [user for user in node.users if user.target is operator.getitem]
    readers = {reader for part in parts for reader in part.users} | {u for u in node.users if u not in parts}
    tensors = all(isinstance(graphs.val(i), torch.Tensor) for i in node.all_input_nodes)
    return tensors and all(reader.op == "output" for reader in readers)
