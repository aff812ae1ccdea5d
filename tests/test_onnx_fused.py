"""The fused operators' ONNX forms in both dialects: right numbers, and ONNX Runtime's operators where they can be used."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from accelkit import Dim
from accelkit.backend_api import CompileContext, Engine
from accelkit.backends.onnxruntime import OnnxRuntime
from accelkit.onnx_translations import DIALECTS
from accelkit.testing import float64_reference, relative_error, trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

fused = torch.ops.accelkit


class Calls(nn.Module):
    """A module that calls one function on a list of tensors: one graph for many cases, since each export takes a second."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def compiled(function: Any, *inputs: torch.Tensor, dialect: str, dynamic_shapes: Any = None) -> tuple[Engine, Counter]:
    model = function if isinstance(function, nn.Module) else Calls(function)
    graph = trace(model, *inputs, dynamic_shapes=dynamic_shapes)
    engine = OnnxRuntime(dialect=dialect).compile(graph, inputs, CompileContext())
    exported = onnx.ModelProto.FromString(engine.serialize()["model.onnx"])
    assert {e.domain for e in exported.opset_import} <= {"", "com.microsoft"}
    return engine, Counter(f"{n.domain}:{n.op_type}".removeprefix(":") for n in exported.graph.node)


def check(engine: Engine, function: Any, *inputs: torch.Tensor) -> None:
    """At most twice plain PyTorch's own error against float64, plus 8 epsilon."""
    plain = torch.utils._pytree.tree_leaves(function(*inputs))
    truth = float64_reference(Calls(function), *inputs)
    for place, (result, own, exact) in enumerate(zip(engine(*inputs), plain, truth, strict=True)):
        assert (result.dtype, result.shape) == (own.dtype, own.shape)
        floor = 8 * torch.finfo(own.dtype).eps
        assert relative_error(result, exact) <= 2 * relative_error(own, exact) + floor, f"result {place}"


# --- attention


def operands(
    batch: int = 2, length: int = 5, keys: int = 5, heads: int = 4, few: int = 4, width: int = 8, value_width: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(batch, length, heads, width), torch.randn(batch, keys, few, width),
        torch.randn(batch, keys, few, value_width),
    )  # fmt: skip


MULTI_HEAD = "com.microsoft:MultiHeadAttention"

CASES: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({}, {}),
    ({}, {"keys": 7, "value_width": 6}),
    ({"scale": 0.3}, {}),
    ({"scale": -0.3}, {}),
    ({"causal": True}, {}),
    ({"causal": True}, {"keys": 7}),
    ({"causal": True}, {"length": 7}),
    ({}, {"heads": 6, "few": 2}),
    ({"causal": True}, {"heads": 4, "few": 1}),
]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_attention(dialect: str) -> None:
    inputs = [t for _, sizes in CASES for t in operands(**sizes)]

    def function(*given: torch.Tensor) -> Any:
        return [
            fused.attention(*given[3 * place : 3 * place + 3], None, **options)
            for place, (options, _) in enumerate(CASES)
        ]  # fmt: skip

    engine, operators = compiled(function, *inputs, dialect=dialect)
    assert operators[MULTI_HEAD] == (len(CASES) if dialect == "com.microsoft" else 0)
    check(engine, function, *inputs)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_masks(dialect: str) -> None:
    shapes = [(2, 4, 5, 7), (2, 1, 1, 7), (1, 1, 5, 7), (4, 1, 7), (5, 7), (7,)]

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *masks: torch.Tensor) -> Any:
        return [fused.attention(q, k, v, mask, causal) for mask in masks for causal in (False, True)]

    masks = []
    for shape in shapes:
        allowed = torch.rand(shape) > 0.4
        allowed[..., 0] = True
        masks += [allowed, torch.randn(shape).masked_fill(~allowed, float("-inf"))]
    inputs = (*operands(keys=7), *masks)
    engine, operators = compiled(function, *inputs, dialect=dialect)
    assert operators[MULTI_HEAD] == (4 * len(shapes) if dialect == "com.microsoft" else 0)
    check(engine, function, *inputs)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "float"])
