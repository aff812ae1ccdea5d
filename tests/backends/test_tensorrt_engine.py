"""TensorRT's engine without a GPU: every path of it once for each version, on the stand-in made from the bindings' listings."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import pytest
import torch
from fake_tensorrt_engine import MAGIC
from planted import in_threads
from tensorrt_jobs import VERSIONS
from torch import fx, nn

from accelkit import Dim, InputError, LoweringError
from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT, backend, library, refitting
from accelkit.backends.tensorrt import engine as engines
from accelkit.backends.tensorrt.engine import TensorRTEngine
from accelkit.backends.tensorrt.manifest import MANIFEST, PLAN, Manifest, require_fit, sha256
from accelkit.onnx_export import export_onnx, external_weights
from accelkit.precision import as_precision
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")

GPU = {"gpu": "NVIDIA Test", "compute_capability": "9.0", "driver": "580.1"}


class Event:
    """An event of a stream that is done when the test says so."""

    def __init__(self) -> None:
        self.happened, self.marked, self.waited = True, 0, 0

    def query(self) -> bool:
        return self.happened


class CpuStreams:
    """Streams on a processor: `now` is the caller's, by thread."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.index = torch.device("cpu"), 0
        self.device_now = lambda: 0
        self.capturing = lambda: getattr(STATE, "capturing", False)

    def current(self) -> int:
        return getattr(STATE, "stream", 7)

    def on_device(self) -> Any:
        return contextlib.nullcontext()

    def new_event(self) -> Event:
        return Event()

    def mark(self, event: Event) -> None:
        event.marked += 1

    def wait(self, event: Event) -> None:
        event.waited += 1

    def share(self, tensor: torch.Tensor) -> None: ...

    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...


STATE = threading.local()


@contextlib.contextmanager
def on_stream(number: int) -> Iterator[None]:
    STATE.stream = number
    try:
        yield
    finally:
        STATE.stream = 7


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = fake_tensorrt.load(request.param)
    monkeypatch.setattr(library, "loaded", lambda: module)
    monkeypatch.setattr(library, "device_facts", lambda index: dict(GPU))
    monkeypatch.setattr(engines, "Streams", CpuStreams)
    monkeypatch.setattr(engines, "_device", lambda inputs: torch.device("cpu"))
    return module


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 40), nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Wide(nn.Module):
    """int64 in and out, a bool, an input that nothing reads."""

    def forward(self, ids: torch.Tensor, unused: torch.Tensor) -> Any:
        return ids * 2 + 1, ids > 3


EXPORTED: dict[tuple[fx.GraphModule, bool], Any] = {}


def exported(graph: fx.GraphModule, refittable: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """The graph's ONNX model with the weights in it; once a graph, since it takes half a second."""
    if (graph, refittable) not in EXPORTED:
        model = export_onnx(graph, external_bytes=0 if refittable else 1024)
        weights = external_weights(model, graph)
        for initializer in model.graph.initializer:
            if initializer.name in weights:
                values = onnx.numpy_helper.from_array(weights[initializer.name].numpy(), initializer.name)
                initializer.CopyFrom(values)
        EXPORTED[graph, refittable] = model, weights
    return EXPORTED[graph, refittable]


@functools.cache
def traced(kind: type[nn.Module], dynamic: bool = False) -> tuple[nn.Module, fx.GraphModule]:
    """One model of this kind, and its graph."""
    inputs = (torch.randn(4, 8),) if kind is Model else (torch.randint(0, 9, (3, 5)), torch.randn(2))
    model = kind()
    return model, trace(model, *inputs, dynamic_shapes={"x": {0: Dim("batch", max=16)}} if dynamic else None)


def built(
    trt: ModuleType, graph: fx.GraphModule, profile: Any = None, refittable: bool = False, **facts: Any
) -> tuple[bytes, Manifest]:
    """A plan of the graph as the stand-in writes it."""
    model, weights = exported(graph, refittable)
    flags = ["REFIT"] if refittable else []
    known = {
        "version": trt.__version__,
        "flags": flags,
        "profiles": [profile] if profile else [],
        "typed": False,
        "fp32": [],
    }
    known |= {"verbosity": "DETAILED"} | facts
    plan = MAGIC + json.dumps(known).encode() + b"\n" + model.SerializeToString()
    manifest = Manifest(
        sha256(plan), trt.__version__, GPU, "fp16" if "FP16" in known["flags"] else "fp32",
        tuple(i.name for i in model.graph.input), tuple(o.name for o in model.graph.output),
        weights=refitting.dtypes_of(weights) if refittable else {},
        weights_sha256=refitting.fingerprint(weights) if refittable else "",
    )  # fmt: skip
    return plan, manifest


def engine_of(trt: ModuleType, kind: type[nn.Module], **options: Any) -> TensorRTEngine:
    graph = traced(kind)[1]
    inputs = [torch.zeros(v.shape, dtype=v.dtype) for v in map(graphs.val, graph.graph.find_nodes(op="placeholder"))]
    return TensorRTEngine(*built(trt, graph), graph, inputs, **options)


# --- calling


def test_results_and_facts(trt: ModuleType) -> None:
    model, x = traced(Model)[0], torch.randn(4, 8)
    engine = engine_of(trt, Model)
    for value in (x, torch.randn(8, 4).T, torch.randn(9, 8)[1:5], torch.randn(4, 8, requires_grad=True)):
        (result,) = engine(value)
        torch.testing.assert_close(result, model(value).detach())
        assert not result.requires_grad
    first, second = engine(x)[0], engine(x)[0]
    assert first.data_ptr() != second.data_ptr()
    facts = engine.describe()
    assert facts.versions["tensorrt"] == trt.__version__
    assert facts.versions["driver"] == "580.1"
    assert facts.memory_bytes == len(engine.serialize()[PLAN])
    assert set(facts.precisions) == {"fp32"}
    assert any("1 execution context(s) so far" in note for note in facts.notes)


def test_int64_is_int32_where_the_version_has_no_int64(trt: ModuleType) -> None:
    ids, unused = torch.randint(0, 9, (3, 5)), torch.randn(2)
    engine = engine_of(trt, Wide)
    for result, expected in zip(engine(ids, unused), Wide()(ids, unused), strict=True):
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)
    told = any("int64 values run as int32" in note for note in engine.describe().notes)
    assert told is trt.__version__.startswith("8")


