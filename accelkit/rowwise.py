"""Whether every row of a batch is computed from that row alone, so that rows of padding change nothing in the others.

    [batch, ...] -> linear, layer_norm, attention within a row, ...  ->  [batch, ...]      row i of each depends on row i only

A value is "rows" where its first dimension is the batch and its row i comes from row i of the inputs; what is computed from
weights alone is constant. Operators are allowed by name: one that is not known here is a refusal, as is the batch size
itself used as a number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from accelkit import graph as graphs

Bound = dict[str, Any]
Rule = Callable[["_Analysis", fx.Node, Bound], str | None]


def why_not_rowwise(graph: fx.GraphModule, symbol: str) -> str | None:
    """Why rows cannot be proved independent, naming the operator; None where they are.

    Args:
        symbol: the batch's name in the graph's shapes, as in `f32[s0, 8]`.
    """
    analysis = _Analysis(symbol)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if analysis.batched(node):
                analysis.rows.add(node)
        elif node.op not in ("get_attr", "output") and (reason := analysis.visit(node)) is not None:
            return f"{node.name} ({node.target}) {reason}"
    (returned,) = graph.graph.output_node().args
    fixed = [n.name for n in returned if isinstance(n, fx.Node) and n not in analysis.rows]  # type: ignore[union-attr]
    return f"the output {fixed[0]} does not have a row for each input row" if fixed else None


class _Analysis:
    """The nodes seen so far: those that hold rows, and the sizes that depend on the batch."""

    def __init__(self, symbol: str) -> None:
        self.symbol = symbol
        self.rows: set[fx.Node] = set()
        self.sizes: set[fx.Node] = set()
        self.numbers: set[fx.Node] = set()  # rows that hold their own numbers, 0, 1, 2, ...

    def visit(self, node: fx.Node) -> str | None:
        if graphs.is_size(node):
            if any(i in self.rows or i in self.sizes for i in node.all_input_nodes):
                return self._size(node)
            return None
        if node.op != "call_function" or graphs.is_random(node) or graphs.is_mutating(node):
            return "is not a plain function of its arguments"
        uses_batch = any(i in self.sizes for i in node.all_input_nodes)
        if not uses_batch and not any(i in self.rows for i in node.all_input_nodes):
            return None
        if node.target is operator.getitem:
            reason = None
        else:
            bound = graphs.bound_arguments(node)
            rule = _rule(node) if bound is not None else None
            if bound is None or rule is None:
                return "is not known to treat rows independently"
            if uses_batch and node.target not in _TAKE_SIZES:
                return "computes with the batch size"
            reason = rule(self, node, bound)
        if reason is None and not self.batched(node):
            return "gives a result whose first dimension is not the batch"
        self.rows.add(node)
        return reason

    def _size(self, node: fx.Node) -> str | None:
        if self.symbol in _symbols(graphs.val(node)):
            self.sizes.add(node)
        elif (
            any(not graphs.is_size(i) for i in node.all_input_nodes) and node.target is not torch.ops.aten.sym_size.int
        ):
            return "computes a Python number from tensor data"
        return None

    def batched(self, node: fx.Node) -> bool:
        """Whether the first dimension of the node's value (of each of its values) is the batch, and no other is."""
        value = graphs.val(node)
        tensors = [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor)]
        return bool(tensors) and all(
            t.ndim > 0
            and str(t.shape[0]) == self.symbol
            and not any(self.symbol in _symbols(size) for size in t.shape[1:])
            for t in tensors
        )

    def is_rows(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.rows


def _symbols(size: Any) -> set[str]:
    return {str(s) for s in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()


def _ndim(value: Any) -> int:
    found = graphs.val(value) if isinstance(value, fx.Node) else value
    return found.ndim if isinstance(found, Tensor) else 0


# --- rules: None where the node keeps rows apart, else why it does not


def _elementwise(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    widest = _ndim(node)
    for value in node.all_input_nodes:
        if value in analysis.rows and _ndim(value) != widest:
            return f"broadcasts the rows of {value.name} along another dimension"
    return None


def _along(*names: str) -> Rule:
    """Works along the dimensions that these arguments name: any but the first."""

    def rule(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
        rank = _ndim(next(iter(bound.values())))
        for name in names:
            dims = bound.get(name)
            for dim in dims if isinstance(dims, (tuple, list)) else (dims,):
                if dim is None or not isinstance(dim, int) or dim % max(rank, 1) == 0:
                    return "works across the batch"
            if isinstance(dims, (tuple, list)) and not dims:
                return "works across the batch"
        return _first_only(analysis, node, bound)

    return rule


def _first_only(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    """Rows come in the first argument alone; the others are weights or numbers."""
    first, *others = bound.values()
    if not analysis.is_rows(first):
        return "takes rows where a weight is expected"
    if any(n in analysis.rows for value in others for n in _nodes(value)):
        return "takes rows where a weight is expected"
    return None


def _at_least(rank: int, rule: Rule = _first_only) -> Rule:
    """The first argument has so many dimensions, so that the operator's own do not reach the batch."""

    def checked(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
        if _ndim(next(iter(bound.values()))) < rank:
            return "works across the batch"
        return rule(analysis, node, bound)

    return checked


def _reshaped(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    # elements keep their order and the first dimension its size, so each row keeps its elements
    if next(iter(bound.values())) in analysis.numbers:
        analysis.numbers.add(node)
    return _first_only(analysis, node, bound)


def _expanded(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    source = next(iter(bound.values()))
    if analysis.is_rows(source) and _ndim(source) != _ndim(node):
        return "broadcasts its rows along another dimension"
    return None  # a constant repeated for each row, or rows that stay where they are


def _permuted(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    return None if bound["dims"][0] % _ndim(node) == 0 else "moves the batch to another dimension"


def _normalised(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    if len(bound["normalized_shape"]) >= _ndim(node):
        return "works across the batch"
    return _first_only(analysis, node, bound)


def _fused_normalised(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    if bound["rows"] is not None or any(n in analysis.rows for n in _nodes((bound["weight"], bound.get("bias")))):
        return "takes rows where a weight is expected"
    if _ndim(bound["x"]) < 2 or _ndim(bound["x"]) != _ndim(bound["residual"]):
        return "works across the batch"
    return None


def _linear_activation(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    if bound["rows"] is not None or any(n in analysis.rows for n in _nodes((bound["weight"], bound["bias"]))):
        return "takes rows where a weight is expected"
    residual = bound["residual"]
    if _ndim(bound["x"]) < 2 or (residual is not None and _ndim(residual) != _ndim(node)):
        return "works across the batch"
    return None


def _folded_linear(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    weights = [value for name, value in bound.items() if name not in ("x", "residual", "moments", "residual_moments")]
    if any(n in analysis.rows for n in _nodes(weights)):
        return "takes rows where a weight is expected"
    x, taken = bound["x"], [bound[name] for name in ("residual", "moments", "residual_moments")]
    if _ndim(x) < 2 or any(value is not None and _ndim(value) != _ndim(x) for value in taken):
        return "works across the batch"
    return None


def _linear_and_norm(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    weights = [value for name, value in bound.items() if name not in ("x", "residual")]
    if any(n in analysis.rows for n in _nodes(weights)):
        return "takes rows where a weight is expected"
    return "works across the batch" if _ndim(bound["x"]) < 2 or _ndim(bound["x"]) != _ndim(bound["residual"]) else None


def _product(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    left, right = list(bound.values())[:2]
    if analysis.is_rows(right):
        # [batch, ..., k, n]: the batch is none of the two dimensions of the product
        same = _ndim(right) >= 3 and (not analysis.is_rows(left) or _ndim(left) == _ndim(right))
        return None if same and _ndim(left) <= _ndim(right) else "multiplies across the batch"
    return None if 2 <= _ndim(left) >= _ndim(right) else "multiplies across the batch"


def _attention(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    if not all(analysis.is_rows(bound[name]) and _ndim(bound[name]) == 4 for name in ("query", "key", "value")):
        return "attends across the batch"
    mask = bound.get("mask", bound.get("attn_mask", bound.get("allowed")))
    if analysis.is_rows(mask) and _ndim(mask) != 4:
        return "attends across the batch"
    return "drops at random" if bound.get("dropout_p") else None


def _embedding(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    return "looks up rows of the batch" if analysis.is_rows(bound["weight"]) else None


def _embedding_layer_norm(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    if any(n in analysis.rows for n in _nodes((bound["tables"], bound["weight"], bound["bias"]))):
        return "looks up rows of the batch"
    rank = _ndim(node) - 1
    same = all(_ndim(i) == rank for i in bound["indices"] if analysis.is_rows(i))
    return None if same else "broadcasts its rows along another dimension"


def _batch_norm(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    return "normalises across the batch" if bound["training"] else _first_only(analysis, node, bound)


def _concatenated(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    if bound["dim"] % _ndim(node) == 0:
        return "works across the batch"
    return None if all(analysis.is_rows(t) for t in bound["tensors"]) else "joins rows with what has none"


def _indexed(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    source, (first, *others) = bound["self"], bound["indices"]
    if not analysis.is_rows(source) or any(analysis.is_rows(i) for i in others):
        return "picks across the batch"
    own = first in analysis.numbers and _ndim(first) >= max(map(_ndim, others), default=0)
    return None if first is None or own else "picks across the batch"


def _gathered(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    """Row i of both: elements of a row picked by its own numbers."""
    source, index = bound["self"], bound["index"]
    own = analysis.is_rows(source) and analysis.is_rows(index) and _ndim(source) == _ndim(index)
    return None if own and bound["dim"] % _ndim(source) else "picks across the batch"


def _numbered(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    # row i holds i, however many there are
    if (
        any(isinstance(bound.get(name), fx.Node) for name in ("start", "step"))
        or bound.get("start")
        or bound.get("step", 1) != 1
    ):
        return "computes with the batch size"
    analysis.numbers.add(node)
    return None


def _filled(analysis: _Analysis, node: fx.Node, bound: Bound) -> str | None:
    # every row is the same number, unless it is computed from the batch
    return "computes with the batch size" if isinstance(bound.get("fill_value"), fx.Node) else None


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n))
    return found


def _rule(node: fx.Node) -> Rule | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    rule = _RULES.get(target._schema.name)
    if rule is None and torch.Tag.pointwise in target.tags:
        return _elementwise
    return rule


def _table(entries: dict[str, Rule]) -> dict[str, Rule]:
    return {
        (name if "::" in name else f"aten::{name}"): rule for names, rule in entries.items() for name in names.split()
    }


_RULES: dict[str, Rule] = _table({
    "linear": _at_least(2),
    "matmul bmm mm": _product,
    "conv1d": _at_least(3), "conv2d": _at_least(4), "conv3d": _at_least(5),
    "max_pool2d avg_pool2d adaptive_avg_pool2d": _at_least(4),
    "batch_norm": _batch_norm, "layer_norm rms_norm": _normalised, "group_norm": _at_least(2),
    "softmax log_softmax cumsum amax amin argmax argmin select slice narrow index_select": _along("dim"),
    "mean sum var std linalg_vector_norm diff": _along("dim"), "gather": _gathered,
    "split split_with_sizes chunk unbind": _along("dim"),
    "flip": _along("dims"), "transpose swapaxes": _along("dim0", "dim1"),
    "view reshape flatten unflatten unsqueeze squeeze _unsafe_view": _reshaped,
    "expand": _expanded, "permute": _permuted, "cat stack": _concatenated, "index": _indexed,
    "contiguous clone to _to_copy detach alias dropout masked_fill where type_as expand_as __and__ __or__ __xor__": _elementwise,
    "full zeros ones new_zeros new_ones new_full zeros_like ones_like full_like": _filled,
    "arange": _numbered, "embedding": _embedding, "scaled_dot_product_attention": _attention,
    "accelkit::attention": _attention, "accelkit::sparse_attention": _attention,
    "accelkit::linear_activation": _linear_activation,
    "accelkit::residual_layer_norm accelkit::residual_rms_norm": _fused_normalised,
    "accelkit::folded_linear": _folded_linear, "accelkit::row_moments": _at_least(3),
    "accelkit::linear_residual_layer_norm": _linear_and_norm,
    "accelkit::embedding_layer_norm": _embedding_layer_norm, "accelkit::patch_embedding": _at_least(4),
})  # fmt: skip

aten = torch.ops.aten
_TAKE_SIZES = frozenset({
    aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default, aten.unflatten.int,
    aten.full.default, aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.arange.default, aten.arange.start, aten.arange.start_step,
})  # fmt: skip
