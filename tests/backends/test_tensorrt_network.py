"""What TensorRT's parser gets: the ONNX forms as text, operators that it has, operator set 17, profiles, weights in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accelkit import Dim, models
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT
from accelkit.backends.tensorrt.forms import rewritten
from accelkit.backends.tensorrt.network import MODEL, WEIGHTS, Network, float32_nodes, network_of
from accelkit.backends.tensorrt.opset import to_opset_17
from accelkit.errors import LoweringError
from accelkit.onnx_export import export_onnx
from accelkit.ops.decompose import decomposed_for
from accelkit.options import canonical_example, resolve_passes
from accelkit.pass_runner import run_passes
from accelkit.precision import as_precision
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")

SUPPORTED = json.loads((Path(__file__).resolve().parent.parent / "data" / "tensorrt_operators.json").read_text())


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def network(model: nn.Module, inputs: Any, precision: str = "fp32", dynamic_shapes: Any = None) -> tuple[Network, Any]:
    """The network of a model after the default passes, and the graph that it was written from."""
    args, kwargs = canonical_example(inputs)
    graph = trace(model.eval(), *args, dynamic_shapes=dynamic_shapes, **kwargs)
    wanted = as_precision(precision)
    graph_passes, onnx_passes = resolve_passes(None, wanted)
    run_passes(graph, graph_passes)
    graph, _ = decomposed_for("tensorrt", TensorRT.fused_operators, graph, [])
    graph = rewritten(graph)
    examples = [*args, *kwargs.values()]
    return network_of(graph, examples, CompileContext(wanted, onnx_passes)), graph


def text_of(model: Any) -> list[str]:
    """One line a node: `%3 = MatMul(%1, @weight)`; small constants by their values."""
    from onnx import numpy_helper

    names = {i.name: i.name for i in model.graph.input}
    for initializer in model.graph.initializer:
        outside = initializer.data_location == initializer.EXTERNAL
        small = outside or len(initializer.raw_data) > 48
        names[initializer.name] = initializer.name if small else str(numpy_helper.to_array(initializer).tolist())
    lines: list[str] = []
    results = 0
    for node in model.graph.node:
        given = ", ".join(names.get(i, "-") for i in node.input)
        settings = ", ".join(f"{a.name}={onnx.helper.get_attribute_value(a)}" for a in node.attribute)
        outputs = [o for o in node.output if o]
        made = [f"%{results + n}" for n in range(len(outputs))]
        results += len(outputs)
        names |= dict(zip(outputs, made, strict=True))
        lines.append(f"{', '.join(made)} = {node.op_type}({given}){f' {settings}' if settings else ''}")
    return lines


# --- the operators


def small_vit() -> tuple[nn.Module, Any]:
    return models._make_vit(32, 32, 1, 4), {"pixel_values": torch.randn(2, 3, 32, 32)}


def small_bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    inputs = {"input_ids": torch.randint(0, 64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    return transformers.BertModel(config), inputs


def small_convolutions() -> tuple[nn.Module, Any]:
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(block, head), torch.randn(2, 3, 8, 8)


SMALL = {"vit": small_vit, "bert": small_bert, "convolutions": small_convolutions}


@pytest.mark.parametrize(
    ("name", "precision"), [("vit", "fp16"), ("bert", "fp16"), ("bert", "fp32"), ("convolutions", "fp16")]
)
def test_operators_are_in_the_parsers_set(name: str, precision: str) -> None:
    torch.manual_seed(0)
    check_operators(*SMALL[name](), precision)


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", models.MODELS)
def test_operators_of_all_built_in_models(name: str, precision: str) -> None:
    check_operators(*models.load_model(name, 2), precision)


def check_operators(model: nn.Module, inputs: Any, precision: str) -> None:
    made, graph = network(model, inputs, precision)
    used = {node.op_type for node in made.model.graph.node}
    assert used <= set(SUPPORTED["8.6"]), f"TensorRT 8.6's parser has no {used - set(SUPPORTED['8.6'])}"
    assert [(e.domain, e.version) for e in made.model.opset_import] == [("", 17)]
    assert made.model.ir_version <= 8
    known = {node.name for node in graph.graph.nodes}
    assert all(made.origins[node.name] in known for node in made.model.graph.node), (
        "a node that nobody can be asked for"
    )
    assert len({node.name for node in made.model.graph.node}) == len(made.model.graph.node)
    assert not any(node.metadata_props for node in made.model.graph.node)


class Block(nn.Module):
    """Attention and GELU, pre-norm, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        heads = [f(y).unflatten(2, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        z = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return x + nn.functional.gelu(self.out(z))


@pytest.fixture(scope="module")
def block() -> tuple[Network, Any]:
    """The network of a block in fp16, and its graph: read, never changed."""
    return network(Block(), torch.randn(2, 5, 32), "fp16")


def test_golden_text_of_a_block(block: tuple[Network, Any]) -> None:
    made, _ = block
    lines = [line for line in text_of(made.model) if "LayerNormalization" not in line]
    merged, bias = "@to_dtype_3_folded_merged_rows", "@to_dtype_3_folded_bias_merged_rows"
    assert lines[:10] == [
        "%0 = Cast(x) to=10",
        f"%2 = Transpose({merged}_0) perm=[1, 0]",
        "%3 = MatMul(%1, %2)",
        f"%4 = Add(%3, {bias}_0)",
        f"%5 = Transpose({merged}_32) perm=[1, 0]",
        "%6 = MatMul(%1, %5)",
        f"%7 = Add(%6, {bias}_32)",
        f"%8 = Transpose({merged}_64) perm=[1, 0]",
        "%9 = MatMul(%1, %8)",
        f"%10 = Add(%9, {bias}_64)",
    ]
    assert lines[13:21] == [
        "%14 = Transpose(%11) perm=[0, 2, 1, 3]",
        "%15 = Mul(%14, 0.353515625)",
        "%16 = Transpose(%12) perm=[0, 2, 3, 1]",
        "%17 = Transpose(%13) perm=[0, 2, 1, 3]",
        "%18 = MatMul(%15, %16)",
        "%19 = Softmax(%18) axis=-1",
        "%20 = MatMul(%19, %17)",
        "%21 = Transpose(%20) perm=[0, 2, 1, 3]",
    ]
    assert lines[-7:] == [
        "%26 = Div(%25, 1.4140625)",
        "%27 = Erf(%26)",
        "%28 = Add(%27, 1.0)",
        "%29 = Mul(%25, %28)",
        "%30 = Mul(%29, 0.5)",
        "%31 = Add(%30, %0)",
        "%32 = Cast(%31) to=1",
    ]
    assert [n.op_type for n in made.model.graph.node].count("LayerNormalization") == 1


# --- operator set 17


def all_that_changed(x: torch.Tensor) -> Any:
    """x is [1, 2, 4, 6]."""
    return (
        x.mean(-1), x.amax((0, 1), keepdim=True), nn.functional.pad(x, (1, 2)),
        nn.functional.interpolate(x, scale_factor=2.0), *x.split([1, 5], -1), *x.chunk(3, 3),
    )  # fmt: skip


CHANGED = [
    ("ReduceMean", {"axes": [-1], "keepdims": 0}),
    ("ReduceMax", {"axes": [0, 1], "keepdims": 1}),
    ("Pad", {"mode": b"constant"}),
    ("Resize", {}),
    ("Split", {"axis": 3}),
    ("Split", {"axis": 3}),
]
"""Operators with another form in operator set 17, and their attributes there, in the order of `all_that_changed`."""


def test_operator_set_17_computes_the_same() -> None:
    from onnx.reference import ReferenceEvaluator

    x = torch.randn(1, 2, 4, 6)
    model = export_onnx(trace(Of(all_that_changed), x), opset=18)
    assert to_opset_17(model) is None
    assert model.opset_import[0].version == 17
    before = model.SerializeToString()
    assert to_opset_17(model) is None
    assert model.SerializeToString() == before
    onnx.checker.check_model(model, full_check=True)
    found = [n for n in model.graph.node if n.op_type in dict(CHANGED)]
    assert [n.op_type for n in found] == [name for name, _ in CHANGED]
    for node, (_, attributes) in zip(found, CHANGED, strict=True):
        assert attributes.items() <= {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}.items()
    results = ReferenceEvaluator(model).run(None, {"inputs_0": x.numpy()})
    for result, wanted in zip(results, all_that_changed(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), wanted)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([("Mish", ["x"], {})], "Mish (n0) is new in operator set 18"),
        ([("ReduceMean", ["x", "axes"], {})], "ReduceMean (n0) takes its axes from a computation"),
        ([("Pad", ["x", "pads", "", "axes"], {})], "Pad (n0) names the axes that it pads"),
        (
            [("Resize", ["x", "", "pads"], {"antialias": 1})],
            "Resize (n0) uses antialias, which is new in operator set 18",
        ),
        ([("Split", ["x"], {"num_outputs": 2})], "Split (n0) cuts into parts that may differ"),
        ([("ScatterND", ["x", "axes", "x"], {"reduction": "max"})], "ScatterND (n0) reduces by max"),
        ([("LpPool", ["x"], {"kernel_shape": [2], "dilations": [2]})], "LpPool (n0) uses dilations, which is new"),
    ],
    ids=["Mish", "ReduceMean", "Pad", "Resize", "Split", "ScatterND", "LpPool"],
)
def test_what_stays_in_operator_set_18_says_why(nodes: list[Any], reason: str) -> None:
    made = [
        onnx.helper.make_node(kind, given, [f"y{i}"], name=f"n{i}", **attributes)
        for i, (kind, given, attributes) in enumerate(nodes)
    ]
    inputs = [onnx.helper.make_tensor_value_info(n, t, None) for n, t in (("x", 1), ("axes", 7), ("pads", 7))]
    graph = onnx.helper.make_graph(made, "g", inputs, [onnx.helper.make_tensor_value_info("y0", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    before = model.SerializeToString()
    assert reason in str(to_opset_17(model))
    assert model.SerializeToString() == before
    model.opset_import[0].version = 20
    assert to_opset_17(model) == "is written in operator set 20"


# --- profiles, precisions


def test_profile_of_dynamic_and_fixed_dimensions() -> None:
    batch, length = Dim("batch", max=16), Dim("length", min=4, max=64)
    shapes = {"inputs": ({0: batch, 1: length}, None)}
    made, _ = network(Of(lambda x, y: x * 2 + y), (torch.randn(3, 9, 8), torch.randn(8)), dynamic_shapes=shapes)
    assert made.profile == {
        "inputs_0": ((1, 4, 8), (3, 9, 8), (16, 64, 8)),
        "inputs_1": ((8,), (8,), (8,)),
    }


def test_a_dimension_without_a_largest_size_is_refused() -> None:
    with pytest.raises(
        LoweringError, match=r"dimension 0 of input_1 has no largest size.*give its Dim a max in dynamic_shapes"
    ):
        network(nn.Linear(8, 4), torch.randn(3, 8), dynamic_shapes=({0: Dim("batch")},))


def test_a_half_model_is_a_half_network_whatever_was_asked() -> None:
    made, _ = network(nn.Linear(8, 4).half(), torch.randn(3, 8).half())
    assert made.precision == "fp16"
    assert network(nn.Linear(8, 4), torch.randn(3, 8), "tf32")[0].precision == "tf32"


def test_nodes_that_the_graph_keeps_in_float32() -> None:
    def wide_middle(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).float().exp().sum(-1).half() * 3

    made, _ = network(Of(wide_middle), torch.randn(2, 4).half())
    kinds = {node.name: node.op_type for node in made.model.graph.node}
    assert [kinds[name] for name in made.keep_fp32] == ["Exp", "ReduceSum"]
    assert float32_nodes(made.model) == made.keep_fp32


# --- names


def test_refused_nodes_are_the_graphs_own(block: tuple[Network, Any]) -> None:
    made, graph = block
    softmax, erf = (next(n for n in made.model.graph.node if n.op_type == kind) for kind in ("Softmax", "Erf"))
    found = made.in_graph({softmax.name: "no softmax", erf.name: "no erf", "a stranger": "who?"})
    names = {node.name: str(node.target) for node in graph.graph.nodes}
    assert {names[node]: why for node, why in found.items()} == {
        "accelkit.attention.default": "no softmax",
        "accelkit.linear_activation.default": "no erf",
    }


def test_what_the_exporter_cannot_take_is_named() -> None:
    graph = trace(Of(lambda x: torch.lgamma(x.exp()) + 1), torch.randn(3, 3))
    with pytest.raises(LoweringError, match=r"torch\.onnx\.export cannot take the graph") as caught:
        network_of(graph, [torch.randn(3, 3)], CompileContext())
    names = {node.name: str(node.target) for node in graph.graph.nodes}
    assert any("lgamma" in names[node] for node in caught.value.nodes)
    assert not any(names[node] == "aten.exp.default" for node in caught.value.nodes)


# --- weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.transposed = nn.Parameter(torch.randn(16, 20).T)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.table(i)
        return nn.functional.linear(x, self.table.weight), nn.functional.linear(x, self.transposed)


def test_the_file_computes_what_the_model_does(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, i = Tied().eval(), torch.randint(0, 40, (2, 3))
    made, _ = network(model, i)
    path = made.write(tmp_path)
    assert path == tmp_path / MODEL
    assert sorted(p.name for p in tmp_path.iterdir()) == [MODEL, WEIGHTS]
    assert (tmp_path / WEIGHTS).stat().st_size < made.weight_bytes + 3 * 4096, "tied weights are written once"
    results = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"i": i.numpy()})
    with torch.no_grad():
        for result, expected in zip(results, model(i), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), expected)


def test_bfloat16_weights_are_written_as_they_are(tmp_path: Path) -> None:
    model = nn.Linear(32, 64).bfloat16()
    made, _ = network(model, torch.randn(2, 32).bfloat16())
    made.write(tmp_path)
    written = torch.frombuffer(bytearray((tmp_path / WEIGHTS).read_bytes()), dtype=torch.bfloat16)
    assert torch.equal(written[: 32 * 64].view(64, 32), model.weight)
    assert made.precision == "bf16"


def test_a_refittable_engine_has_small_weights_outside_too() -> None:
    graph = trace(nn.Linear(4, 4), torch.randn(2, 4))
    inside = network_of(graph, [torch.randn(2, 4)], CompileContext())
    outside = network_of(graph, [torch.randn(2, 4)], CompileContext(), external_bytes=0)
    assert (set(inside.weights), set(outside.weights)) == (set(), {"@weight", "@bias"})