def test_shapes_in_the_profile_and_outside(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    graph = traced(Model, dynamic=True)[1]
    engine = TensorRTEngine(*built(trt, graph, {"x": [[1, 8], [4, 8], [16, 8]]}), graph, [x])
    for rows in (4, 1, 16, 4):
        value = torch.randn(rows, 8)
        torch.testing.assert_close(engine(value)[0], graph(value)[0].detach())
    with pytest.raises(InputError, match=r"does not cover x of shape \[17, 8\]"):
        engine(torch.randn(17, 8))
    with pytest.raises(InputError, match=r"x is empty \(\[0, 8\]\); TensorRT takes sizes from 1"):
        engine(torch.randn(0, 8))
    torch.testing.assert_close(engine(x)[0], graph(x)[0].detach())  # the context is as good as before


def test_an_input_elsewhere(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    engine = engine_of(trt, Model)
    with pytest.raises(InputError, match="input x is on meta, the engine on cpu; move it there"):
        engine(x.to("meta"))


def test_a_failing_library(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    engine = engine_of(trt, Model)
    engine(x)
    (context,) = engine._pool._idle
    monkeypatch.setattr(context, "_execute", lambda stream: False)
    with pytest.raises(LoweringError, match="TensorRT failed to run the engine"):
        engine(x)
    assert engine._pool._idle == [context]  # given back


# --- contexts


def test_one_context_serves_one_stream_and_another_stream_gets_its_own(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    engine = engine_of(trt, Model, contexts=2)
    for _ in range(3):
        engine(x)
    (context,) = engine._pool._idle
    assert (engine._pool.made, context.done.marked, context.done.waited) == (1, 3, 0)
    with on_stream(8):
        engine(x)  # the other is done: no second is needed
        assert (engine._pool.made, context.stream, context.done.waited) == (1, 8, 1)
        context.done.happened = False
    engine(x)
    assert engine._pool.made == 2
    for other in engine._pool._idle:
        other.done.happened = False
    with on_stream(9):  # no third: it waits for one of the two, on the GPU
        engine(x)
    assert engine._pool.made == 2
    assert sum(c.done.waited for c in engine._pool._idle) == 2


def test_threads_wait_for_a_context(trt: ModuleType) -> None:
    model = traced(Model)[0]
    engine = engine_of(trt, Model, contexts=2)

    def work(seed: int) -> None:
        with on_stream(seed):
            for _ in range(5):
                value = torch.randn(4, 8)
                torch.testing.assert_close(engine(value)[0], model(value).detach())

    in_threads(work, 6)
    assert 1 <= engine._pool.made <= 2


def test_no_memory_for_a_context(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    engine = engine_of(trt, Model)
    monkeypatch.setattr(engines.versions, "context_without_memory", lambda *_: None)
    with pytest.raises(LoweringError, match=r"no memory for another execution context .* lower TensorRT\(contexts="):
        engine(x)
    assert engine._pool.made == 0  # the next call may try again


def test_inside_the_callers_own_cuda_graph(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    engine = engine_of(trt, Model)
    STATE.capturing = True
    try:
        with pytest.raises(InputError, match="call it once with them"):
            engine(x)
        STATE.capturing = False
        expected = engine(x)[0]
        (context,) = engine._pool._idle
        STATE.capturing = True
        assert torch.equal(engine(x)[0], expected)
    finally:
        STATE.capturing = False
    assert context not in engine._pool._idle  # the graph's from now on
    assert context.done.marked == 1
    engine(x)
    assert context.done.marked == 1


# --- kept engines


def test_there_and_back(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    graph = traced(Model)[1]
    first = TensorRTEngine(*built(trt, graph), graph, [x])
    blobs = first.serialize()
    plan, manifest = Manifest.from_blobs(blobs)
    assert manifest == Manifest.from_blobs(first.serialize())[1]
    second = TensorRTEngine(plan, manifest, graph, [x])
    assert torch.equal(first(x)[0], second(x)[0])
    assert second.proof == first.proof is not None
    assert second.describe().precisions == first.describe().precisions


def test_what_a_kept_engine_may_be(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    graph = traced(Model)[1]
    plan, manifest = built(trt, graph)
    blobs = {PLAN: plan, MANIFEST: manifest.to_bytes()}
    for change, message in (
        ({PLAN: plan[:-1]}, "engine.plan is damaged: its SHA-256 is not the one in engine.json"),
        ({MANIFEST: b"{}"}, "engine.json is damaged: KeyError"),
        ({MANIFEST: b"\xff"}, "engine.json is damaged"),
        ({MANIFEST: b"[1]"}, "engine.json is damaged"),
        (
            {MANIFEST: manifest.to_bytes().replace(b'"format": 1', b'"format": 9')},
            "has format 9; this accelkit reads 1",
        ),
    ):
        with pytest.raises(LoweringError, match=message):
            Manifest.from_blobs(blobs | change)
    with pytest.raises(LoweringError, match=r"has no engine.json \(it has engine.plan\)"):
        Manifest.from_blobs({PLAN: plan})
    noise = b"not a plan"
    with pytest.raises(LoweringError, match=r"does not load the engine: 1: \[stdArchiveReader.cpp\]"):
        TensorRTEngine(noise, dataclasses.replace(manifest, sha256=sha256(noise)), graph, [x])
    foreign = {"gpu": "NVIDIA Other", "compute_capability": "8.0"}
    with pytest.raises(LoweringError, match=r"built for NVIDIA Other \(compute capability 8.0\); here is NVIDIA Test"):
        TensorRTEngine(plan, dataclasses.replace(manifest, device=foreign), graph, [x])
    with pytest.raises(LoweringError, match="1 inputs and 1 results, the graph 2 and 2"):
        TensorRTEngine(plan, manifest, traced(Wide)[1], [x])
    with pytest.raises(LoweringError, match="which its manifest does not name"):
        TensorRTEngine(plan, dataclasses.replace(manifest, inputs=("y",)), graph, [x])


def test_where_a_plan_fits() -> None:
    manifest = Manifest("", "10.3.0", GPU, "fp16", (), ())
    for version, why in (("10.3.0", None), ("10.4.0", "built for TensorRT 10.3.0; here is TensorRT 10.4.0")):
        if why is None:
            require_fit(manifest, version, GPU | {"driver": "590.1"})  # drivers are told, not compared
        else:
            with pytest.raises(LoweringError, match=why):
                require_fit(manifest, version, GPU)
    later = dataclasses.replace(manifest, version_compatible=True)
    require_fit(later, "10.16.1.11", GPU)
    for version in ("10.2.0", "11.0.0", "8.6.0", "unknown"):
        with pytest.raises(LoweringError, match=r"built for TensorRT 10\.3\.0 or later; here is"):
            require_fit(later, version, GPU)
    anywhere = dataclasses.replace(manifest, hardware_compatible="ampere_plus")
    require_fit(anywhere, "10.3.0", {"gpu": "NVIDIA A10", "compute_capability": "8.6"})
    for device, shown in (({"gpu": "Old", "compute_capability": "7.5"}, "here is Old"), ({}, "here is no GPU")):
        with pytest.raises(LoweringError, match=shown):
            require_fit(anywhere, "10.3.0", device)


# --- new weights


def with_weights_of(graph: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    new = copy.deepcopy(graph)
    new.load_state_dict(model.state_dict())
    return new


def test_an_engine_takes_the_graphs_weights(trt: ModuleType) -> None:
    x, (model, graph), other = torch.randn(4, 8), traced(Model), Model()
    new = with_weights_of(graph, other)
    plan, manifest = built(trt, graph, refittable=True)
    assert set(manifest.weights) == {"@first.weight", "@first.bias", "@second.weight", "@second.bias"}
    first = TensorRTEngine(plan, manifest, graph, [x])
    assert not any("not those" in note for note in first.describe().notes)
    again = TensorRTEngine(*Manifest.from_blobs(first.serialize()), new, [x])
    torch.testing.assert_close(again(x)[0], other(x).detach())
    torch.testing.assert_close(first(x)[0], model(x).detach())  # it shares nothing
    assert any("refittable: the weights are not those that it was built with" in n for n in again.describe().notes)
    back = TensorRTEngine(*Manifest.from_blobs(again.serialize()), graph, [x])
    torch.testing.assert_close(back(x)[0], model(x).detach())


def test_weights_in_another_dtype_are_converted() -> None:
    graph = traced(Model)[1]
    found = refitting.weights_of(graph, {"@first.weight": "float16"})
    assert found["@first.weight"].dtype is torch.float16
    with pytest.raises(LoweringError, match=r"has the weight nose\.weight, which the graph does not have"):
        refitting.weights_of(graph, {"@nose.weight": "float32"})


def test_weights_that_an_engine_does_not_take(trt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8)
    graph = traced(Model)[1]
    new = with_weights_of(graph, Model())
    plan, manifest = built(trt, graph, refittable=True)
    kind = trt.Refitter
    names = list(manifest.weights)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "get_all_weights", lambda self: names[1:])
        with pytest.raises(LoweringError, match=r"no weights first\.weight of their own any more"):
            TensorRTEngine(plan, manifest, new, [x])
    with monkeypatch.context() as patch:
        patch.setattr(kind, "get_missing_weights", lambda self: ["tmp_weight_8"])
        with pytest.raises(LoweringError, match="also needs tmp_weight_8, which TensorRT made when it parsed"):
            TensorRTEngine(plan, manifest, new, [x])
    with monkeypatch.context() as patch:
        patch.setattr(kind, "set_named_weights", lambda self, *_: False)
        with pytest.raises(LoweringError, match=r"does not take first\.weight of shape \[40, 8\] and torch.float32"):
            TensorRTEngine(plan, manifest, new, [x])
    with monkeypatch.context() as patch:
        patch.setattr(engines.refitting.versions, "refit", lambda *_: False)
        with pytest.raises(LoweringError, match="failed to refit the engine"):
            TensorRTEngine(plan, manifest, new, [x])


# --- precision


def test_a_precision_that_was_not_got_is_an_error(trt: ModuleType) -> None:
    x = torch.randn(4, 8)
    graph = traced(Model)[1]
    facts = {"flags": ["FP16"], "typed": not trt.__version__.startswith("8")}
    plan, manifest = built(trt, graph, **facts)
    if trt.__version__.startswith("8"):  # the flag alone lowers the layers
        engine = TensorRTEngine(plan, manifest, graph, [x])
        assert set(engine.describe().precisions) == {"fp16"}
        trt._faults["stays_fp32"] = True
    with pytest.raises(LoweringError, match="fp16 was asked for, and TensorRT built 2 of 2 matrix-product layers"):
        TensorRTEngine(plan, manifest, graph, [x])


# --- the whole way: graph -> ONNX -> a build in a process of its own -> engine -> blobs -> engine with other weights


def test_from_a_graph_to_an_engine_and_back(trt: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = next(v for v in fake_tensorrt.VERSIONS if trt.__version__.startswith(v))
    fake_tensorrt.install(tmp_path / "site", monkeypatch, version)
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(backend, "_device", lambda inputs: 0)
    said: list[str] = []
    context = CompileContext(as_precision("fp32"), progress=said.append)
    target, (model, graph), other = (
        TensorRT(refittable=True, timing_cache=False, cuda_graph=False),
        traced(Model),
        Model(),
    )
    x = torch.randn(4, 8)
    engine = target.compile(graph, [x], context)
    torch.testing.assert_close(engine(x)[0], model(x).detach())
    assert isinstance(engine, TensorRTEngine)
    assert engine.manifest.precision == "fp32"
    assert any(words.startswith("TensorRT building") for words in said), said
    assert any(note.startswith("built in ") for note in engine.describe().notes)
    again = target.load(engine.serialize(), with_weights_of(graph, other), [x], context)
    torch.testing.assert_close(again(x)[0], other(x).detach())
