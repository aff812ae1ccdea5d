"""layer_norm(embedding(words) + embedding(types) + embedding(positions))  ->  accelkit.embedding_layer_norm(indices, tables)

How BERT begins: two or three rows are read for each token, and their sum is never written. Positions and token types
that the caller leaves out are constants by now, [1, length, width]: one table with a row for each position, looked up by
a constant [0, 1, ...]. Several constants are one: added in float64 and rounded once, with equal rows (the same token
type everywhere) kept once; a constant of its own costs the memory of its rows.

Tables are added in the order of the graph, so that nothing but the constants' own sum is rounded differently. What
does not matter here: padding_idx and scale_grad_by_freq, which change gradients only. A sum that is used elsewhere
(pre-norm models such as GPT-2) stays, as the fused operator does not give it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops.embedding_layer_norm import OPERATOR
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._fusion import (
    add_fused,
    bound,
    constant,
    erase_unused,
    nothing_used_outside,
    nothing_written_between,
    require,
)  # fmt: skip
from accelkit_passes._proofs import proved

aten = torch.ops.aten

MOST_TABLES = 3
"""As many as the fused operator's kernel adds."""


@dataclass(frozen=True)
class FuseEmbeddingLayerNorm(GraphPass):
    """layer_norm(embedding + embedding + constant) -> accelkit.embedding_layer_norm"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for norm in graph.graph.find_nodes(op="call_function", target=aten.layer_norm.default):
            terms, sums = _terms(norm.args[0])
            looked_up = [term for term in terms if term.target is aten.embedding.default]
            if not looked_up or any(term.op != "get_attr" for term in terms if term not in looked_up):
                continue
            try:
                result.rewrote(_fuse(graph, norm, terms, sums))
            except Refused as refusal:
                result.refused(norm, str(refusal))
        return result


def _terms(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a tree of additions adds, in its order of evaluation, and the additions."""
    if node.target is not aten.add.Tensor or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return [node], []
    (left, left_sums), (right, right_sums) = (_terms(operand) for operand in node.args[:2])  # type: ignore[arg-type]
    if len(right) > len(left):
        left, right = right, left
    return left + right, [*left_sums, *right_sums, node]


def _fuse(graph: fx.GraphModule, norm: fx.Node, terms: list[fx.Node], sums: list[fx.Node]) -> str:
    arguments = bound(norm)
    dimensions = len(arguments["normalized_shape"])
    require(dimensions == 1, f"it normalises the last {dimensions} dimensions, not the last one alone")
    looked_up = [term for term in terms if term.target is aten.embedding.default]
    inside = {norm, *sums, *looked_up}
    nothing_used_outside(graph, inside, norm)
    for one in sums:
        require(bound(one)["alpha"] == 1, f"alpha={bound(one)['alpha']} scales the second operand of {one.name}")
    for term in terms:
        _check_term(graph, term, norm)
    constants = [term for term in terms if term not in looked_up]
    tables = len(looked_up) + bool(constants)
    require(tables <= MOST_TABLES, f"it adds {tables} tables; the fused operator takes {MOST_TABLES}")
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    nothing_written_between(graph, min(looked_up, key=order.__getitem__), norm)
    pairs = [(bound(term)["indices"], bound(term)["weight"]) for term in terms if term in looked_up]
    if constants:
        pairs.insert(terms.index(constants[0]), _as_table(graph, norm, constants, looked_up))
    operands = [list(column) for column in zip(*pairs, strict=True)]
    fused = add_fused(graph, OPERATOR, (*operands, *(arguments[name] for name in ("weight", "bias", "eps"))), norm)
    norm.replace_all_uses_with(fused)
    erase_unused(graph, {*inside, *constants})
    return f"{', '.join(term.name for term in terms)} into {norm.name}"


def _check_term(graph: fx.GraphModule, term: fx.Node, norm: fx.Node) -> None:
    value, result = graphs.val(term), graphs.val(norm)
    require(value.dtype == result.dtype, f"{term.name} is {value.dtype}, the sum {result.dtype}")
    wide = value.dim() > 0 and proved(value.shape[-1] == result.shape[-1])
    require(wide, f"{term.name} is broadcast over the width")
    if term.target is not aten.embedding.default:
        constant(graph, term, "what is added to the embeddings")  # which refuses what the graph writes to
        return
    arguments = bound(term)
    require(not arguments["sparse"], f"{term.name} is sparse")
    renormalised = arguments["weight"].target is aten.embedding_renorm.default
    require(not renormalised, f"{term.name} renormalises its table at every call (max_norm)")


def _as_table(
    graph: fx.GraphModule, norm: fx.Node, constants: list[fx.Node], looked_up: list[fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """The sum of the constants as (indices, table): each row once, and where it goes."""
    values = [constant(graph, node, "a constant") for node in constants]
    total = values[0]
    if len(values) > 1:
        total = functools.reduce(torch.add, (value.double() for value in values)).to(values[0].dtype)
    for dim in range(total.dim() - 1):
        one = total.narrow(dim, 0, 1)
        if _covered(dim - total.dim(), norm, looked_up) and torch.equal(total, one.expand_as(total)):
            total = one
    rows, leading = total.reshape(-1, total.shape[-1]), total.shape[:-1]
    places = torch.arange(len(rows), device=rows.device).reshape(leading)
    names = [graphs.set_attribute(graph, f"{norm.name}_{hint}", v) for hint, v in (("rows", places), ("table", rows))]
    with graph.graph.inserting_before(norm):
        indices, table = (graph.graph.get_attr(name) for name in names)
    return indices, table


def _covered(dim: int, norm: fx.Node, looked_up: list[fx.Node]) -> bool:
    """Whether the result has its size in dimension `dim` (from the right) without the constant."""
    size = graphs.val(norm).shape[dim]
    shapes = [graphs.val(term).shape for term in looked_up]
    return any(len(shape) >= -dim and proved(shape[dim] == size) for shape in shapes)
