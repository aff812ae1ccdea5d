"""OpenVINO: right results for all kinds of graphs, reasons for what it refuses, live weights, memory of its own."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accelkit
from accelkit import Dim
from accelkit.backend_api import CompileContext, Engine
from accelkit.backends.openvino import OpenVINO
from accelkit.errors import BackendUnavailableError, InputError, LoweringError
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


class One(Of):
    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Two(Of):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y)


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 20))

    def forward(self) -> torch.Tensor:
        return self.weight * 2


class Tokens(nn.Module):
    """A table, a norm, biases and products: weights that OpenVINO reads in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(300, 64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(F.relu(self.up(self.table(x)))))  # type: ignore[no-any-return]


def compiled(model: nn.Module, *inputs: torch.Tensor, dynamic_shapes: Any = None, **options: Any) -> tuple[Engine, Any]:
    graph = trace(model, *inputs, dynamic_shapes=dynamic_shapes)
    return OpenVINO(**options).compile(graph, inputs, CompileContext()), graph


def check(engine: Engine, graph: Any, *inputs: torch.Tensor, **tolerance: float) -> None:
    kept = [x.clone() for x in inputs]
    results = engine(*inputs)
    with torch.no_grad():
        expected = graph(*inputs)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        torch.testing.assert_close(result, wanted, **tolerance)
    assert all(torch.equal(x, k) for x, k in zip(inputs, kept, strict=True))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 3)), (torch.randn(2, 5, 8),)),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()), (torch.randn(1, 3, 9, 9),)),
        (nn.Conv1d(4, 6, 3), (torch.randn(2, 4, 9),)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (torch.randn(1, 4, 5, 5),)),
        (nn.Embedding(300, 8), (torch.randint(0, 300, (2, 7)),)),
        (One(lambda x: (x * 3 // 2, x > 1, ~x, x.sum())), (torch.randint(0, 9, (3, 4)),)),
        (One(lambda x: (x.half() * 2, x.int(), x > 0, x.bfloat16() + 1)), (torch.randn(4, 3),)),
        (One(lambda x: x * 2), (torch.randn(4, 3).half(),)),
        (One(lambda x: x + 1), (torch.randn(4, 3).bfloat16(),)),
        (One(lambda x: x.float() / 255), (torch.randint(0, 256, (4, 3), dtype=torch.uint8),)),
        (One(lambda x: x & ~x.roll(1)), (torch.rand(7) > 0.5,)),
        (One(lambda x: (x, x + 1, x.view(-1))), (torch.randn(2, 3),)),
        (Two(lambda x, y: y * 2), (torch.randn(2), torch.randn(2))),
        (Nothing(), ()),
        (One(torch.nonzero), (torch.randint(0, 2, (4, 3)),)),
        (One(lambda x: x.mean()), (torch.randn(()),)),
        (One(lambda x: x.sum(0)), (torch.randn(0, 3),)),
    ],
    ids=[
        "mlp", "conv", "conv1d", "transposed conv", "embedding", "int", "casts", "half", "bfloat16", "bytes", "bool",
        "passed through", "unused input", "no input", "data-dependent", "scalars", "empty",
    ],
)  # fmt: skip
def test_results(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    engine, graph = compiled(model.eval(), *inputs)
    check(engine, graph, *inputs)


def test_dynamic_sizes() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    engine, graph = compiled(layer, x, dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},))
    for batch, length in ((2, 5), (1, 1), (1, 9), (7, 3), (4, 64)):
        check(engine, graph, torch.randn(batch, length, 16))


def test_results_of_sizes_that_only_a_run_tells_are_the_callers_own() -> None:
    engine, _ = compiled(One(torch.nonzero), torch.ones(2, 3))
    few, many = engine(torch.eye(2, 3))[0], engine(torch.ones(2, 3))[0]
    del engine
    gc.collect()
    assert few.tolist() == [[0, 0], [1, 1]]
    assert many.shape == (6, 2)


