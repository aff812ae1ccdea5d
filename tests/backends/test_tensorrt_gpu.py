"""TensorRT on a GPU, end to end: right results in each precision and what proves it, streams, threads, shapes, kept engines,
new weights, and what goes wrong.

Small models and quick builds; a build takes seconds all the same, so those that can be are shared.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accelkit
from accelkit import Dim, InputError, LoweringError
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT, library, refitting
from accelkit.backends.tensorrt.engine import TensorRTEngine
from accelkit.backends.tensorrt.manifest import MANIFEST, PLAN, Manifest, sha256
from accelkit.backends.tensorrt.proof import Proof
from accelkit.precision import as_precision
from accelkit.testing import float64_reference, relative_error, trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tensorrt,
    pytest.mark.skipif(library.missing() is not None, reason=str(library.missing())),
    pytest.mark.filterwarnings("ignore:.*slower"),
]
QUICK = TensorRT(optimization_level=1, cuda_graph=False)
ALLOWED = {"fp32": 1e-5, "tf32": 3e-3, "fp16": 3e-3, "bf16": 2e-2}


class Block(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, activation="gelu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Network(nn.Module):
    """Layers of all kinds: embedding, convolution, products, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.convolution = nn.Conv1d(32, 64, 3, padding=1)
        self.out = nn.Linear(64, 7)

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = torch.relu(self.convolution(self.embedding(ids).transpose(1, 2))).transpose(1, 2)
        return self.out(hidden).softmax(-1), ids + 1


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval().cuda()


def optimize(model: nn.Module, example: Any, **options: Any) -> accelkit.CompiledModel:
    return accelkit.optimize(model, example, **({"target": QUICK, "cache": False, "progress": False} | options))


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    (result,) = float64_reference(model, x)
    return result


def engine_of(
    model: nn.Module, *inputs: torch.Tensor, precision: str = "fp32", dynamic_shapes: Any = None, **options: Any
) -> tuple[TensorRTEngine, Any]:
    graph = trace(model, *inputs, dynamic_shapes=dynamic_shapes)
    engine = dataclasses.replace(QUICK, **options).compile(graph, inputs, CompileContext(as_precision(precision)))
    assert isinstance(engine, TensorRTEngine)
    return engine, graph


def pieces(fast: accelkit.CompiledModel) -> list[Any]:
    return [piece for variant in fast.report().variants for piece in variant.pieces]


# --- precision


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_precisions_and_their_proof(precision: str) -> None:
    if precision not in TensorRT.precisions_on("cuda"):
        pytest.skip("this TensorRT has no bf16")
    model, x = Block().eval().cuda(), torch.randn(4, 32, 128).cuda()
    fast = optimize(model, x, precision=precision)
    assert relative_error(fast(x), exact(model, x)) <= ALLOWED[precision]
    facts = pieces(fast)[0].facts
    assert facts.precisions, facts.notes
    others = {"fp16", "bf16", "tf32"} - {precision}
    assert not others & set(facts.precisions), facts.precisions
    text = str(fast.report())
    assert "% of the time" in text, text
    assert facts.versions["tensorrt"] == str(library.loaded().__version__)


def test_fp32_products_are_no_tf32() -> None:
    x = torch.randn(64, 512).cuda()
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).eval().cuda()
    engine, _ = engine_of(model, x)
    truth = exact(model, x)
    assert relative_error(engine(x)[0], truth) <= 1e-6  # tf32 gives about 3e-4
    assert engine.proof is not None
    assert "tf32" not in engine.proof.precisions()


def test_a_region_that_is_not_told_is_not_claimed() -> None:
    model, x = Block().eval().cuda().half(), torch.randn(4, 32, 128).cuda().half()
    engine, _ = engine_of(model, x, precision="fp16")
    proof = engine.proof
    assert proof is not None
    assert proof.layers
    for layer in proof.layers:
        assert layer.kind != "region" or layer.precision in (None, "fp16")
    kept = Manifest.from_blobs(engine.serialize())[1]
    assert Proof.from_json(kept.proof) == proof
    assert engine.proof == proof


# --- running


@pytest.fixture(scope="module")
def small() -> tuple[TensorRTEngine, Any]:
    return engine_of(perceptron(), torch.randn(32, 64).cuda())


