"""What depends on weights and constants alone is computed once, now.

    add(arange(8), 1), read by the rest of the graph   ->  attribute add_folded, computed by running the same operators
    permute(attribute weight, [1, 0])                  ->  attribute that is a view of the weight: no memory of its own

Why: position ids, masks and normalised weights are computed again at every call, and ONNX exporters turn some of them
into operators that nothing can be fused across. Bit for bit the same: each operator runs as the graph would have run
it.

Not folded: what an input's sizes enter; what is random or uninitialised; a buffer that the graph writes to, and what
shares memory with it; what an output would be (a caller could then write into the constant); a result that is larger
than all that it is computed from and than `limit_bytes` (an expand or arange that would blow up the model: its inputs
are folded instead).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit.graph import attribute, is_pure, set_attribute, val
from accelkit.pass_api import GraphPass, PassResult
from accelkit_passes._proofs import output_families, written_memory

aten = torch.ops.aten
_UNINITIALISED = frozenset({
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten.empty_permuted.default,
})  # fmt: skip


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Compute what depends on weights and constants alone.

    Attributes:
        limit_bytes: a result larger than this is kept only if it is no larger than the weights and constants it reads.
            The default is as large as the mask of one head for 1024 tokens, a byte each.
    """

    limit_bytes: int = 1 << 20

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        constants = _constants(graph)
        kept_out = self._refuse(graph, constants, result)
        values: dict[fx.Node, Any] = {}
        for node in _frontier(graph, constants - kept_out):
            _fold(graph, node, _evaluate(graph, node, values))
            result.rewrote(node)
        if result.changed:
            _erase_unused(graph, constants)
        return result

    def _refuse(self, graph: fx.GraphModule, constants: set[fx.Node], result: PassResult) -> set[fx.Node]:
        """The constants that stay as they are; reported where they meet the rest of the graph, not all the way up."""
        of_outputs = frozenset[fx.Node]().union(*output_families(graph))
        kept_out: set[fx.Node] = set()
        for node in reversed(list(graph.graph.nodes)):
            if node not in constants or node.op == "get_attr" or all(u in constants - kept_out for u in node.users):
                continue
            if not isinstance(val(node), torch.Tensor):
                kept_out.add(node)  # several results: each is folded on its own
                continue
            reason = self._reason(graph, node, of_outputs)
            if reason is None:
                continue
            if any(user not in constants for user in node.users):
                result.refused(node, reason)
            kept_out.add(node)
        return kept_out

    def _reason(self, graph: fx.GraphModule, node: fx.Node, of_outputs: frozenset[fx.Node]) -> str | None:
        if node in of_outputs:
            return "an output would be the constant itself, which a caller could write to"
        size, read = _bytes(val(node)), sum(_bytes(attribute(graph, name)) for name in _read(node))
        if size > max(self.limit_bytes, read):
            return f"{size} bytes, more than the {read} it is computed from and than limit_bytes={self.limit_bytes}"
        return None


def _constants(graph: fx.GraphModule) -> set[fx.Node]:
    written = frozenset[fx.Node]().union(*written_memory(graph).values())
    constants: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node in written or not is_pure(node) or node.target in _UNINITIALISED:
            continue
        if node.op == "get_attr":
            if isinstance(attribute(graph, str(node.target)), torch.Tensor):
                constants.add(node)
        elif node.op == "call_function" and all(i in constants for i in node.all_input_nodes) and _is_fixed(node):
            constants.add(node)
    return constants


def _is_fixed(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return False
    values = val(node) if isinstance(val(node), (tuple, list)) else (val(node),)
    return all(isinstance(v, torch.Tensor) and all(type(s) is int for s in v.shape) for v in values)


def _frontier(graph: fx.GraphModule, constants: set[fx.Node]) -> Iterator[fx.Node]:
    for node in list(graph.graph.nodes):
        if node in constants and node.op != "get_attr" and any(user not in constants for user in node.users):
            yield node


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def _read(node: fx.Node) -> set[str]:
    names, seen, stack = set(), {node}, [node]
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            names.add(str(current.target))
        stack.extend(i for i in current.all_input_nodes if i not in seen)
        seen.update(current.all_input_nodes)
    return names


def _evaluate(graph: fx.GraphModule, wanted: fx.Node, values: dict[fx.Node, Any]) -> Any:
    stack = [wanted]
    while stack:
        node = stack[-1]
        missing = [i for i in node.all_input_nodes if i not in values]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if node.op == "get_attr":
            values[node] = attribute(graph, str(node.target))
        elif node not in values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            target: Any = node.target
            with torch.no_grad():
                values[node] = target(*args, **kwargs)
    return values[wanted]


def _fold(graph: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    # matmul sums in another order where the second operand wants a gradient, as a piece of a split parameter does even
    # under no_grad: the constant wants what the value wanted
    constant = value.detach().requires_grad_(value.requires_grad)
    name = set_attribute(graph, f"{node.name}_folded", constant)
    with graph.graph.inserting_before(node):
        folded = graph.graph.get_attr(name)
    node.replace_all_uses_with(folded)


def _erase_unused(graph: fx.GraphModule, constants: set[fx.Node]) -> None:
    for node in reversed(list(graph.graph.nodes)):
        if node in constants and not node.users:
            graph.graph.erase_node(node)
