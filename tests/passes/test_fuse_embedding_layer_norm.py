"""fuse_embedding_layer_norm: tables, constants that are positions by now, and sums that must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import floats, quick, reasons, write_before
from torch import Tensor, nn
from torch.nn import functional as F

from accelkit import Dim
from accelkit.testing import (
    apply,
    assert_idempotent,
    assert_left_alone,
    assert_same_numbers,
    graph_text,
    relative_error,
    run,
    trace,
)  # fmt: skip
from accelkit_passes.eliminate_dead_code import EliminateDeadCode
from accelkit_passes.fold_constants import FoldConstants
from accelkit_passes.fuse_embedding_layer_norm import FuseEmbeddingLayerNorm

PASSES = (FoldConstants(), FuseEmbeddingLayerNorm(), EliminateDeadCode())
fused_op = torch.ops.accelkit.embedding_layer_norm.default
aten = torch.ops.aten
LENGTH = 5


class Embeddings(nn.Module):
    """`body(self, ids, types)` with three tables and a norm; positions are [1, length, width] besides."""

    def __init__(self, body: Callable[..., Any], width: int = 6, **word: Any) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(11, width, **word), nn.Embedding(2, width)
        self.positions, self.norm, self.body = nn.Embedding(9, width), nn.LayerNorm(width), body
        self.added = nn.Parameter(torch.randn(1, LENGTH, width))
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids: Tensor, types: Tensor) -> Any:
        return self.body(self, ids, types)


def bert(self: Embeddings, ids: Tensor, types: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1])[None]
    return self.norm(self.words(ids) + self.types(types) + self.positions(places))


def bert_without_types(self: Embeddings, ids: Tensor, types: Tensor) -> Tensor:
    return bert(self, ids, torch.zeros(ids.shape, dtype=torch.int64))


def roberta(self: Embeddings, ids: Tensor, types: Tensor) -> Tensor:
    return self.norm(self.positions(ids - 1) + (self.words(ids) + self.types(types)))


def words_only(self: Embeddings, ids: Tensor, types: Tensor) -> Tensor:
    return self.norm(self.words(ids))


def added(self: Embeddings, ids: Tensor, types: Tensor) -> Tensor:
    return self.norm(self.words(ids) + self.added)


def ids(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 9, (batch, LENGTH)), torch.randint(0, 2, (batch, LENGTH))


def attributes(graph: Any) -> dict[str, Tensor]:
    return {n.target: getattr(graph, n.target) for n in graph.graph.find_nodes(op="get_attr") if "." not in n.target}


def test_tables_before_and_after() -> None:
    graph = trace(Embeddings(roberta), *ids())
    record = apply(FuseEmbeddingLayerNorm(), graph)
    assert graph_text(graph).splitlines()[6:] == [
        "%ids: i64[2, 5] = input",
        "%types: i64[2, 5] = input",
        "%0: i64[2, 5] = aten.sub.Tensor(%ids, 1)",
        "%1: f32[2, 5, 6] = accelkit.embedding_layer_norm([%ids, %types, %0], "
        "[%words.weight, %types.weight, %positions.weight], %norm.weight, %norm.bias, 1e-05)",
        "return (%1)",
    ]
    assert record.rewrites == ("embedding_1, embedding_2, embedding into layer_norm",)


def test_constants_become_one_table_with_each_row_once() -> None:
    model, inputs = Embeddings(bert_without_types), ids()
    graph = trace(model, *inputs)
    apply(PASSES, graph)
    assert graph_text(graph).splitlines()[3:] == [
        "%ids: i64[2, 5] = input",
        "%types: i64[2, 5] = input",
        "%layer_norm_rows: i64[1, 5] = attribute",
        "%layer_norm_table: f32[5, 6] = attribute",
        "%0: f32[2, 5, 6] = accelkit.embedding_layer_norm([%ids, %layer_norm_rows], "
        "[%words.weight, %layer_norm_table], %norm.weight, %norm.bias, 1e-05)",
        "return (%0)",
    ]
    made = attributes(graph)
    assert torch.equal(made["layer_norm_rows"], torch.arange(5)[None])
    expected = model.types.weight[0].double() + model.positions.weight[:5].double()
    assert torch.equal(made["layer_norm_table"], expected.float())


def test_one_constant_needs_no_memory_of_its_own() -> None:
    model = Embeddings(added)
    graph = trace(model, *ids())
    apply(FuseEmbeddingLayerNorm(), graph)
    assert attributes(graph)["layer_norm_table"].data_ptr() == model.added.data_ptr()


def test_rows_that_differ_within_the_batch_are_kept() -> None:
    rows = torch.randn(2, LENGTH, 6)
    model = Embeddings(lambda self, ids, types: self.norm(self.words(ids) + rows))
    graph, inputs = trace(model, *ids()), ids()
    before = run(graph, *inputs)[0]
    apply(FuseEmbeddingLayerNorm(), graph)
    assert torch.equal(attributes(graph)["layer_norm_rows"], torch.arange(10).reshape(2, LENGTH))
    assert torch.equal(run(graph, *inputs)[0], before)


def test_constant_that_gives_the_result_its_shape_keeps_its_rows() -> None:
    rows = torch.randn(1, 6).expand(3, LENGTH, 6).clone()
    model = Embeddings(lambda self, ids, types: self.norm(self.words(ids[:1]) + rows))
    graph = trace(model, *ids())
    apply(FuseEmbeddingLayerNorm(), graph)
    assert attributes(graph)["layer_norm_rows"].shape == (3, 1)  # the same for all positions, but a batch of three
    assert graph.graph.output_node().args[0][0].meta["val"].shape == (3, LENGTH, 6)


def test_a_row_for_all_tokens_and_a_constant_added_twice() -> None:
    row, place = torch.randn(6), torch.randn(LENGTH, 6)
    model, inputs = Embeddings(lambda self, ids, types: self.norm(self.words(ids) + place + row + place)), ids()
    graph = trace(model, *inputs)
    before = run(graph, *inputs)[0]
    apply(FuseEmbeddingLayerNorm(), graph)
    assert len(next(n for n in graph.graph.nodes if n.target is fused_op).args[0]) == 2
    assert relative_error(run(graph, *inputs)[0], before) < 1e-6


def embedded(body: Callable[..., Any], **word: Any) -> Embeddings:
    return Embeddings(lambda self, ids, types: self.norm(body(self, ids, types)), **word)


def sum_used_elsewhere(self: Embeddings, ids: Tensor, types: Tensor) -> Tensor:
    total = self.words(ids) + self.added
    return total + self.norm(total)


LEFT_ALONE: dict[str, tuple[nn.Module, str | None]] = {
    "sum used elsewhere": (Embeddings(sum_used_elsewhere), "add is also used by add_1"),
    "rows used elsewhere": (
        Embeddings(lambda self, ids, types: self.norm((e := self.words(ids)) + self.added) + e),
        "embedding is also used by add_1",
    ),
    "scaled": (
        embedded(lambda self, ids, types: torch.add(self.words(ids), self.types(types), alpha=2)),
        "alpha=2 scales the second operand of add",
    ),
    "four tables": (
        embedded(lambda self, i, types: self.words(i) + self.types(types) + self.positions(i - 1) + self.added),
        "it adds 4 tables; the fused operator takes 3",
    ),
    "two dimensions": (
        Embeddings(lambda self, ids, types: F.layer_norm(self.words(ids), (LENGTH, 6))),
        "it normalises the last 2 dimensions, not the last one alone",
    ),
    "sparse": (embedded(lambda self, ids, types: self.words(ids), sparse=True), "embedding is sparse"),
    "renormalised": (
        embedded(lambda self, ids, types: self.words(ids), max_norm=1.0),
        "embedding renormalises its table at every call (max_norm)",
    ),
    "something computed": (embedded(lambda self, ids, types: self.words(ids) + types[..., None].relu()), None),
    "no embedding": (embedded(lambda self, ids, types: self.added * 2), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, reason = LEFT_ALONE[case]
    assert_left_alone(FuseEmbeddingLayerNorm(), model, *ids(), reason=reason)


CONSTANTS = {
    "another dtype": (torch.randn(LENGTH, 6).half(), "is torch.float16, the sum torch.float32"),
    "broadcast over the width": (torch.randn(LENGTH, 1), "is broadcast over the width"),
    "one number": (torch.tensor(2.0), "is broadcast over the width"),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_constants_that_are_no_rows_are_refused(case: str) -> None:
    rows, reason = CONSTANTS[case]
    graph = trace(embedded(lambda self, ids, types: self.words(ids) + rows), *ids())
    apply(FoldConstants(), graph)
    assert reason in reasons(FuseEmbeddingLayerNorm(), graph)[0]


def test_constant_that_the_graph_writes_to_is_refused() -> None:
    class Moving(Embeddings):
        def __init__(self) -> None:
            super().__init__(words_only)
            self.register_buffer("moving", torch.randn(LENGTH, 6))

        def forward(self, ids: Tensor, types: Tensor) -> Tensor:
            result = self.norm(self.words(ids) + self.moving)
            self.moving.add_(1)
            return result

    reason = "what is added to the embeddings (moving) is written to by the graph"
    assert_left_alone(FuseEmbeddingLayerNorm(), Moving(), *ids(), reason=reason)


def test_write_in_between_is_refused() -> None:
    graph = trace(Embeddings(words_only), *ids())
    write_before(graph, "layer_norm")
    assert reasons(FuseEmbeddingLayerNorm(), graph) == ["add__tensor writes to memory between embedding and layer_norm"]


@pytest.mark.parametrize("body", [bert, roberta, added])
def test_second_run_finds_nothing_and_sizes_stay_dynamic(body: Any) -> None:
    dims = {0: Dim("batch", max=64)} if body is added else {0: Dim("batch", max=64), 1: Dim("length", min=2, max=9)}
    assert_idempotent(FuseEmbeddingLayerNorm(), Embeddings(body), *ids(3), dynamic_shapes={"ids": dims, "types": dims})


@quick
@given(
    body=st.sampled_from([bert, roberta, words_only, added]),
    batch=st.integers(1, 4),
    width=st.integers(1, 9),
    dtype=floats,
    seed=st.integers(0, 2**31),
)
def test_numbers(body: Any, batch: int, width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    assert_same_numbers(FuseEmbeddingLayerNorm(), Embeddings(body, width).to(dtype), *ids(batch))


@quick
@given(width=st.integers(2, 9), dtype=floats, seed=st.integers(0, 2**31))
def test_numbers_of_added_constants(width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = Embeddings(bert_without_types, width).to(dtype)
    floor = 2 * torch.finfo(dtype).eps  # the constants' sum is rounded once more
    assert_same_numbers(PASSES[:2], model, *ids(), times=2, floor=floor)
