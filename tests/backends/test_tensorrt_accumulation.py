"""What fp16 products are summed in: which products, how a network says it, and which of several engines is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fake_tensorrt
import pytest
import torch
from tensorrt_jobs import VERSIONS
from test_tensorrt_backend import Machine
from torch import nn

import accelkit
from accelkit import Dim, InputError
from accelkit.accuracy import OutputError
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT, accumulation, backend, versions
from accelkit.backends.tensorrt.accumulation import (
    AS_IT_LIKES,
    Level,
    Part,
    Whole,
    everything,
    few_rows,
    levels,
    most_accurate,
)
from accelkit.backends.tensorrt.judging import require_precision
from accelkit.backends.tensorrt.kernel_names import sums_in
from accelkit.backends.tensorrt.manifest import Manifest
from accelkit.backends.tensorrt.products import Product, holds_products, linear_products, structure, summed_in_float32
from accelkit.backends.tensorrt.proof import Layer, Proof
from accelkit.errors import LoweringError
from accelkit.onnx_export import export_onnx
from accelkit.precision import as_precision
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")

FP16 = as_precision("fp16")


@pytest.fixture
def machine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.narrow(self.wide(x).relu())
        return torch.matmul(y, y.transpose(-1, -2))


def mlp() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 32).half()
    return trace(Mlp().half().eval(), x), x


# --- which products


def test_levels_grow() -> None:
    products = [Product("q", 768, 768), Product("fc1", 768, 3072), Product("fc2", 3072, 768)]
    assert [(level.words, level.nodes) for level in levels(products)] == [
        ("sums as TensorRT likes", ()),
        ("sums of more than 2048 terms in float32", ("fc2",)),
        ("sums of layers that widen or narrow in float32", ("fc1", "fc2")),
        ("sums of all linear layers in float32", ("q", "fc1", "fc2")),
    ]
    assert [level.nodes for level in levels([Product("q", 8, 8)])] == [(), ("q",)]
    assert list(levels([])) == [AS_IT_LIKES]
    assert everything(products).nodes == ("q", "fc1", "fc2")


def test_products_of_weights_and_no_others() -> None:
    graph, _ = mlp()
    model = export_onnx(graph, opset=18)
    found = linear_products(model)
    assert [(p.terms, p.columns) for p in found] == [(32, 128), (128, 32)]
    assert [n.op_type for n in model.graph.node].count("MatMul") == 3
    assert holds_products(model, (found[0].node,))
    assert not holds_products(model, tuple(n.name for n in model.graph.node if n.op_type == "Add"))


def test_casts_around_products() -> None:
    graph, _ = mlp()
    model = export_onnx(graph, opset=18)
    (name,) = (p.node for p in linear_products(model)[1:])
    before = model.SerializeToString()
    after = summed_in_float32(model, (name,))
    assert model.SerializeToString() == before
    place = next(i for i, n in enumerate(after.graph.node) if n.name == name)
    around = after.graph.node[place - 2 : place + 2]
    assert [n.op_type for n in around] == ["Cast", "Cast", "MatMul", "Cast"]
    assert [n.attribute[0].i for n in around if n.op_type == "Cast"] == [1, 1, 10]
    onnx.shape_inference.infer_shapes(after, strict_mode=True)


# --- which engine


class Fake:
    """An engine with a known error."""

    def __init__(self, error: float) -> None:
        self.error, self.notes = error, []  # type: ignore[var-annotated]

    def __call__(self, *inputs: torch.Tensor) -> Sequence[Any]:
        return [self.error]

    def note(self, *sentences: str) -> None:
        self.notes += sentences


class Judge:
    beside = "plain PyTorch's"

    def of(self, results: Sequence[Any]) -> list[OutputError]:
        return [OutputError("y", results[0], 1e-3, 2e-3)]


def chosen(errors: Sequence[float | LoweringError], judge: Any = Judge, first: int = 0) -> tuple[Fake, list[str]]:
    built: list[str] = []
    products = [Product("q", 768, 768), Product("fc1", 768, 3072), Product("fc2", 3072, 768)]

    def build(level: Level) -> Fake:
        error = errors[len(built)]
        built.append(level.words)
        if isinstance(error, LoweringError):
            raise error
        return Fake(error)

    x = torch.zeros(1)
    engine, place = most_accurate(list(levels(products)), build, judge, [x], lambda engine: 3.25, first)
    assert list(levels(products))[place].words in built
    return engine, built


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "_TIMED_SECONDS", 0.0)
    monkeypatch.setattr(backend, "_NEEDED", {})


def test_what_is_accurate_enough_is_taken_as_it_is() -> None:
    engine, built = chosen([1.7e-3])
    assert (engine.error, len(built)) == (1.7e-3, 1)
    (note,) = engine.notes
    assert note.startswith("sums as TensorRT likes: error 1.70e-03, 1.70 times plain PyTorch's, ")
    assert note.endswith("ms, built in 3.25 s")


def test_the_first_that_is_accurate_enough() -> None:
    engine, built = chosen([3.5e-3, 2.03e-3, 1.2e-3, 1.1e-3])
    assert (engine.error, len(built)) == (1.2e-3, 3)
    assert [
        "3.50 times" in engine.notes[0],
        "(1): error 2.03e-03" in engine.notes[1],
        "(2): error" in engine.notes[2],
    ] == [True] * 3


def test_the_most_accurate_where_none_is_accurate_enough() -> None:
    engine, built = chosen([3.5e-3, 2.4e-3, 2.2e-3, 2.3e-3])
    assert (engine.error, len(built)) == (2.2e-3, 4)
    assert engine.notes[-1] == "none of these is within 90% of the error that is allowed: the most accurate was taken"


def test_a_level_that_cannot_be_built() -> None:
    engine, _ = chosen([3.5e-3, LoweringError("no kernel obeys\nmore"), 1.2e-3])
    assert engine.notes[1] == "sums of more than 2048 terms in float32: not built (no kernel obeys)"
    with pytest.raises(LoweringError, match="as it likes"):
        chosen([LoweringError("as it likes")])


def test_layers_of_one_structure_begin_where_the_first_one_ended() -> None:
    engine, built = chosen([1.2e-3], first=2)
    assert built == ["sums of layers that widen or narrow in float32"]
    assert (
        engine.notes[0] == "sums as TensorRT likes: not tried, a part of the same structure was not accurate enough so"
    )
    engine, built = chosen([2.4e-3, 1.2e-3], first=2)
    assert (engine.error, len(built)) == (1.2e-3, 2)


def test_structure_is_the_same_for_other_weights() -> None:
    x = torch.randn(2, 5, 32).half()
    one, same = (structure(export_onnx(trace(Mlp().half(), x), opset=18)) for _ in range(2))
    assert one == same
    assert structure(export_onnx(trace(Mlp().half(), x[:1]), opset=18)) != one


def test_what_has_no_float64_form_is_told() -> None:
    def no_memory() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine, built = chosen([9.0], no_memory)
    assert built == ["sums as TensorRT likes"]
    assert engine.notes == ["what fp16 products are summed in was not judged: CUDA out of memory"]


def test_results_without_fractions_are_not_judged() -> None:
    graph = trace(nn.Softmax(-1), torch.randn(2, 4).half())
    assert len(Part(graph, [torch.randn(2, 4).half()], FP16).of([torch.rand(2, 4)])) == 1

    class Largest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1)

    x = torch.randn(2, 4).half()
    assert Part(trace(Largest(), x), [x], FP16).of([torch.zeros(2, dtype=torch.int64)]) == []


def test_independent_rows_are_judged_on_the_first() -> None:
    class Mixes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0)

    x = torch.randn(7, 4)
    for model, rows in ((nn.Linear(4, 4), 2), (Mixes(), None)):
        shapes = ({0: Dim("batch", max=8)},) if rows else {"x": {0: Dim("batch", max=8)}}
        graph = trace(model, x, dynamic_shapes=shapes)
        few, found = few_rows(graph, [x])
        assert (found, len(few[0])) == (rows, rows or 7)
    assert few_rows(trace(nn.Linear(4, 4), x), [x])[1] is None, "a fixed batch runs as a whole only"
    yardstick = Part(trace(nn.Linear(4, 4), x, dynamic_shapes=({0: Dim("batch", max=8)},)), [x], FP16)
    assert yardstick.of([torch.cat([yardstick.plain[0], torch.full((5, 4), 1e3)])])[0].error < 1e-6


# --- through the target


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_sums_as_each_version_has_them(machine: Machine, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(version)
    jobs = []
    build = backend.build_plan
    monkeypatch.setattr(backend, "build_plan", lambda job, **how: jobs.append(job) or build(job, **how))
    graph, x = mlp()
    engine = TensorRT(cuda_graph=False, accumulate="fp32").compile(graph, [x], CompileContext(FP16))
    (job,) = jobs
    assert (len(job.keep_fp32), job.tf32) == (2, True)
    assert set(job.keep_fp32) == set(engine.manifest.wide)
    assert Manifest.from_blobs(engine.serialize())[1].wide == engine.manifest.wide
    assert any("fp16, with 2 products summed in float32 for accuracy" in note for note in engine.describe().notes)
    torch.testing.assert_close(engine(x)[0], graph(x)[0], rtol=1e-2, atol=1e-2)


def test_as_it_likes_is_one_build_and_not_judged(machine: Machine) -> None:
    machine.has("8.6")
    graph, x = mlp()
    engine = TensorRT(cuda_graph=False, accumulate="fp16").compile(graph, [x], CompileContext(FP16))
    assert engine.manifest.wide == ()
    assert not any("as TensorRT likes" in note for note in engine.describe().notes)


def test_auto_measures_and_keeps_what_it_found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("8.6")
    graph, x = mlp()
    jobs = []
    build = backend.build_plan
    monkeypatch.setattr(backend, "build_plan", lambda job, **how: jobs.append(job) or build(job, **how))
    shares = iter([2.0, 0.5, 0.5, 0.5])
    monkeypatch.setattr(accumulation, "share", lambda errors: next(shares))
    target = TensorRT(cuda_graph=False)
    engine = target.compile(graph, [x], CompileContext(FP16))
    assert [len(job.keep_fp32) for job in jobs] == [0, 2]
    notes = engine.describe().notes
    assert any(note.startswith("sums as TensorRT likes: error") for note in notes)
    assert any(note.startswith("sums of layers that widen or narrow in float32 (2): error") for note in notes)
    again = target.compile(mlp()[0], [x], CompileContext(FP16))
    assert [len(job.keep_fp32) for job in jobs] == [0, 2, 2], "as TensorRT likes is not tried again"
    assert any("not tried, a part of the same structure" in note for note in again.describe().notes)
    monkeypatch.setattr(backend, "build_plan", None)
    loaded = target.load(engine.serialize(), graph, [x], CompileContext(FP16))
    assert [n for n in loaded.describe().notes if "sums " in n] == [n for n in notes if "sums " in n]


@pytest.mark.parametrize("accumulate", ["auto", "fp32", "fp16"])
def test_products_are_told_where_wider_ones_were_taken(
    machine: Machine, accumulate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has("8.6", fp32_unless_told=True)
    graph, x = mlp()
    jobs = []
    build = backend.build_plan
    monkeypatch.setattr(backend, "build_plan", lambda job, **how: jobs.append(job) or build(job, **how))
    target = TensorRT(cuda_graph=False, accumulate=accumulate)
    engine = target.compile(graph, [x], CompileContext(FP16))
    assert [len(job.demanded) for job in jobs] == [0, 1 if accumulate == "fp32" else 3]
    notes = engine.describe().notes
    assert any("told to run in fp16: left free, TensorRT took wider kernels" in note for note in notes)
    machine.has("8.6", fp32_unless_told="nor then")
    with pytest.raises(LoweringError, match=r"fp16 was asked for.* \(told to run them in fp16, it did not\)"):
        target.compile(graph, [x], CompileContext(FP16))


def test_a_whole_model_is_judged_by_what_the_check_allows(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original in fp16 is the yardstick, not the graph after the passes; nothing is computed twice for it."""
    from accelkit import yardstick

    machine.has("8.6")
    calls = []
    for name in ("reference_outputs", "_plain_in"):
        compute = getattr(yardstick, name)
        monkeypatch.setattr(yardstick, name, lambda *given, name=name, do=compute: calls.append(name) or do(*given))
    monkeypatch.setattr(accumulation, "Part", None)
    x = torch.randn(2, 5, 32)
    fast = accelkit.optimize(Mlp().eval(), x, target=TensorRT(cuda_graph=False), precision="fp16", cache=False)
    assert sorted(calls) == ["_plain_in", "reference_outputs"]
    variant = fast.report().variants[0]
    (accuracy,) = variant.accuracy
    (note,) = [n for p in variant.pieces for n in p.facts.notes if n.startswith("sums as TensorRT likes")]
    assert accuracy.yardstick is not None
    times = accuracy.error / accuracy.yardstick
    assert f"error {accuracy.error:.2e}, {times:.2f} times plain PyTorch's" in note
    strict = accelkit.optimize(
        Mlp().eval(), x, target=TensorRT(cuda_graph=False), precision="fp16", cache=False, tolerance=1e-2
    )
    assert len(strict.report().variants[0].pieces) == 1