def test_empty_batch_is_refused_where_sizes_vary() -> None:
    engine, _ = compiled(nn.Linear(8, 4), torch.randn(2, 8), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(InputError, match=r"input input_1 is empty \(\[0, 8\]\)"):
        engine(torch.randn(0, 8))


def test_inputs_of_any_layout_and_with_gradients() -> None:
    engine, graph = compiled(nn.Linear(8, 40), torch.randn(6, 8))
    check(engine, graph, torch.randn(8, 6).T)
    check(engine, graph, torch.randn(12, 16)[::2, ::2])
    check(engine, graph, torch.randn(1, 8).expand(6, 8))
    check(engine, graph, torch.randn(49)[1:].view(6, 8))  # not aligned
    with_gradient = torch.randn(6, 8, requires_grad=True)
    assert not engine(with_gradient)[0].requires_grad


def test_results_are_the_callers_own() -> None:
    x = torch.randn(3, 4)
    engine, _ = compiled(One(lambda x: (x, x.view(-1), x + 1)), x)
    first, second = engine(x), engine(x)
    kept = [r.clone() for r in second]
    assert len({r.data_ptr() for r in [*first, *second, x]}) == 7
    for result in first:
        result.fill_(7.0)
    assert all(torch.equal(r, k) for r, k in zip(second, kept, strict=True))
    del engine
    assert all(torch.equal(r, k) for r, k in zip(second, kept, strict=True))


@pytest.mark.parametrize("streams", [1, 2])
def test_threads_share_an_engine(streams: int) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    engine, graph = compiled(model, torch.randn(4, 32), threads=2, streams=streams)
    failures: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            x = torch.randn(4, 32, generator=generator)
            with torch.no_grad():
                if not torch.allclose(engine(x)[0], graph(x)[0], atol=1e-5):
                    failures.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- weights


def test_stored_model_serves_other_weights() -> None:
    x = torch.randn(2, 5, 32)
    first, second = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval() for _ in range(2))
    for layer in (0, 2):  # small tensors are part of the model
        second[layer].bias = first[layer].bias
    engine, graph = compiled(first, x)
    blobs = engine.serialize()
    assert set(blobs) == {"model.onnx"}
    assert len(blobs["model.onnx"]) < sum(p.nbytes for p in first.parameters())
    same = OpenVINO().load(blobs, graph, [x], CompileContext())
    assert torch.equal(same(x)[0], engine(x)[0])
    assert same.serialize() == blobs
    other_graph = trace(second, x)
    check(OpenVINO().load(blobs, other_graph, [x], CompileContext()), other_graph, x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_engine_has_its_own_weights(dynamic: bool) -> None:
    torch.manual_seed(2)
    # the second half, of few columns, becomes one generated kernel
    model = nn.Sequential(Tokens(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64)).eval()
    x = torch.randint(0, 300, (2, 7))
    engine, _ = compiled(model, x, dynamic_shapes=({0: Dim("batch")},) if dynamic else None)
    before = engine(x)[0].clone()
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(engine(x)[0], before), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_weights_live_as_long_as_the_engine() -> None:
    model, x = Tokens().eval(), torch.randint(0, 300, (2, 7))
    with torch.no_grad():
        expected = model(torch.cat([x, x]))
    engine, graph = compiled(model, x, dynamic_shapes=({0: Dim("batch")},))
    del model, graph
    gc.collect()
    rubbish = [torch.full((512, 64), 1e9) for _ in range(20)]  # takes the memory, where it was given back
    torch.testing.assert_close(engine(torch.cat([x, x]))[0], expected)
    assert len(rubbish) == 20


def test_non_contiguous_and_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model[0].weight = nn.Parameter(torch.randn(32, 32).T)
    model[1].weight = model[0].weight
    engine, graph = compiled(model, torch.randn(2, 32))
    check(engine, graph, torch.randn(2, 32))


def test_refit_compiles_nothing() -> None:
    first, second = Tokens().eval(), Tokens().eval()
    x = torch.randint(0, 300, (2, 7))
    fast = accelkit.optimize(first, x, target="openvino", cache=False, progress=False)
    with torch.no_grad():
        expected = second(x)
    fast.refit(second.state_dict())
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other graph"])
def test_stored_models_that_do_not_fit(damage: str) -> None:
    x = torch.randn(2, 32)
    engine, graph = compiled(nn.Linear(32, 64), x)
    blobs = engine.serialize()
    if damage == "missing":
        blobs, reason = {"plan": b""}, r"has no model.onnx \(it has plan\)"
    elif damage == "truncated":
        blobs, reason = {"model.onnx": blobs["model.onnx"][:-40]}, "is damaged|refuses|has inputs"
    else:
        graph, reason = trace(Two(lambda a, b: a + b), x, x), r"has inputs \['input_1'\], not \['x', 'y'\]"
    with pytest.raises(LoweringError, match=reason):
        OpenVINO().load(blobs, graph, [x], CompileContext())


# --- refusals, options


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (One(lambda x: F.dropout(x, training=True)), (torch.randn(3),), "random"),
        (One(lambda x: x.double() * 2), (torch.randn(3),), "computes float64 in float32"),
        (One(lambda x: torch.fft.fft(x).abs()), (torch.randn(8),), "no complex kernels"),
        (One(lambda x: x.to(torch.float8_e4m3fn)), (torch.randn(8),), "float8_e4m3fn is not supported"),
        (One(lambda x: x + x), (torch.ones(3, dtype=torch.uint8),), "wraps around"),
        (One(lambda x: x * (2**40)), (torch.arange(3),), "int64 beyond 32 bits"),
    ],
    ids=["random", "float64", "complex", "float8", "wrapping bytes", "large integers"],
)  # fmt: skip
def test_refusals(model: nn.Module, inputs: tuple[torch.Tensor, ...], reason: str) -> None:
    graph = trace(model, *inputs)
    reasons = [OpenVINO().unsupported(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert any(r is not None and reason in r for r in reasons), reasons


def test_writes_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x + self.count

    graph = trace(Counting(), torch.randn(3))
    reasons = [OpenVINO().unsupported(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert any(r is not None and "writes into its argument" in r for r in reasons)


def test_what_openvino_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.openvino import backend as module

    read = module.read_model

    def without_erf(model: Any, weights: Any) -> Any:
        if any(node.op_type == "Erf" for node in model.graph.node):
            raise LoweringError("OpenVINO refuses the model: no Erf today")
        return read(model, weights)

    monkeypatch.setattr(module, "read_model", without_erf)
    with pytest.raises(LoweringError, match="no Erf today") as caught:
        compiled(One(lambda x: torch.erf(x) + 1), torch.randn(4))
    assert caught.value.nodes == {"erf": "OpenVINO refuses the model: no Erf today"}


def test_without_generated_kernels_where_those_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.openvino import model as module

    real = module.core()

    class Failing:
        """An ov.Core whose generator fails."""

        def compile_model(self, model: Any, device: str, properties: dict[str, Any]) -> Any:
            if properties.get("SNIPPETS_MODE") != "DISABLE":
                raise RuntimeError("Exception from src/x.cpp:1:\nAll consumers are expected to have the same loop IDs")
            return real.compile_model(model, device, properties)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(module, "core", Failing)
    engine, graph = compiled(One(lambda x: x.exp() * 2), torch.randn(4))
    check(engine, graph, torch.randn(4))
    note = (
        "without OpenVINO's generated kernels (SNIPPETS_MODE=DISABLE), because with them: RuntimeError: All consumers"
    )
    assert any(n.startswith(note) for n in engine.describe().notes)
    with pytest.raises(LoweringError, match="OpenVINO cannot compile the model: RuntimeError: All consumers"):
        compiled(One(lambda x: x.exp() * 2), torch.randn(4), properties=(("SNIPPETS_MODE", "ENABLE"),))


def test_options() -> None:
    for options, message in (
        ({"performance": "most"}, "known are latency, throughput"),
        ({"inference_precision": "int4"}, "known are fp32, bf16"),
        ({"threads": 0}, "threads=0"),
        ({"streams": 0}, "streams=0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            OpenVINO(**options)  # type: ignore[arg-type]
    x = torch.randn(2, 8)
    engine, graph = compiled(
        nn.Linear(8, 40), x, threads=2, streams=2, performance="throughput", opset=18,
        properties=(("ENABLE_CPU_PINNING", False),),
    )  # fmt: skip
    check(engine, graph, x)
    assert "2 thread(s), 2 stream(s)" in engine.describe().notes[0]
    with pytest.raises(LoweringError, match="OpenVINO cannot compile the model"):
        compiled(nn.Linear(8, 40), x, properties=(("NO_SUCH_PROPERTY", 1),))


def test_facts() -> None:
    model = nn.Linear(32, 64)
    engine, _ = compiled(model, torch.randn(2, 3, 32))
    facts = engine.describe()
    assert facts.backend == "openvino"
    assert {"torch", "onnx", "onnxscript", "openvino"} <= facts.versions.keys()
    assert facts.precisions == {"fp32": 1}
    assert facts.memory_bytes == sum(p.nbytes for p in model.parameters())


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    assert OpenVINO().unavailable() == 'openvino not installed; pip install "accelkit[openvino]"'
    graph = trace(nn.ReLU(), torch.randn(2))
    with pytest.raises(BackendUnavailableError, match=r'pip install "accelkit\[openvino\]"'):
        OpenVINO().compile(graph, [torch.randn(2)], CompileContext())


def test_no_cpu_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        available_devices = ("GPU",)

    monkeypatch.setattr("accelkit.backends.openvino.backend.core", Core)
    assert "no CPU plugin (it has GPU)" in (OpenVINO().unavailable() or "")
