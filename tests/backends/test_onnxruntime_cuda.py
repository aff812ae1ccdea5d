"""ONNX Runtime's CUDA provider: right results in each precision, on any stream, in a CUDA graph, without the host waiting."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import accelkit
from accelkit import Dim
from accelkit.backend_api import CompileContext
from accelkit.backends.onnxruntime import OnnxRuntime
from accelkit.backends.onnxruntime.cuda import output_shapes, why_not_captured
from accelkit.errors import InputError, LoweringError
from accelkit.precision import as_precision
from accelkit.testing import float64_reference, relative_error, trace

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


on_gpu = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA provider"
)


class Shapes(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return x.flatten(0, 1) * 2, y + 1, x.new_zeros(3) + 1, torch.nonzero(y), torch.cat([x, x], 1)


def test_shapes_of_the_outputs() -> None:
    shapes = ({0: Dim("batch"), 1: Dim("length")}, {0: Dim("length")})
    graph = trace(Shapes(), torch.randn(2, 5, 4), torch.randn(5), dynamic_shapes=shapes)
    of = output_shapes(graph)
    for batch, length in ((2, 5), (1, 1), (3, 7)):
        expected = [(batch * length, 4), (length,), (3,), None, (batch, 2 * length, 4)]
        assert of([(batch, length, 4), (length,)]) == expected


def test_what_cannot_be_a_cuda_graph() -> None:
    inputs = torch.randn(2, 4), torch.randn(4)
    assert why_not_captured(trace(Shapes(), *inputs), inputs) == "an input or a result is in the CPU's memory"


def test_a_model_that_is_not_on_the_gpu() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(LoweringError, match=r"provider='cuda'\) got a graph without a tensor on CUDA: move the model"):
        OnnxRuntime(provider="cuda").compile(trace(nn.Linear(8, 4), x), [x], CompileContext())


def test_options() -> None:
    with pytest.raises(InputError, match=r"dialect='plain'\): known are standard, com.microsoft"):
        OnnxRuntime(dialect="plain")
    with pytest.raises(InputError, match="known are auto, cpu, cuda"):
        OnnxRuntime(provider="gpu")
    assert OnnxRuntime.precisions_on("cpu") == ("fp32", "int8")
    assert {"fp32", "tf32", "bf16", "fp16"} <= set(OnnxRuntime.precisions_on("cuda"))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it has the provider")
def test_a_build_without_cuda_names_the_package() -> None:
    reason = OnnxRuntime(provider="cuda").unavailable()
    assert reason is not None
    assert "has no CUDAExecutionProvider" in reason
    assert 'pip install "accelkit[gpu]"' in reason


# --- on a GPU


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.layer(x, src_key_padding_mask=padding)


def example(batch: int = 2, length: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, length // 2 :] = True
    return torch.randn(batch, length, 64).cuda(), padding.cuda()


def error(results: Any, model: nn.Module, *inputs: torch.Tensor) -> float:
    (exact,) = float64_reference(model, *inputs)
    return relative_error(results, exact)


ALLOWED = {"fp32": 1e-5, "tf32": 3e-3, "fp16": 3e-3, "bf16": 2e-2}


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dialect", ["com.microsoft", "standard"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_precisions(precision: str, dialect: str) -> None:
    model, inputs = Block().eval().cuda(), example()
    target = OnnxRuntime(dialect=dialect)
    fast = accelkit.optimize(model, inputs, target=target, precision=precision, cache=False, progress=False)
    assert "CUDAExecutionProvider" in str(fast.report())
    result = fast(*inputs)
    assert result.is_cuda
    assert error(result, model, *inputs) <= ALLOWED[precision]


def engine_of(model: nn.Module, *inputs: torch.Tensor, dynamic_shapes: Any = None, **options: Any) -> tuple[Any, Any]:
    graph = trace(model, *inputs, dynamic_shapes=dynamic_shapes)
    context = CompileContext(as_precision("fp32"))
    return OnnxRuntime(**options).compile(graph, inputs, context), graph


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_streams_threads_and_own_results(cuda_graph: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval().cuda()
    engine, graph = engine_of(model, torch.randn(32, 64).cuda(), cuda_graph=cuda_graph)
    if cuda_graph:
        assert "the example's shapes run as one CUDA graph" in engine.describe().notes
    failures: list[str] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream() if seed % 2 else torch.cuda.default_stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(20):
                x = torch.randn(32, 64, device="cuda")
                first, second = engine(x)[0], engine(x * 2)[0]
                if not torch.allclose(first, graph(x)[0], atol=1e-3) or first.data_ptr() == second.data_ptr():
                    failures.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@on_gpu
@pytest.mark.gpu
def test_dynamic_and_data_dependent_sizes_beside_a_graph() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x @ x.T, torch.nonzero(x > 0), (x > 0)[:, :2]

    shapes = ({0: Dim("rows")},)
    engine, graph = engine_of(Model(), torch.randn(4, 8).cuda(), dynamic_shapes=shapes, cuda_graph=True)
    assert any("no CUDA graph: the size of a result depends on the data" in note for note in engine.describe().notes)
    for rows in (4, 2, 9):
        x = torch.randn(rows, 8).cuda()
        for result, expected in zip(engine(x), graph(x), strict=True):
            assert result.dtype == expected.dtype
            torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-3)
    engine, graph = engine_of(nn.Linear(8, 4).cuda(), torch.randn(4, 8).cuda(), dynamic_shapes=shapes, cuda_graph=True)
    for rows in (4, 2, 4):  # captured, not captured, captured
        x = torch.randn(8, rows).cuda().T
        torch.testing.assert_close(engine(x)[0], graph(x)[0], atol=1e-3, rtol=1e-3)


@on_gpu
@pytest.mark.gpu
def test_the_host_does_not_wait() -> None:
    engine, _ = engine_of(nn.Linear(64, 64).cuda(), torch.randn(32, 64).cuda())
    x, blocked = torch.randn(32, 64).cuda(), torch.cuda.Event()
    engine(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    blocked.record()
    engine(x)
    assert not blocked.query()
    torch.cuda.synchronize()


@on_gpu
@pytest.mark.gpu
def test_a_cpu_provider_leaves_gpu_tensors_to_pytorch() -> None:
    x = torch.randn(2, 8).cuda()
    graph = trace(nn.Linear(8, 4).cuda(), x)
    reasons = [OnnxRuntime(provider="cpu").unsupported(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert reasons == ["computes on cuda; OnnxRuntime(provider='cpu') does not"]