def test_results_that_are_integers_do_not_count_for_the_whole() -> None:
    errors = [OutputError("y", 0.1, None, 1.0), OutputError("i", 1.0, None, 0.0)]
    assert Whole(lambda results: errors).of([torch.rand(2), torch.ones(2, dtype=torch.int64)]) == errors[:1]


def test_other_precisions_are_not_judged(machine: Machine) -> None:
    machine.has("8.6")
    x = torch.randn(2, 5, 32)
    engine = TensorRT(cuda_graph=False).compile(trace(Mlp().eval(), x), [x], CompileContext())
    assert not any("summed in" in note or "sums " in note for note in engine.describe().notes)


def test_an_unknown_way() -> None:
    with pytest.raises(InputError, match=r"accumulate='bf16'\): known are auto, fp32, fp16"):
        TensorRT(accumulate="bf16")


def test_tf32_may_be_allowed_beside_half_precision() -> None:
    trt = fake_tensorrt.load("8.6")
    for allowed in (False, True):
        config = trt.Builder(trt.Logger()).create_builder_config()
        versions.set_precision(trt, config, "fp16", allowed)
        assert config.get_flag(trt.BuilderFlag.TF32) is allowed
        assert config.get_flag(trt.BuilderFlag.FP16)


# --- the proof


