"""What clean-up passes may rely on: proofs about sizes and layouts that add no guard, and who shares whose memory.

Sizes may be symbolic. Comparing them in Python (`if a == b`) freezes a dynamic dimension; `proved(a == b)` is True only
where it holds for every size. An input's strides are the caller's, who may pass another layout than the example's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from accelkit.graph import aliases, attribute, is_mutating, memory_family, val

aten = torch.ops.aten

# The layout of their results follows from the shapes alone, whatever the layout of their inputs.
_FIXED_RESULT = frozenset({
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default,
    aten.layer_norm.default, aten.embedding.default, aten.contiguous.default,
})  # fmt: skip


def proved(condition: Any) -> bool:
    """Whether a comparison of (symbolic) sizes holds for every size; no guard is added."""
    return bool(statically_known_true(condition))


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every size."""
    return len(left) == len(right) and all(proved(a == b) for a, b in zip(left, right, strict=True))


def same_strides(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape are laid out alike; the stride of a dimension of size 1 does not matter."""
    strides = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(proved(size == 1) or proved(a == b) for size, a, b in strides)


def contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor is contiguous for every size."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not proved(size == 1) and not proved(stride == expected):
            return False
        expected = expected * size
    return True


def fixed_layouts(graph: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose strides do not depend on how the caller lays out the inputs."""
    fixed: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and (node.target in _FIXED_RESULT or all(i in fixed for i in node.all_input_nodes if _is_tensor(i)))
        ):
            fixed.add(node)
    return fixed


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(val(node), (torch.Tensor, tuple, list))


def output_families(graph: fx.GraphModule) -> list[frozenset[fx.Node]]:
    """For each output, the nodes whose memory it may share."""
    return [memory_family(node) for node in graph.graph.output_node().all_input_nodes]


def written_memory(graph: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """Each node that writes, with the nodes whose memory it may write to; the same weight under two names is both."""
    writes = {}
    for node in graph.graph.nodes:
        if is_mutating(node):
            written = frozenset[fx.Node]().union(*(memory_family(a) for a in aliases(node)))
            storages = {_storage(graph, n) for n in written if n.op == "get_attr"}
            tied = (n for n in graph.graph.find_nodes(op="get_attr") if storages and _storage(graph, n) in storages)
            writes[node] = written.union(tied)
    return writes


def _storage(graph: fx.GraphModule, node: fx.Node) -> object:
    value = attribute(graph, str(node.target))
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else node.target


def sharing_problem(graph: fx.GraphModule, copy: fx.Node, source: fx.Node) -> str | None:
    """Why what reads `copy`, which has memory of its own, must not read `source` instead; None where it may."""
    return _output_problem(graph, copy, source) or _write_problem(graph, copy, source)


def _output_problem(graph: fx.GraphModule, copy: fx.Node, source: fx.Node) -> str | None:
    families = output_families(graph)
    if not any(copy in family for family in families):
        return None
    origin = memory_family(source)
    roots = sorted(n.name for n in origin if n.op in ("placeholder", "get_attr"))
    if roots:
        return f"an output would share memory with {roots[0]}"
    if any(copy not in family and not origin.isdisjoint(family) for family in families):
        return "two outputs would share memory"
    return None


def _write_problem(graph: fx.GraphModule, copy: fx.Node, source: fx.Node) -> str | None:
    writes = written_memory(graph)
    if not writes:
        return None
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    origin, readers = memory_family(source), _readers(copy)
    for writer, written in writes.items():
        if copy in written:
            return f"{writer.name} writes to it"
        late = [r.name for r in readers if order[r] > order[writer]]
        if late and order[writer] > order[copy] and not origin.isdisjoint(written):
            return f"{late[0]} reads it after {writer.name} has written to {source.name}"
    return None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Everything that reads the node's memory: its users, and those of its views."""
    readers: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user not in readers:
                readers[user] = None
                if current in aliases(user):
                    stack.append(user)
    return list(readers)
