"""What the rest of the target makes of folded and split graphs: batches that may be padded, memory that is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fused_graphs import copied, encoder, fused_graph
from torch import fx

from accelkit import Dim
from accelkit.backends.fastertransformer.engine import _own_bytes
from accelkit.backends.fastertransformer.fold_layer_norm import fold_layer_norms
from accelkit.backends.fastertransformer.split_linear import split_linears
from accelkit.batch import batch_of
from accelkit.rowwise import why_not_rowwise


@pytest.mark.parametrize("rewrite", [fold_layer_norms, split_linears])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_rows_stay_independent(rewrite: Callable[[fx.GraphModule], int], pre_norm: bool) -> None:
    x = torch.randn(2, 9, 128)
    graph = fused_graph(
        encoder(pre_norm=pre_norm), x, precision="fp16", dynamic_shapes={"input": {0: Dim("batch", max=64)}}
    )
    batch = batch_of(graph)
    assert not isinstance(batch, str)
    assert rewrite(graph) > 0
    assert why_not_rowwise(graph, batch.symbol) is None


def test_folded_weights_are_the_engines_own_memory() -> None:
    graph = fused_graph(encoder(pre_norm=True), torch.randn(2, 9, 128), precision="fp16")
    folded = copied(graph)
    assert _own_bytes(folded, graph) == 0
    assert fold_layer_norms(folded) == 3  # the first norm has no linear layer before it
    up, qkv = 256 * 128, 384 * 128
    vectors = 4 * 2 * (2 * 256 + 384)  # of float32: an offset and sums for each of the three
    assert _own_bytes(folded, graph) == 2 * (2 * up + qkv) + vectors