def test_kernels_tell_what_they_sum_in() -> None:
    name = "sm90_xmma_gemm_f16f16_f16{}_f16_tn_n_tilesize128x128x64"
    assert (sums_in(name.format("f16")), sums_in(name.format("f32")), sums_in("_gemm_mha_v2")) == ("fp16", "fp32", None)


REGION = (Layer("{ForeignNode[a...b]}", "region", None, 1.0),)


def test_products_in_float32_on_purpose_are_no_mistake() -> None:
    wide = ("fc1", "fc2")
    kernels = {"fp16": 0.4, "tf32": 0.6}
    (said,) = require_precision(Proof(REGION, kernels), "fp16", (), wide)
    assert said == "fp16, with 2 products summed in float32 for accuracy: the kernels that ran show tf32 0.6 ms"
    told = (Layer("{ForeignNode[a...b]}", "region", "tf32", 1.0),)
    assert "tf32 0.6 ms" in require_precision(Proof(told, {"tf32": 0.6}), "fp16", (), wide)[0]
    with pytest.raises(LoweringError, match="regions run in another precision"):
        require_precision(Proof(REGION, kernels), "fp16")
    with pytest.raises(LoweringError, match="int8"):
        require_precision(Proof(REGION, {**kernels, "int8": 0.1}), "fp16", (), wide)
    (said,) = require_precision(Proof(REGION, {"fp16": 1.0}, sums={"fp32": 0.7, "fp16": 0.3}), "fp16", (), ("fc1",))
    assert (
        said
        == "fp16, with 1 product summed in float32 for accuracy: the kernels that ran show fp16 summed in fp32 0.7 ms"
    )
    (said,) = require_precision(Proof(REGION, {"fp16": 1.0}), "fp16", (), wide)
    assert said.endswith("no kernel's or layer's name shows it")


def test_single_layers_in_float32_on_purpose() -> None:
    layers = (Layer("fc2 + add", "product", "tf32", 0.6), Layer("q", "product", "fp16", 0.4))
    (said,) = require_precision(Proof(layers), "fp16", (), ("fc2",))
    assert said.endswith("1 layers with them run in tf32")
    with pytest.raises(LoweringError, match="q in fp32"):
        require_precision(Proof((*layers[:1], Layer("q", "product", "fp32", 0.4))), "fp16", (), ("fc2",))