def test_inputs_as_they_come(small: Any) -> None:
    engine, graph = small
    for x in (
        torch.randn(32, 64).cuda(),
        torch.randn(64, 32).cuda().T,
        torch.randn(40, 64).cuda()[5:37],
        torch.randn(32 * 64 + 1).cuda()[1:].view(32, 64),  # contiguous, at an address that TensorRT does not take
        torch.randn(1, 64).cuda().expand(32, 64),
        torch.randn(32, 64).cuda().requires_grad_(),
    ):
        torch.testing.assert_close(engine(x)[0], graph(x)[0].detach(), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="is on cpu, the engine on cuda:0"):
        engine(torch.randn(32, 64))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_streams_threads_and_own_results(cuda_graph: bool) -> None:
    model = perceptron()
    engine, _ = engine_of(model, torch.randn(32, 64).cuda(), cuda_graph=cuda_graph, contexts=3)
    failures: list[str] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream() if seed % 2 else torch.cuda.default_stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(30):
                x = torch.randn(32, 64, device="cuda")
                first, second = engine(x)[0], engine(x * 2)[0]
                if not torch.allclose(first, model(x), atol=1e-3) or not torch.allclose(
                    second, model(x * 2), atol=1e-3
                ):
                    failures.append(f"thread {seed}: wrong")
                if first.data_ptr() == second.data_ptr():
                    failures.append(f"thread {seed}: one memory")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engine._pool.made <= 3


