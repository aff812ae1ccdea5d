"""linear -> residual_layer_norm   ->   linear_residual_layer_norm

Where rows are few, a matrix product fills the GPU only with K split between programs; the layer norm adds up the parts.
`choice` measures whether it pays.
"""

from __future__ import annotations

import operator

from torch import fx

from accelkit import graph as graphs
from accelkit.backends.fastertransformer.prepare import why_no_kernel
from accelkit.ops import OPERATORS

_LINEAR = OPERATORS["linear_activation"].overload
_NORM = OPERATORS["residual_layer_norm"].overload
_BOTH = OPERATORS["linear_residual_layer_norm"].overload


def split_linears(graph: fx.GraphModule) -> int:
    """Put the two together wherever a kernel takes them, in place; returns how many."""
    return sum(_rewritten(graph, node) for node in list(graph.graph.nodes) if node.target is _NORM)


def _rewritten(graph: fx.GraphModule, norm: fx.Node) -> bool:
    bound = graphs.bound_arguments(norm) or {}
    linear = bound["x"]
    if (
        not isinstance(linear, fx.Node)
        or linear.target is not _LINEAR
        or len(linear.users) != 1
        or bound["residual"] is linear
        or bound["rows"] is not None
    ):
        return False
    inner = graphs.bound_arguments(linear) or {}
    if inner["activation"] != "none" or inner["residual"] is not None or inner["rows"] is not None:
        return False
    if any(user.target is not operator.getitem for user in norm.users):
        return False
    arguments = (
        inner["x"], inner["weight"], inner["bias"], bound["residual"], bound["weight"], bound["bias"], bound["eps"],
    )  # fmt: skip
    with graph.graph.inserting_before(norm):
        both = graph.graph.call_function(_BOTH, arguments)
    both.meta = dict(norm.meta)
    if why_no_kernel(both) is not None:
        graph.graph.erase_node(both)
        return False
    norm.replace_all_uses_with(both)
    graph.graph.erase_node(norm)
    graph.graph.erase_node(linear)
    return True