def test_a_query_that_sees_nothing_gets_zeros(dialect: str, boolean: bool) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fused.attention(q, k, v, mask, True)

    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    allowed[0, 0, 2] = False
    allowed[1, 0, 1, :2] = False  # all that the causal triangle leaves of row 1
    mask = allowed if boolean else torch.randn(2, 1, 5, 5).masked_fill(~allowed, float("-inf"))
    inputs = (*operands(), mask)
    engine, _ = compiled(function, *inputs, dialect=dialect)
    (result,) = engine(*inputs)
    assert not result[0, 2].any()
    assert not result[1, 1].any()
    assert result[1, 2].any()
    check(engine, function, *inputs)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_attention_of_dynamic_batch_and_length(dialect: str) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return fused.attention(q, k, v, None, True) + fused.attention(q, k, v, mask)

    batch, length = Dim("batch"), Dim("length")
    shapes = (*({0: batch, 1: length},) * 3, {0: batch, 3: length})

    def example(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        return (*operands(batch, length, length), torch.rand(batch, 1, 1, length) > 0.2)

    model = Attention()
    engine, operators = compiled(model, *example(2, 5), dialect=dialect, dynamic_shapes=shapes)
    assert operators[MULTI_HEAD] == 2 * (dialect == "com.microsoft")
    for sizes in ((2, 5), (1, 1), (3, 9), (1, 64)):
        check(engine, model, *example(*sizes))


def test_what_multi_head_attention_cannot_is_spelled_out() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        wide = fused.attention(q.double(), k.double(), v.double())
        return fused.attention(q, k, v, None, scale=0.0), wide

    inputs = operands()
    engine, operators = compiled(function, *inputs, dialect="com.microsoft")
    assert operators[MULTI_HEAD] == 0
    assert operators["Softmax"] == 2
    check(engine, function, *inputs)


# --- norms


@pytest.mark.parametrize("dialect", DIALECTS)
def test_residual_norms(dialect: str) -> None:
    shapes = [(2, 5, 16), (6, 16), (2, 3, 5, 16)]

    def function(weight: torch.Tensor, bias: torch.Tensor, *rows: torch.Tensor) -> Any:
        found = []
        for x, residual in zip(rows[::2], rows[1::2], strict=True):
            for w, b in ((weight, bias), (weight, None), (None, None)):
                found += [fused.residual_layer_norm(x, residual, w, b, 1e-3), fused.residual_rms_norm(x, residual, w)]
        return found

    inputs = (torch.randn(16), torch.randn(16), *(torch.randn(s) for s in shapes for _ in range(2)))
    engine, operators = compiled(function, *inputs, dialect=dialect)
    own = 6 if dialect == "com.microsoft" else 0
    assert operators["com.microsoft:SkipLayerNormalization"] == own
    assert operators["com.microsoft:SkipSimplifiedLayerNormalization"] == max(
        own - 2, 0
    )  # two pairs of calls are the same
    assert operators["LayerNormalization"] == 9 - own
    check(engine, function, *inputs)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_norms_of_several_dtypes(dialect: str) -> None:
    def function(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return fused.residual_layer_norm(x, residual, weight, None)

    inputs = torch.randn(2, 5, 16).half(), torch.randn(2, 5, 16), torch.randn(16)
    engine, operators = compiled(function, *inputs, dialect=dialect)
    assert operators["com.microsoft:SkipLayerNormalization"] == 0
    check(engine, function, *inputs)


def test_the_bias_before_a_norm_and_unread_results() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            first, _ = fused.residual_layer_norm(self.linear(x), y, self.norm.weight, self.norm.bias)
            return fused.residual_layer_norm(y, self.linear(first), self.norm.weight, None)[1]

    inputs, two = (torch.randn(2, 5, 16), torch.randn(2, 5, 16)), Two().eval()
    graph = trace(two, *inputs)
    engine = OnnxRuntime().compile(graph, inputs, CompileContext())
    model = onnx.ModelProto.FromString(engine.serialize()["model.onnx"])
    norms = [n for n in model.graph.node if n.op_type == "SkipLayerNormalization"]
    assert [[bool(name) for name in n.output] for n in norms] == [[True], [True, False, False, True]]
    assert [len(n.input) for n in norms] == [5, 5]
    assert not any(n.op_type == "Add" for n in model.graph.node)
    torch.testing.assert_close(engine(*inputs)[0], graph(*inputs)[0])


# --- linear layers


@pytest.mark.parametrize("dialect", DIALECTS)
def test_linear_activation(dialect: str) -> None:
    def function(x: torch.Tensor, flat: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return [
            (fused.linear_activation(x, weight, b, activation, x), fused.linear_activation(flat, weight, b, activation))
            for activation in ("none", "gelu", "gelu_tanh", "relu", "silu")
            for b in (bias, None)
        ]

    inputs = torch.randn(2, 5, 16), torch.randn(3, 16), torch.randn(16, 16), torch.randn(16)
    engine, operators = compiled(function, *inputs, dialect=dialect)
    found = {name.removeprefix("com.microsoft:"): count for name, count in operators.items() if name.endswith("Gelu")}
    own = {"BiasGelu": 2, "Gelu": 2, "FastGelu": 4, "QuickGelu": 4}
    assert found == (own if dialect == "com.microsoft" else {})
    check(engine, function, *inputs)


def test_weights_are_multiplied_as_they_are() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = fused.linear_activation(x, self.first.weight, self.first.bias, "gelu")
            return fused.linear_activation(x, self.second.weight, self.second.bias)

    x = torch.randn(2, 3, 32)
    graph = trace(Two(), x)
    for dialect in DIALECTS:
        engine = OnnxRuntime(dialect=dialect).compile(graph, [x], CompileContext())
        model = onnx.ModelProto.FromString(engine.serialize()["model.onnx"])
        operators = Counter(n.op_type for n in model.graph.node)
        assert (operators["FusedMatMul"], operators["Transpose"]) == (2, 0)
        torch.testing.assert_close(engine(x)[0], graph(x)[0])


# --- embeddings


@pytest.mark.parametrize("dialect", DIALECTS)
def test_embeddings(dialect: str) -> None:
    cases = [  # the leading shapes of the indices; the last four are not for EmbedLayerNormalization
        [(2, 5), (2, 5), (2, 5)], [(2, 5), (1, 5)], [(2, 5), (5,), (2, 5)],
        [(2, 5), (1, 5), (1, 5)], [(2, 5)], [(2, 3, 5), (2, 3, 5)], [(5,), (2, 5)],
    ]  # fmt: skip

    def function(weight: torch.Tensor, bias: torch.Tensor, *given: torch.Tensor) -> Any:
        tables, indices = given[:3], iter(given[3:])
        return [
            fused.embedding_layer_norm([next(indices) for _ in case], list(tables[: len(case)]), weight, bias, 1e-6)
            for case in cases
        ]

    tables = [torch.randn(20 + n, 16) for n in range(3)]
    indices = [torch.randint(0, 20, shape) for case in cases for shape in case]
    inputs = (torch.randn(16), torch.randn(16), *tables, *indices)
    engine, operators = compiled(function, *inputs, dialect=dialect)
    assert operators["com.microsoft:EmbedLayerNormalization"] == (3 if dialect == "com.microsoft" else 0)
    check(engine, function, *inputs)
