"""FasterTransformer on a GPU: recordings against the same graph without, streams and threads, memory, and what fails."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import in_threads
from torch import nn

import accelkit
from accelkit import Dim, InputError
from accelkit.backend_api import CompileContext
from accelkit.backends.fastertransformer import FasterTransformer, record_ends
from accelkit.backends.fastertransformer.engine import FasterTransformerEngine
from accelkit.precision import TF32
from accelkit.testing import float64_reference, relative_error, trace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
fused = torch.ops.accelkit


class Layer(nn.Module):
    """A pre-norm encoder layer, 128 wide, 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)
        self.up, self.down = nn.Linear(128, 512), nn.Linear(512, 128)
        self.first, self.second = nn.LayerNorm(128), nn.LayerNorm(128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.first(x)).unflatten(2, (3, 2, 64)).unbind(2)
        attended = self.out(fused.attention(query, key, value).flatten(2))
        normed, x = fused.residual_layer_norm(attended, x, self.second.weight, self.second.bias)
        hidden = fused.linear_activation(normed, self.up.weight, self.up.bias, "gelu")
        total: torch.Tensor = x + self.down(hidden)
        return total


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.linear(x))


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(Layer(), Layer()).half().cuda().eval()


@pytest.fixture
def _all_memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def batch(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def compiled(
    model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False, precision: Any = None, **options: Any
) -> FasterTransformerEngine:
    shapes: Any = ({0: Dim("batch", max=64)},) if dynamic else None
    if dynamic and isinstance(model, nn.Sequential):
        shapes = {"input": {0: Dim("batch", max=64)}}
    graph = trace(model.eval(), *inputs, dynamic_shapes=shapes)
    context = CompileContext(precision) if precision else CompileContext()
    engine = FasterTransformer(**options).compile(graph, inputs, context)
    assert isinstance(engine, FasterTransformerEngine)
    return engine


def assert_right(engine: FasterTransformerEngine, model: nn.Module, x: torch.Tensor) -> None:
    truth = float64_reference(model, x)[0]
    with torch.no_grad():
        plain = relative_error(model(x), truth)
    assert relative_error(engine(x)[0], truth) <= 2 * plain


def test_a_recording_gives_what_the_graph_gives(model: nn.Module) -> None:
    x = batch(4, 50, 128)
    recorded, plain = compiled(model, x), compiled(model, x, cuda_graph=False)
    for value in (x, batch(4, 50, 128), batch(50, 4, 128).transpose(0, 1), batch(1, 50, 128).expand(4, 50, 128)):
        torch.testing.assert_close(recorded(value)[0], plain(value)[0], rtol=0, atol=0)
        assert_right(recorded, model, value)
    assert recorded.calls() == {"replayed": 8}
    facts = recorded.describe()
    assert facts.memory_bytes
    assert any("1 CUDA graph in" in note for note in facts.notes)


def test_results_are_not_overwritten(model: nn.Module) -> None:
    engine = compiled(model, batch(4, 50, 128))
    x, y = batch(4, 50, 128), batch(4, 50, 128)
    (first,) = engine(x)
    kept = first.clone()
    (second,) = engine(y)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    x.zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("wide", [False, True], ids=["float16", "float32 outside"])
def test_ends_outside_of_the_recording_give_the_same(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = Layer().half(), nn.LayerNorm(128).half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.half()
            normed: torch.Tensor = fused.residual_layer_norm(self.layer(x), x, self.norm.weight, self.norm.bias)[0]
            return normed.float() if wide else normed

    net, x = Normed().cuda(), batch(64, 196, 128, dtype=torch.float32 if wide else torch.float16)
    engines = {}
    for name, least in (("outside", 1e9), ("copied", 0.0)):
        monkeypatch.setattr(record_ends, "_FASTER", least)
        engines[name] = compiled(net, x, fold_layer_norms=False)
    assert "after the CUDA graph, into the results" in "\n".join(engines["outside"].describe().notes)
    assert "after the CUDA graph" not in "\n".join(engines["copied"].describe().notes)
    kept = []
    for _ in range(4):
        y = torch.randn_like(x)
        kept.append((engines["outside"](y)[0], engines["copied"](y)[0]))
    for result, expected in kept:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len({result.data_ptr() for result, _ in kept}) == 4


def test_other_shapes_run_without_a_recording(model: nn.Module) -> None:
    engine = compiled(model, batch(4, 50, 128), dynamic=True, pad_batch=False)
    for size in (1, 3, 5):
        assert_right(engine, model, batch(size, 50, 128))
    assert engine.calls() == {"not recorded": 3}


def test_several_sizes_and_padding_between_them(model: nn.Module) -> None:
    engine = compiled(model, batch(4, 50, 128), dynamic=True, capture_sizes=(1, 8, 16))
    one = compiled(model, batch(4, 50, 128), dynamic=True)
    for size in (1, 4, 8, 16, 3, 6, 12, 20):
        assert_right(engine, model, batch(size, 50, 128))
    calls = engine.calls()
    assert calls["replayed"] == 4
    assert calls["padded"] == 3, engine.describe().notes  # small batches wait for launches: replays are faster
    assert calls["not recorded"] == 1
    counters = engine.counters()
    assert counters["not recorded"] == 1
    assert counters["padded to [4, 50, 128]"] == counters["padded to [8, 50, 128]"] == 1
    assert all(counters[f"replayed [{size}, 50, 128]"] == 1 for size in (1, 4, 8, 16))
    held, alone = engine.describe().memory_bytes, one.describe().memory_bytes
    assert held is not None
    assert alone is not None
    assert held < 8 * alone + 2**26


def test_a_call_waits_for_the_one_before_it_on_another_stream(model: nn.Module) -> None:
    """There is one static memory. To ask `stream != None` first would not do: it is False (PyTorch issue 188033)."""
    engine, x = compiled(model, batch(4, 50, 128)), batch(4, 50, 128)
    streams, ended = (torch.cuda.Stream(), torch.cuda.Stream()), torch.cuda.Event()
    for stream in streams:  # so that later calls allocate nothing, which may wait
        with torch.cuda.stream(stream):
            engine(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(1_000_000_000)  # half a second
        engine(x)
    with torch.cuda.stream(streams[1]):
        engine(x)
        ended.record()
    time.sleep(0.1)  # a hundred times what the replay takes
    assert not ended.query()
    torch.cuda.synchronize()


def test_threads_with_streams_of_their_own(model: nn.Module) -> None:
    """Bit for bit what the same recording gives alone: nothing waits between a thread's calls, so that they overlap."""
    engine = compiled(model, batch(4, 50, 128))
    inputs = [[batch(4, 50, 128) for _ in range(50)] for _ in range(3)]
    alone = [[engine(x)[0] for x in given] for given in inputs]
    torch.cuda.synchronize()

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [engine(x)[0] for x in inputs[index]]
            torch.cuda.current_stream().synchronize()
        wrong = [i for i, (a, b) in enumerate(zip(results, alone[index], strict=True)) if not torch.equal(a, b)]
        assert not wrong, f"thread {index}: calls {wrong}"

    in_threads(work, threads=3)
    assert engine.calls() == {"replayed": 300}


def test_calls_do_not_synchronise(model: nn.Module) -> None:
    engine, x = compiled(model, batch(4, 50, 128), dynamic=True), batch(4, 50, 128)
    engine(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine(x)
        engine(x[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inside_a_users_own_capture(model: nn.Module) -> None:
    engine, x = compiled(model, batch(4, 50, 128)), batch(4, 50, 128)
    expected = engine(x)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (result,) = engine(x)
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_new_weights_after_recording() -> None:
    first, second, x = Layer().cuda(), Layer().cuda(), torch.randn(2, 50, 128, device="cuda")
    fast = accelkit.optimize(first, x, target="fastertransformer", precision="fp16")
    fast.refit(second.state_dict())
    with torch.no_grad():
        assert relative_error(fast(x), second.eval()(x)) < 1e-2
        assert relative_error(fast(x), first.eval()(x)) > 1e-1


def test_weights_changed_in_place_are_read(model: nn.Module) -> None:
    engine, x = compiled(model, batch(4, 50, 128)), batch(4, 50, 128)
    before = engine(x)[0]
    with torch.no_grad():
        model[0].down.weight.mul_(2.0)
    assert not torch.equal(engine(x)[0], before)
    assert_right(engine, model, x)


def test_memory_does_not_grow_and_comes_back(model: nn.Module) -> None:
    x = batch(4, 50, 128)
    with torch.no_grad():
        model(x)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engine = compiled(model, x)
    engine(x)
    after_one, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(50):
        engine(x)
    assert torch.cuda.memory_allocated() == after_one
    assert torch.cuda.memory_reserved() == reserved
    assert (engine.describe().memory_bytes or 0) <= reserved
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


@pytest.mark.usefixtures("_all_memory")
def test_out_of_memory_while_recording_falls_back() -> None:
    model = Function(lambda x: (x[:, None] * x[None]).sum(1)).half().cuda()  # 128 MiB in between
    x = batch(1024, 64)
    graph = trace(model.eval(), x)
    gc.collect()
    torch.cuda.empty_cache()
    allocated = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    engine = FasterTransformer().compile(graph, [x], CompileContext())
    assert any("out of memory" in note for note in engine.describe().notes)
    gc.collect()
    assert torch.cuda.memory_allocated() <= allocated + 2**24  # far less than what did not fit
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.describe().memory_bytes == 0
    assert_right(engine, model, x)  # not bit for bit: the linear layer's kernel is accelkit's


def test_random_operators_are_not_recorded() -> None:
    x = batch(4, 64)
    engine = compiled(Function(lambda x: x + torch.rand_like(x)).half().cuda(), x)
    assert any("draws random numbers" in note for note in engine.describe().notes)
    assert not torch.equal(engine(x)[0], engine(x)[0])


@torch.library.custom_op("accelkit_tests::waiting", mutates_args=())
def waiting(x: torch.Tensor) -> torch.Tensor:
    return x * float(x.sum().isfinite())  # reads a value of the GPU, where nobody sees it


@waiting.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_a_recording_that_fails_leaves_pytorch_as_it_was() -> None:
    x = batch(4, 64)
    model = Function(lambda x: waiting(x)).half().cuda()  # an operator itself cannot be copied with the model
    torch.cuda.manual_seed(7)
    expected = torch.randn(4, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before, stream = torch.cuda.memory_reserved(), torch.cuda.current_stream()
    torch.cuda.manual_seed(7)
    engine = compiled(model, x)
    assert any("no CUDA graph for [4, 64]" in note for note in engine.describe().notes)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(4, device="cuda"), expected)
    assert_right(engine, model, x)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**26  # cuBLAS's workspace of 32 MiB and its small change
    again = compiled(Layer().half().cuda(), batch(2, 50, 128))  # the next recording works
    assert again.describe().memory_bytes


def test_large_means_do_not_end_the_build() -> None:
    """Folded layer norms lose digits here; whichever form is the fastest, one that is exact enough runs."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(768, 768), nn.Linear(768, 3072), nn.LayerNorm(768)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Any:
            return self.b(self.norm(self.a(x) + residual))

    x, residual = batch(8192, 768), 2048 + 2 * torch.randint(-2, 3, (8192, 768), device="cuda").half()
    fast = accelkit.optimize(Sum().half().cuda(), (x, residual), target="fastertransformer", precision="fp16")
    found = fast.report().variants[0]
    assert all(output.ok for output in found.accuracy)
    notes = "\n".join(note for piece in found.pieces for note in piece.facts.notes)
    assert "layer norms folded into linear layers" in notes, "the form was not tried"
    assert "against float64" in notes or "runs layer norms folded" not in notes, notes


def test_tf32_stays_in_the_recording() -> None:
    model = nn.Sequential(Layer(), Layer()).cuda().eval()
    x = batch(4, 50, 128, dtype=torch.float32)
    truth = float64_reference(model, x)[0]
    settings = torch.backends.cuda.matmul.allow_tf32
    exact, fast = compiled(model, x), compiled(model, x, precision=TF32)
    assert torch.backends.cuda.matmul.allow_tf32 is settings
    plain = compiled(model, x, precision=TF32, cuda_graph=False)
    errors = [relative_error(engine(x)[0], truth) for engine in (exact, fast, plain)]
    assert errors[0] < 1e-5 < errors[1] < 3e-3
    assert errors[2] == pytest.approx(errors[1], rel=0.2)
    assert "tf32" in fast.describe().precisions
    assert accelkit.optimize(model, x, target="fastertransformer", precision="tf32")(x).dtype is torch.float32


def test_inputs_on_another_device(model: nn.Module) -> None:
    engine = compiled(model, batch(4, 50, 128))
    with pytest.raises(InputError, match="input 0 is on cpu, the engine on cuda:0"):
        engine(torch.randn(4, 50, 128).half())


def test_kernels_run_and_are_told(model: nn.Module) -> None:
    notes = "\n".join(compiled(model, batch(4, 50, 128)).describe().notes)
    assert "2 attention" in notes
    assert "linear_activation" in notes
    assert "plain PyTorch" not in notes, notes
