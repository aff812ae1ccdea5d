"""ONNX Runtime: right results for all kinds of graphs, reasons for what it refuses, live weights, no copies."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelkit import Dim
from accelkit.backend_api import CompileContext, Engine
from accelkit.backends.onnxruntime import OnnxRuntime
from accelkit.errors import BackendUnavailableError, InputError, LoweringError
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


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


def compiled(model: nn.Module, *inputs: torch.Tensor, dynamic_shapes: Any = None, **options: Any) -> tuple[Engine, Any]:
    graph = trace(model, *inputs, dynamic_shapes=dynamic_shapes)
    return OnnxRuntime(**options).compile(graph, inputs, CompileContext()), graph


def check(engine: Engine, graph: Any, *inputs: torch.Tensor) -> None:
    results = engine(*inputs)
    with torch.no_grad():
        expected = graph(*inputs)
    assert len(results) == len(expected)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert result.device == wanted.device
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 3)), (torch.randn(2, 5, 8),)),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()), (torch.randn(1, 3, 9, 9),)),
        (nn.Embedding(300, 8), (torch.randint(0, 300, (2, 7)),)),
        (One(lambda x: (x * 3 // 2, x > 1, ~x, x.sum())), (torch.randint(0, 9, (3, 4)),)),
        (One(lambda x: (x.half() * 2, x.double() + 1, x.int(), x > 0)), (torch.randn(4, 3),)),
        (One(lambda x: x * 2), (torch.randn(4, 3).half(),)),
        (One(lambda x: (x @ x.T).softmax(-1)), (torch.randn(4, 3).double(),)),
        (One(lambda x: x & ~x.roll(1)), (torch.rand(7) > 0.5,)),
        (One(lambda x: (x, x + 1, x.view(-1))), (torch.randn(2, 3),)),
        (Two(lambda x, y: y * 2), (torch.randn(2), torch.randn(2))),
        (Nothing(), ()),
        (One(torch.nonzero), (torch.randint(0, 2, (4, 3)),)),
        (One(lambda x: x.mean()), (torch.randn(()),)),
        (One(lambda x: x.sum(0)), (torch.randn(0, 3),)),
    ],
    ids=[
        "mlp", "conv", "embedding", "int", "casts", "half", "double", "bool", "passed through",
        "unused input", "no input",
        "data-dependent", "scalars", "empty",
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


def test_empty_batch_is_refused_where_sizes_vary() -> None:
    engine, _ = compiled(nn.Linear(8, 4), torch.randn(2, 8), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(InputError, match=r"input input_1 is empty \(\[0, 8\]\)"):
        engine(torch.randn(0, 8))


def test_inputs_of_any_layout_and_with_gradients() -> None:
    engine, graph = compiled(nn.Linear(8, 40), torch.randn(6, 8))
    check(engine, graph, torch.randn(8, 6).T)
    check(engine, graph, torch.randn(12, 16)[::2, ::2])
    check(engine, graph, torch.randn(1, 8).expand(6, 8))
    with_gradient = torch.randn(6, 8, requires_grad=True)
    assert not engine(with_gradient)[0].requires_grad


def test_results_are_the_callers_own() -> None:
    x = torch.randn(3, 4)
    engine, _ = compiled(One(lambda x: (x, x.view(-1), x + 1)), x)
    first, second = engine(x), engine(x)
    kept = [r.clone() for r in second]
    pointers = {r.data_ptr() for r in [*first, *second, x]}
    assert len(pointers) == 7
    for result in first:
        result.fill_(7.0)
    assert all(torch.equal(r, k) for r, k in zip(second, kept, strict=True))


def test_results_outlive_the_engine() -> None:
    x = torch.randn(300, 400)
    engine, _ = compiled(One(lambda x: x * 2), x)
    (result,) = engine(x)
    del engine
    assert torch.equal(result, x * 2)


def test_threads_share_an_engine() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    engine, graph = compiled(model, torch.randn(4, 32), threads=1)
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


def test_stored_model_serves_other_weights() -> None:
    x = torch.randn(2, 5, 32)
    first, second = (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval() for _ in range(2))
    for layer in (0, 2):  # small tensors are part of the model
        second[layer].bias = first[layer].bias
    engine, graph = compiled(first, x)
    blobs = engine.serialize()
    assert set(blobs) == {"model.onnx"}
    weights = sum(p.nbytes for p in first.parameters())
    assert len(blobs["model.onnx"]) < weights
    same = OnnxRuntime().load(blobs, graph, [x], CompileContext())
    assert torch.equal(same(x)[0], engine(x)[0])
    assert same.serialize() == blobs
    other_graph = trace(second, x)
    check(OnnxRuntime().load(blobs, other_graph, [x], CompileContext()), other_graph, x)


def test_the_engine_has_its_own_weights() -> None:
    model, x = nn.Linear(32, 64), torch.randn(2, 32)
    engine, _ = compiled(model, x)
    before = engine(x)[0].clone()
    with torch.no_grad():
        model.weight.mul_(2)
    assert torch.equal(engine(x)[0], before)


def test_non_contiguous_and_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model[0].weight = nn.Parameter(torch.randn(32, 32).T)
    model[1].weight = model[0].weight
    engine, graph = compiled(model, torch.randn(2, 32))
    check(engine, graph, torch.randn(2, 32))


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
        OnnxRuntime().load(blobs, graph, [x], CompileContext())


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (One(lambda x: F.dropout(x, training=True)), (torch.randn(3),), "random"),
        (One(lambda x: x.bfloat16() * 2), (torch.randn(3),), "no bfloat16 kernels"),
        (One(lambda x: torch.fft.fft(x).abs()), (torch.randn(8),), "no complex kernels"),
        (One(lambda x: x.to(torch.float8_e4m3fn)), (torch.randn(8),), "float8_e4m3fn is not supported"),
    ],
    ids=["random", "bfloat16", "complex", "float8"],
)  # fmt: skip
def test_refusals(model: nn.Module, inputs: tuple[torch.Tensor, ...], reason: str) -> None:
    graph = trace(model, *inputs)
    reasons = [OnnxRuntime().unsupported(n) for n in graph.graph.nodes if n.op == "call_function"]
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
    reasons = [OnnxRuntime().unsupported(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert any(r is not None and "writes into its argument" in r for r in reasons)


def test_what_the_runtime_lacks_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()).double()
    with pytest.raises(LoweringError, match="NOT_IMPLEMENTED") as caught:
        compiled(model, torch.randn(1, 3, 9).double())
    assert list(caught.value.nodes) == ["conv1d"]
    assert "Could not find an implementation" in caught.value.nodes["conv1d"]


def test_options() -> None:
    for options, message in (
        ({"provider": "abacus"}, "provider='abacus'"),
        ({"optimization": "most"}, "known are none, basic, extended, all"),
        ({"threads": 0}, "threads=0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            OnnxRuntime(**options)  # type: ignore[arg-type]
    x = torch.randn(2, 8)
    engine, graph = compiled(
        nn.Linear(8, 40), x, threads=1, inter_op_threads=2, optimization="basic", opset=20,
        session_config=(("session.disable_prepacking", "1"),),
    )  # fmt: skip
    check(engine, graph, x)
    assert "1 thread(s)" in engine.describe().notes[0]


def test_facts() -> None:
    model = nn.Linear(32, 64)
    engine, _ = compiled(model, torch.randn(2, 3, 32))
    facts = engine.describe()
    assert facts.backend == "onnxruntime"
    assert {"torch", "onnx", "onnxscript", "onnxruntime"} <= facts.versions.keys()
    assert facts.precisions == {"fp32": 2}
    assert facts.memory_bytes == sum(p.nbytes for p in model.parameters())


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    assert OnnxRuntime().unavailable() == 'onnxruntime not installed; pip install "accelkit[cpu]"'
    graph = trace(nn.ReLU(), torch.randn(2))
    with pytest.raises(BackendUnavailableError, match=r'pip install "accelkit\[cpu\]"'):
        OnnxRuntime().compile(graph, [torch.randn(2)], CompileContext())


def test_transposed_weights_are_multiplied_as_they_are() -> None:
    engine, _ = compiled(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(2, 3, 32))
    model = onnx.ModelProto.FromString(engine.serialize()["model.onnx"])
    operators = [n.op_type for n in model.graph.node]
    assert operators.count("FusedMatMul") == 2
    assert "Transpose" not in operators


def test_padding_with_zeros_before_a_maximum_stays_zeros() -> None:
    # ONNX Runtime's Pad_Fusion turns it into the pooling's own padding, which is minus infinity
    x = -1 - torch.rand(1, 3, 8, 8)
    model = One(lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2))
    engine, _ = compiled(model, x)
    assert torch.equal(engine(x)[0], model(x))
