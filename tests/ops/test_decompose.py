"""Fused operators become ATen operators again: high-level ones, the same numbers, sizes that stay symbolic, no guard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from planted import Planted
from torch import fx, nn

import accelkit
from accelkit import Dim
from accelkit.backend_api import CompileContext
from accelkit.backends.eager import Eager
from accelkit.graph import graph_text
from accelkit.lowering import lower
from accelkit.ops import OPERATORS, operator_of
from accelkit.ops.decompose import decompose
from accelkit.pass_runner import fake_mode_of
from accelkit.testing import trace, units_in_last_place

fused = torch.ops.accelkit
WIDTH, HEADS = 16, 2


class Layer(nn.Module):
    """A transformer layer that calls the fused operators itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Parameter(torch.randn(50, WIDTH)), nn.Parameter(torch.randn(40, WIDTH))
        self.qkv, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(WIDTH))

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = self.norm.weight, self.norm.bias
        positions = torch.arange(words.shape[1])
        x = fused.embedding_layer_norm([words, positions], [self.table, self.positions], weight, bias, 1e-6)
        qkv = fused.linear_activation(x, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.view(*qkv.shape[:2], 3, HEADS, WIDTH // HEADS).unbind(2)
        attended = fused.attention(q, k, v, mask, causal=True).flatten(2)
        x, total = fused.residual_layer_norm(attended, x, weight, bias)
        x = fused.linear_activation(x, self.mlp.weight, self.mlp.bias, "gelu", total)
        return fused.residual_rms_norm(x, total, self.scale)


def example(batch: int = 2, length: int = 5, boolean: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.rand(batch, 1, length, length) > 0.3
    mask[..., 0] = True
    return torch.randint(0, 50, (batch, length)), mask if boolean else torch.randn(batch, 1, length, length)


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(n.target).removeprefix("aten.").removesuffix(".default") for n in graph.graph.nodes]


def test_the_text_before_and_after() -> None:
    class Half(nn.Module):
        def forward(self, q: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> Any:
            y, total = fused.residual_layer_norm(fused.attention(q, q, q, scale=0.5).flatten(2), x, w, None)
            return fused.linear_activation(y, total[0], None, "gelu_tanh")

    graph = trace(Half(), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 8), torch.randn(8))
    assert [n.name for n in graph.graph.nodes if operator_of(n)] == [
        "attention", "residual_layer_norm", "linear_activation",
    ]  # fmt: skip
    done = decompose(graph)
    graph.graph.lint()
    assert dict(done.replaced) == {
        "attention": ["attention"], "residual_layer_norm": ["residual_layer_norm"],
        "linear_activation": ["linear_activation"],
    }  # fmt: skip
    assert done.whole == {}
    assert graph_text(graph) == TEXT


TEXT = """\
%q: f32[2, 3, 2, 4] = input
%x: f32[2, 3, 8] = input
%w: f32[8] = input
%0: f32[2, 2, 3, 4] = aten.permute(%q, [0, 2, 1, 3])
%1: f32[2, 2, 3, 4] = aten.permute(%q, [0, 2, 1, 3])
%2: f32[2, 2, 3, 4] = aten.permute(%q, [0, 2, 1, 3])
%3: f32[2, 2, 3, 4] = aten.scaled_dot_product_attention(%0, %1, %2, scale=0.5)
%4: f32[2, 3, 2, 4] = aten.permute(%3, [0, 2, 1, 3])
%5: f32[2, 3, 2, 4] = aten.contiguous(%4)
%6: f32[2, 3, 8] = aten.flatten.using_ints(%5, 2)
%7: f32[2, 3, 8] = aten.add.Tensor(%6, %x)
%8: f32[2, 3, 8] = aten.layer_norm(%7, [8], %w)
%9: f32[3, 8] = aten.select.int(%7, 0, 0)
%10: f32[2, 3, 3] = aten.linear(%8, %9)
%11: f32[2, 3, 3] = aten.gelu(%10, approximate=tanh)
return (%11)"""


@pytest.mark.parametrize("boolean", [True, False])
def test_numbers_and_dynamic_sizes(boolean: bool) -> None:
    shapes = ({0: Dim("b"), 1: Dim("l", max=40)}, {0: Dim("b"), 2: Dim("l", max=40), 3: Dim("l", max=40)})
    model = Layer().eval()
    graph = trace(model, *example(boolean=boolean), dynamic_shapes=shapes)
    guards = len(fake_mode_of(graph).shape_env.guards)  # type: ignore[union-attr]
    decompose(graph)
    graph.graph.lint()
    assert len(fake_mode_of(graph).shape_env.guards) == guards  # type: ignore[union-attr]
    assert not any(operator_of(n) for n in graph.graph.nodes)
    found = targets(graph)
    for whole in ("linear", "gelu", "layer_norm", "rms_norm", "scaled_dot_product_attention", "embedding"):
        assert whole in found
    assert not {"mm", "addmm", "bmm", "transpose.int", "native_layer_norm", "promote_types"} & set(found)
    for batch, length in ((2, 5), (1, 1), (3, 9)):
        inputs = example(batch, length, boolean)
        with torch.no_grad():
            for result, expected in zip(graph(*inputs), model(*inputs), strict=True):
                assert units_in_last_place(result, expected) == 0


def test_what_is_kept() -> None:
    graph = trace(Layer().eval(), *example())
    done = decompose(graph, keep={"attention", "residual_rms_norm"})
    names = [o.name for n in graph.graph.nodes if (o := operator_of(n)) is not None]
    assert names == ["attention", "residual_rms_norm"]
    assert sorted(done.replaced) == ["embedding_layer_norm", "linear_activation", "residual_layer_norm"]
    assert decompose(graph, keep=OPERATORS).replaced == {}


def test_two_nodes_that_carry_one_fake_are_two_operands() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return fused.residual_rms_norm(x, y, None)[1]

    graph = trace(Both(), torch.randn(2, 4), torch.randn(2, 4))
    x, y = graph.graph.find_nodes(op="placeholder")
    y.meta["val"] = x.meta["val"]
    decompose(graph)
    assert targets(graph) == ["x", "y", "add.Tensor", "output"]  # the norm that nobody reads is gone
    one, other = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(graph(one, other)[0], one + other)


def test_a_row_count_that_the_meaning_does_without_goes() -> None:
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor, mask: torch.Tensor) -> Any:
            return fused.linear_activation(x, w, None, "relu", None, mask.sum().int().view(1))

    graph = trace(Rows(), torch.randn(2, 4), torch.randn(4, 4), torch.ones(2))
    decompose(graph)
    assert targets(graph) == ["x", "w", "mask", "linear", "relu", "output"]


# --- lowering


@dataclass(frozen=True)
class KnowsAttention(Planted):
    name: ClassVar[str] = "planted"
    fused_operators: ClassVar[frozenset[str]] = frozenset({"attention"})


def test_a_backend_gets_only_what_it_knows() -> None:
    inputs = example()
    graph, context = trace(Layer().eval(), *inputs), CompileContext()
    before = graph_text(graph)
    backend = KnowsAttention()
    lowered = lower(graph, backend, inputs, context)
    assert graph_text(graph) == before
    assert lowered.graph is graph
    (compiled,) = backend.compiled
    assert [o.name for n in compiled.graph.nodes if (o := operator_of(n)) is not None] == ["attention"]
    (record,) = context.records
    assert record.name == "decompose for planted"
    assert record.rewrites == (
        "accelkit.embedding_layer_norm: embedding_layer_norm", "accelkit.linear_activation: linear_activation",
        "accelkit.linear_activation: linear_activation_1", "accelkit.residual_layer_norm: residual_layer_norm",
        "accelkit.residual_rms_norm: residual_rms_norm",
    )  # fmt: skip
    assert record.nodes_after > record.nodes_before
    for result, expected in zip(lowered.call(*inputs), graph(*inputs), strict=True):
        assert torch.equal(result, expected)


def test_eager_runs_the_fused_operators_themselves() -> None:
    context, inputs = CompileContext(), example()
    lowered = lower(trace(Layer().eval(), *inputs), Eager(), inputs, context)
    assert context.records == []
    assert sum(operator_of(n) is not None for n in lowered.pieces[0].graph.graph.nodes) == 6


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        q = self.project(x).view(-1, 2, 4)
        attended = fused.variable_length_attention(q, q, q, offsets, 4)
        return self.project(attended.flatten(1)).relu()


def test_variable_lengths_stay_in_pytorch() -> None:
    inputs = torch.randn(6, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    model, context = Packed().eval(), CompileContext()
    lowered = lower(trace(model, *inputs), Planted(), inputs, context)
    (refusal,) = lowered.refusals
    assert refusal.node == "variable_length_attention"
    assert "where its sequences begin is known at run time only" in refusal.reason
    assert context.records[0].refusals[0].reason in refusal.reason
    assert [p.operators for p in lowered.pieces] == [2, 3]
    with torch.no_grad():
        assert torch.equal(lowered.call(*inputs)[0], model(*inputs))


# --- the way from a user's model to a file and back


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_users_model_that_calls_them(target: str, tmp_path: Any) -> None:
    inputs, model = example(), Layer().eval()
    fast = accelkit.optimize(model, inputs, target=target, cache=False, progress=False)
    with torch.no_grad():
        expected = model(*inputs)
    for result, wanted in zip(fast(*inputs), expected, strict=True):
        torch.testing.assert_close(result, wanted)
    fast.save(tmp_path / "m.accel")
    for result, wanted in zip(accelkit.load(tmp_path / "m.accel")(*inputs), expected, strict=True):
        torch.testing.assert_close(result, wanted)
