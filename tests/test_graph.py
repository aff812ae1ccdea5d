"""Questions about graphs: arguments by name, purity, randomness, writes, and whose memory a result may share."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn

from accelkit import graph as graphs

aten = torch.ops.aten


def node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    graph = fx.Graph()
    made = [graph.placeholder(f"x{i}") if a is ... else a for i, a in enumerate(args)]
    return graph.call_function(target, tuple(made), kwargs)


def test_arguments_by_their_schemas_names() -> None:
    one = node(aten.layer_norm.default, ..., [8], eps=1e-3)
    bound = graphs.bound_arguments(one)
    assert bound is not None
    assert (bound["input"], bound["normalized_shape"], bound["weight"], bound["eps"]) == (one.args[0], [8], None, 1e-3)
    assert graphs.bound_arguments(node(len, ...)) is None


@pytest.mark.parametrize(
    ("one", "random", "mutating", "pure"),
    [
        (node(aten.relu.default, ...), False, False, True),
        (node(aten.relu_.default, ...), False, True, False),
        (node(aten.dropout.default, ..., 0.5, True), True, False, False),
        (node(aten.dropout.default, ..., 0.5, False), False, False, True),
        (node(aten.dropout.default, ..., 0.0, True), False, False, True),
        (node(aten.rand.default, [2]), True, False, False),
        (node(aten.scaled_dot_product_attention.default, ..., ..., ..., None, 0.1), True, False, False),
        (node(aten.scaled_dot_product_attention.default, ..., ..., ...), False, False, True),
        (node(aten.batch_norm.default, ..., ..., ..., ..., ..., True, 0.1, 1e-5, True), False, True, False),
        (node(aten.batch_norm.default, ..., ..., ..., ..., ..., False, 0.1, 1e-5, True), False, False, True),
        (node(aten.batch_norm.default, ..., ..., ..., None, None, True, 0.1, 1e-5, True), False, False, True),
        (node(aten._assert_scalar.default, ..., "no"), False, False, False),
    ],
    ids=str,
)
def test_random_mutating_and_pure(one: fx.Node, random: bool, mutating: bool, pure: bool) -> None:
    assert graphs.is_random(one) is random
    assert graphs.is_mutating(one) is mutating
    assert graphs.is_pure(one) is pure


SQUARE = torch.arange(16.0).view(4, 4)
RETURNING: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.view.default, (SQUARE, [2, 8])),
    (aten.reshape.default, (SQUARE, [16])),
    (aten.t.default, (SQUARE,)),
    (aten.flatten.using_ints, (SQUARE,)),
    (aten.contiguous.default, (SQUARE,)),
    (aten.to.dtype, (SQUARE, torch.float32)),
    (aten.type_as.default, (SQUARE, SQUARE)),
    (aten.dropout.default, (SQUARE, 0.5, False)),
    (aten.expand.default, (SQUARE, [4, 4])),
    (aten.feature_dropout.default, (SQUARE, 0.5, False)),
    (aten.alpha_dropout.default, (SQUARE, 0.5, False)),
    (aten.slice.Tensor, (SQUARE, 0, 0, 2)),
    (aten.select.int, (SQUARE, 0, 1)),
    (aten.real.default, (SQUARE,)),
    (aten.diagonal.default, (SQUARE,)),
    (aten.sum_to_size.default, (SQUARE, [4, 4])),
    (aten.atleast_2d.default, (SQUARE,)),
    (aten.cartesian_prod.default, ([SQUARE[0]],)),
    (aten.broadcast_tensors.default, ([SQUARE],)),
    (aten.conj_physical.default, (SQUARE,)),
    (aten.movedim.int, (SQUARE, 0, 1)),
    (aten.unflatten.int, (SQUARE, 0, [2, 2])),
    (aten.squeeze.default, (SQUARE,)),
    (aten.chunk.default, (SQUARE, 2)),
    (aten.tensor_split.sections, (SQUARE, 2)),
    (aten.einsum.default, ("ij->ji", [SQUARE])),
    (aten.meshgrid.default, ([SQUARE[0]],)),
    (aten.pixel_shuffle.default, (SQUARE[None], 1)),
    (aten.narrow.default, (SQUARE, 0, 0, 2)),
    (aten.roll.default, (SQUARE, [0], [0])),
    (aten.rot90.default, (SQUARE, 0)),
    (aten.pad.default, (SQUARE, [0, 0])),
    (aten.constant_pad_nd.default, (SQUARE, [0, 0])),
    (aten.repeat.default, (SQUARE, [1, 1])),
    (aten.tile.default, (SQUARE, [1])),
    (aten.cat.default, ([SQUARE],)),
    (aten.adaptive_avg_pool2d.default, (SQUARE[None], [4, 4])),
    (aten.matrix_power.default, (SQUARE, 1)),
    (aten.nan_to_num.default, (SQUARE,)),
    (aten.round.default, (SQUARE.long(),)),
    (aten.ceil.default, (SQUARE.long(),)),
    (aten.positive.default, (SQUARE,)),
    (aten.flip.default, (SQUARE, [])),
    (aten.upsample_nearest2d.vec, (SQUARE[None, None], [4, 4], None)),
    (aten.diff.default, (SQUARE, 0)),
    (aten.repeat_interleave.self_int, (SQUARE, 1)),
    (aten.clamp_min.default, (SQUARE, 0)),
    (aten.column_stack.default, ([SQUARE],)),
    (aten.hstack.default, ([SQUARE],)),
    (aten.block_diag.default, ([SQUARE],)),
    (aten.linalg_multi_dot.default, ([SQUARE, SQUARE],)),
    (aten.moveaxis.int, (SQUARE, 0, 0)),
    (aten.rsub.Scalar, (SQUARE, 0)),
    (aten.float_power.Tensor_Scalar, (SQUARE.double(), 1.0)),
    (aten.instance_norm.default, (SQUARE[None], None, None, None, None, True, 0.1, 1e-5, False)),
]


@pytest.mark.parametrize(
    ("target", "args"), RETURNING, ids=lambda v: str(v) if isinstance(v, torch._ops.OpOverload) else ""
)
def test_an_operator_that_returns_its_inputs_memory_is_known_to(target: Any, args: tuple[Any, ...]) -> None:
    results = target(*args)
    results = results if isinstance(results, (tuple, list)) else [results]
    given = {
        t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)
    }
    shares = any(r.untyped_storage().data_ptr() in given for r in results)
    graph = fx.Graph()
    copies = torch.utils._pytree.tree_map(lambda a: graph.placeholder("x") if isinstance(a, torch.Tensor) else a, args)
    one = graph.call_function(target, copies)
    assert not shares or graphs.aliases(one), f"{target} gives its input back, but aliases() does not know"


def test_attributes_get_free_names() -> None:
    module = fx.GraphModule(nn.Module(), fx.Graph())
    names = [graphs.set_attribute(module, "a.weight", torch.ones(i)) for i in range(3)]
    assert names == ["a_weight", "a_weight_1", "a_weight_2"]
    assert [graphs.attribute(module, n).shape[0] for n in names] == [0, 1, 2]


def test_what_a_graph_writes_to() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    view = graph.call_function(aten.t.default, (w,))
    graph.call_function(aten.copy_.default, (view, x))
    assert graphs.written_roots(graph) == {w}
    assert graphs.storage_roots(view) == {w}


def test_each_result_of_a_fused_operator_is_memory_of_its_own() -> None:
    import accelkit.ops  # noqa: F401 (defines the operators)

    graph = fx.Graph()
    x, y, w = (graph.placeholder(name) for name in "xyw")
    fused = graph.call_function(torch.ops.accelkit.residual_rms_norm.default, (x, y, w))
    split = graph.call_function(aten.split.Tensor, (x, 2))
    first, second, again = (graph.call_function(operator.getitem, (fused, i)) for i in (0, 1, 1))
    part = graph.call_function(operator.getitem, (split, 0))
    assert [graphs.aliases(n) for n in (first, second, again, part)] == [[], [], [second], [split]]
    assert graphs.storage_roots(part) == {x}
    assert graphs.memory_family(first).isdisjoint(graphs.memory_family(again))