def test_the_host_does_not_wait(small: Any) -> None:
    engine, _ = small
    x, blocked = torch.randn(32, 64).cuda(), torch.cuda.Event()
    engine(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    blocked.record()
    engine(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        engine(x)
    assert not blocked.query()
    torch.cuda.synchronize()


def median_us(call: Callable[[], object]) -> float:
    times = []
    for _ in range(300):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def test_a_call_costs_at_most_30_us_more_than_the_library(small: Any) -> None:
    engine, _ = small
    x = torch.randn(32, 64).cuda()
    engine(x)
    (context,) = [c for c in engine._pool._idle if c.shapes == (x.shape,)][:1]
    stream = torch.cuda.current_stream().cuda_stream
    raw = median_us(lambda: context.context.execute_async_v3(stream))
    ours = median_us(lambda: engine(x))
    assert ours - raw <= 30, f"{ours:.1f} us against {raw:.1f} us"


def test_the_callers_own_cuda_graph(small: Any) -> None:
    engine, graph = small
    x = torch.randn(32, 64).cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            engine(x)
    torch.cuda.synchronize()
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        (result,) = engine(x)
    for _ in range(3):
        x.copy_(torch.randn(32, 64))
        engine(torch.randn(32, 64).cuda())  # another context
        recording.replay()
        torch.testing.assert_close(result, graph(x)[0].detach(), atol=1e-4, rtol=1e-4)


def test_as_one_cuda_graph() -> None:
    model, x = Block().eval().cuda(), torch.randn(1, 16, 128).cuda()
    engine, graph = engine_of(model, x, cuda_graph=True)
    assert any("run as one CUDA graph" in note or "no CUDA graph" in note for note in engine.describe().notes)
    for value in (x, torch.randn(16, 1, 128).cuda().transpose(0, 1)):
        torch.testing.assert_close(engine(value)[0], graph(value)[0].detach(), atol=1e-4, rtol=1e-4)
    assert sum(engine.counters().values()) in (0, 2)


def test_memory_goes_when_the_engine_goes() -> None:
    x = torch.randn(32, 64).cuda()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine, graph = engine_of(perceptron(), x)
    engine(x)
    del engine, graph
    gc.collect()
    assert torch.cuda.memory_allocated() == before


# --- shapes and types


def test_int64_inputs_and_results() -> None:
    model, ids = Network().eval().cuda(), torch.randint(0, 100, (3, 9)).cuda()
    fast = optimize(model, ids)
    for value in (ids, torch.randint(0, 100, (9, 3)).cuda().T):
        result, counted = fast(value)
        assert counted.dtype is torch.int64
        assert torch.equal(counted, value + 1)
        torch.testing.assert_close(result, model(value)[0].detach(), atol=1e-5, rtol=1e-4)


def test_dynamic_shapes_buckets_and_fallback() -> None:
    model, x = perceptron(), torch.randn(4, 64).cuda()
    dims = {"input": {0: Dim("batch", max=16)}}
    fast = optimize(model, x, dynamic_shapes=dims)
    for rows in (4, 1, 16, 4):
        value = torch.randn(rows, 64).cuda()
        torch.testing.assert_close(fast(value), model(value).detach(), atol=1e-4, rtol=1e-4)
    assert fast.stats()["fallback"] == 0
    for rows in (17, 0):
        value = torch.randn(rows, 64).cuda()
        torch.testing.assert_close(fast(value), model(value).detach(), atol=1e-4, rtol=1e-4)
    assert fast.stats()["fallback"] == 2
    strict = optimize(model, x, dynamic_shapes=dims, buckets={"batch": (1, 8)}, fallback=False)
    for rows in (1, 8):
        value = torch.randn(rows, 64).cuda()
        torch.testing.assert_close(strict(value), model(value).detach(), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="Covered: "):
        strict(torch.randn(17, 64).cuda())


def test_an_operator_that_tensorrt_lacks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.first(x))
            return self.second((hidden.double() * 2).float())

    model, x = Model().eval().cuda(), torch.randn(4, 64).cuda()
    fast = optimize(model, x)
    torch.testing.assert_close(fast(x), model(x).detach(), atol=1e-4, rtol=1e-4)
    variant = fast.report().variants[0]
    assert variant.torch_operators
    assert any("float64" in refusal.reason for refusal in variant.refusals)


def test_sizes_that_depend_on_data_stay_in_pytorch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.linear(x)
            return hidden.relu() @ hidden.T, torch.nonzero(hidden > 0)

    model, x = Model().eval().cuda(), torch.randn(4, 64).cuda()
    fast = optimize(model, x)
    for result, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(result, expected.detach(), atol=1e-3, rtol=1e-3)


# --- kept engines, new weights


def test_cache_file_and_timing_cache(tmp_path: Path) -> None:
    model, x = perceptron(), torch.randn(32, 64).cuda()
    first = optimize(model, x, cache=True)
    second = optimize(model, x, cache=True)
    assert [[p.origin for p in pieces(fast)] for fast in (first, second)] == [["compiled"], ["cache"]]
    assert pieces(first)[0].facts.precisions == pieces(second)[0].facts.precisions
    first.save(tmp_path / "m.accel")
    loaded = accelkit.load(tmp_path / "m.accel", cache=False, progress=False)
    assert [p.origin for p in pieces(loaded)] == ["artifact"]
    assert torch.equal(loaded(x), first(x))


def test_engines_that_do_not_fit(small: Any) -> None:
    engine, graph = small
    x = torch.randn(32, 64).cuda()
    blobs = engine.serialize()
    plan, manifest = Manifest.from_blobs(blobs)

    def refused(plan: bytes, manifest: Manifest, message: str) -> None:
        kept = {PLAN: plan, MANIFEST: manifest.to_bytes()}
        with pytest.raises(LoweringError, match=message):
            QUICK.load(kept, graph, [x], CompileContext())

    refused(plan[:-100], manifest, "engine.plan is damaged")
    noise = bytes(1000)
    refused(noise, dataclasses.replace(manifest, sha256=sha256(noise)), "does not load the engine")
    refused(plan, dataclasses.replace(manifest, tensorrt="8.5.3"), "built for TensorRT 8.5.3; here is")
    refused(plan, dataclasses.replace(manifest, device={"gpu": "NVIDIA Other"}), "built for NVIDIA Other")
    again = QUICK.load(blobs, graph, [x], CompileContext())
    assert torch.equal(again(x)[0], engine(x)[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_refit(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Block().eval().cuda(), torch.randn(4, 32, 128).cuda()
    fast = optimize(model, x, target=dataclasses.replace(QUICK, refittable=True), precision=precision)
    before = fast(x)
    monkeypatch.setattr(TensorRT, "compile", lambda *_: pytest.fail("compiled"))
    for _ in range(2):
        other = Block().eval().cuda()
        fast.refit(other.state_dict())
        assert [p.origin for p in pieces(fast)] == ["refitted"]
        assert relative_error(fast(x), exact(other, x)) <= ALLOWED[precision]
    fast.refit(model.state_dict())
    torch.testing.assert_close(fast(x), before)


def test_refit_of_what_is_not_refittable_builds() -> None:
    model, x = perceptron(), torch.randn(32, 64).cuda()
    fast = optimize(model, x)
    other = perceptron()
    fast.refit(other.state_dict())
    assert [p.origin for p in pieces(fast)] == ["compiled"]
    torch.testing.assert_close(fast(x), other(x).detach(), atol=1e-4, rtol=1e-4)


def test_which_weights_an_engine_takes() -> None:
    x = torch.randn(32, 64).cuda()
    engine, graph = engine_of(perceptron(), x, refittable=True)
    names = set(engine.manifest.weights)
    refitter = library.loaded().Refitter(engine._engine, engines_log())
    assert names <= set(refitter.get_all_weights()), (names, refitter.get_all_weights())
    weights = refitting.weights_of(graph, engine.manifest.weights)
    with pytest.raises(LoweringError, match="no weights nose of their own"):
        refitting.refit(library.loaded(), engine._engine, {**weights, "@nose": x}, engine._streams)


def engines_log() -> Any:
    from accelkit.backends.tensorrt.runtime import log_of

    return log_of(library.loaded())


# --- builds that end early


def test_a_build_is_cancelled_or_too_long() -> None:
    x = torch.randn(4, 32, 128).cuda()
    graph = trace(Block().eval().cuda(), x)

    def say(words: str) -> None:
        if words.startswith("TensorRT"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QUICK.compile(graph, [x], CompileContext(progress=say))
    with pytest.raises(LoweringError, match=r"after the 0.05 s that the build may take"):
        dataclasses.replace(QUICK, time_limit_s=0.05).compile(graph, [x], CompileContext())
    engine = QUICK.compile(graph, [x], CompileContext())  # nothing is left in the way
    torch.testing.assert_close(engine(x)[0], graph(x)[0].detach(), atol=1e-4, rtol=1e-4)
