"""FasterTransformer without a GPU: plain definitions, what a recording is refused for, rows of padding, numbers and threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accelkit
import accelkit.ops
from accelkit import Dim, InputError
from accelkit.backend_api import CompileContext, Engine
from accelkit.backends.fastertransformer import FasterTransformer
from accelkit.backends.fastertransformer.batches import Padding, examples_of, shapes_of
from accelkit.backends.fastertransformer.engine import Way
from accelkit.backends.fastertransformer.obstacles import NotRecordable, Watch, why_not_recordable
from accelkit.backends.fastertransformer.prepare import plain_linears, prepare
from accelkit.backends.fastertransformer.recording import Recording
from accelkit.batch import Batch, batch_of
from accelkit.precision import TF32
from accelkit.rowwise import why_not_rowwise
from accelkit.testing import graph_text, relative_error, trace

fused = torch.ops.accelkit
CPU = torch.device("cpu")


class Layer(nn.Module):
    """A post-norm encoder layer of fused operators, 64 wide, 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, 4, 16)).unbind(2)
        attended = self.out(fused.attention(query, key, value).flatten(2))
        x, _ = fused.residual_layer_norm(attended, x, self.first.weight, self.first.bias)
        hidden = fused.linear_activation(x, self.up.weight, self.up.bias, "gelu")
        x, _ = fused.residual_layer_norm(self.down(hidden), x, self.second.weight, self.second.bias)
        return x


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def compiled(model: nn.Module, *inputs: torch.Tensor, precision: Any = None, **options: Any) -> Engine:
    context = CompileContext(precision) if precision else CompileContext()
    return FasterTransformer(**options).compile(trace(model.eval(), *inputs), inputs, context)


# --- an engine on a CPU


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_small_encoder_through_optimize(precision: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(2, 5, 64)
    fast = accelkit.optimize(model, x, target="fastertransformer", precision=precision)
    with torch.no_grad():
        assert relative_error(fast(x), model(x)) < 2e-2
    facts = fast.report().variants[0].pieces[0].facts
    assert "on a CPU fused operators run their plain definitions" in facts.notes
    assert any("2 attention" in note and "4 residual_layer_norm" in note for note in facts.notes)
    assert ("fp32" if precision == "tf32" else precision) in facts.precisions
    fast.save(tmp_path / "layer.accel")
    again = accelkit.load(tmp_path / "layer.accel")
    torch.testing.assert_close(again(x), fast(x))


def test_new_weights() -> None:
    model, other, x = Layer(), Layer(), torch.randn(2, 5, 64)
    fast = accelkit.optimize(model, x, target="fastertransformer", precision="bf16")
    fast.refit(other.state_dict())
    with torch.no_grad():
        assert relative_error(fast(x), other(x)) < 2e-2


def test_layouts_gradients_threads_and_own_memory() -> None:
    model = Layer()
    engine = compiled(model, torch.randn(4, 5, 64))
    for x in (torch.randn(5, 4, 64).transpose(0, 1), torch.randn(4, 5, 64).requires_grad_()):
        with torch.no_grad():
            torch.testing.assert_close(engine(x)[0], model(x))
        assert not engine(x)[0].requires_grad
    failures: list[int] = []

    def work(seed: int) -> None:
        x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            if not torch.allclose(engine(x)[0], model(x), atol=1e-5):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    x = torch.randn(4, 5, 64)
    assert engine(x)[0].data_ptr() != engine(x)[0].data_ptr()
    (view,) = compiled(Function(lambda self, x: x.view(-1)), x)(x)
    assert view.data_ptr() != x.data_ptr()


def test_weights_are_shared() -> None:
    model, x = Layer(), torch.randn(2, 5, 64)
    engine = compiled(model, x)
    with torch.no_grad():
        model.down.weight.mul_(2.0)
        torch.testing.assert_close(engine(x)[0], model(x))
    assert engine.describe().memory_bytes == 0
    assert engine.serialize() == {}


def test_calls_are_counted_by_recording() -> None:
    engine: Any = compiled(Layer(), torch.randn(2, 5, 64))
    assert engine.counters() == engine.calls() == {}, "nothing is recorded on a CPU"
    small, large = (((torch.Size((rows, 64)), torch.float32),) for rows in (2, 8))
    ways = (Way("replayed", small), Way("replayed", large), Way("padded", large), Way("not recorded"))
    engine._calls.update(dict(zip(ways, (3, 4, 2, 1), strict=True)))
    assert engine.calls() == {"replayed": 7, "padded": 2, "not recorded": 1}
    assert engine.counters() == {
        "replayed [2, 64]": 3, "replayed [8, 64]": 4, "padded to [8, 64]": 2, "not recorded": 1,
    }  # fmt: skip


def test_tf32_is_float32_on_a_cpu() -> None:
    model, x = Layer(), torch.randn(2, 5, 64)
    engine = compiled(model, x, precision=TF32)
    with torch.no_grad():
        torch.testing.assert_close(engine(x)[0], model(x), rtol=0, atol=0)
    assert set(engine.describe().precisions) == {"fp32"}


def test_another_device_is_named() -> None:
    engine = compiled(Layer(), torch.randn(2, 5, 64))
    with pytest.raises(InputError, match="input 0 is on meta, the engine on cpu"):
        engine(torch.randn(2, 5, 64, device="meta"))


@pytest.mark.parametrize("options", [{"warmup": 0}, {"capture_sizes": (0,)}, {"capture_sizes": (2.5,)}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        FasterTransformer(**options)


# --- what a CUDA graph cannot hold


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: x + torch.rand_like(x), "draws random numbers"),
        (lambda self, x: F.dropout(x, 0.5, training=True), "draws random numbers"),
        (lambda self, x: x + self.seen.add_(1.0), "writes to seen"),
        (lambda self, x: x[x > 0].sum(), "makes the processor wait"),
        (lambda self, x: torch.nonzero(x).sum(), "makes the processor wait"),
        (lambda self, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)), "is control flow"),
        (
            lambda self, x: fused.variable_length_attention(
                *[x.double().view(2, 1, 4)] * 3, torch.tensor([0, 2], dtype=torch.int32), 2
            ),
            "reads lengths on the processor",
        ),
    ],
)
def test_why_not_recordable(function: Any, reason: str) -> None:
    graph = trace(Function(function).eval(), torch.randn(2, 4))
    assert reason in str(why_not_recordable(graph, CPU))


def test_recordable_but_on_one_device() -> None:
    graph = trace(Layer().eval(), torch.randn(2, 5, 64))
    assert why_not_recordable(graph, CPU) is None
    assert "is on cpu, the rest on cuda:0" in str(why_not_recordable(graph, torch.device("cuda:0")))
    picked = trace(Function(lambda self, x: x[:, torch.tensor([0, 2])]).eval(), torch.randn(2, 4))
    assert why_not_recordable(picked, CPU) is None


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: x.max().item(), "wait for values"),
        (lambda x: x[x > 0], "wait for values"),
        (lambda x: x.index_put_((x > 0,), torch.tensor(1.0)), "wait for values"),
        (lambda x: x.to("meta"), "copies between"),
    ],
)
def test_the_first_run_is_watched(call: Any, reason: str) -> None:
    with Watch(), pytest.raises(NotRecordable, match=reason):  # type: ignore[no-untyped-call]
        call(torch.randn(3))
    with Watch():  # type: ignore[no-untyped-call]
        Layer()(torch.randn(1, 2, 64))
        torch.randn(3, 3)[torch.tensor([0, 2])]


# --- a recording


def test_a_recording_gives_fresh_results_and_first_rows() -> None:
    static, doubled, tripled = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4)

    def replay() -> None:
        doubled.copy_(static * 2)
        tripled.copy_(static.sum(1) * 3)

    recording = Recording((static,), (doubled, tripled), replay)
    x, y = torch.randn(4, 3), torch.randn(3, 4).T[:2]
    first = recording.run([x])
    second = recording.run_padded([y], (True,), 2)
    torch.testing.assert_close(first, (x * 2, x.sum(1) * 3))
    torch.testing.assert_close(second, (y * 2, y.sum(1) * 3))
    assert recording.run([x])[0].data_ptr() != doubled.data_ptr()
    single = Recording((static,), (doubled,), replay)
    torch.testing.assert_close(single.run([x]), (x * 2,))


# --- batches and rows of padding


def dynamic(function: Any, *inputs: torch.Tensor, largest: int | None = 32) -> Any:
    model = function if isinstance(function, nn.Module) else Function(function)
    shapes = ({0: Dim("batch", max=largest)},) * len(inputs)
    return trace(model.eval(), *inputs, dynamic_shapes={"args": shapes} if model is not function else shapes)


def test_examples_of_each_size_to_record() -> None:
    graph, x = dynamic(Layer(), torch.randn(3, 5, 64)), torch.randn(3, 5, 64)
    batch = batch_of(graph)
    assert isinstance(batch, Batch)
    examples, refusals = examples_of((8, 1), batch, [x])
    assert [e[0].shape[0] for e in examples] == [8, 3, 1]
    assert torch.equal(examples[0][0][3:6], x)
    assert not refusals
    with pytest.raises(InputError, match="are more than the dynamic dimension's 32"):
        examples_of((64,), batch, [x])
    unbounded = batch_of(dynamic(Layer(), torch.randn(3, 5, 64), largest=None))
    assert isinstance(unbounded, Batch)
    assert unbounded.largest == float("inf")


def test_graphs_without_a_batch() -> None:
    fixed = batch_of(trace(Layer().eval(), torch.randn(3, 5, 64)))
    assert fixed == "no input has a dynamic first dimension"
    assert examples_of((8,), fixed, [torch.randn(3)])[1] == [f"capture_sizes has no effect: {fixed}"]


def test_a_batch_in_between_runs_in_the_next_larger_recording_where_that_is_faster() -> None:
    batch = Batch("s0", (True, False), 64.0)

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(rows, 3), torch.randn(3)

    recordings: Any = {shapes_of(inputs(size)): size for size in (1, 8, 32)}
    padding = Padding(batch, recordings, {1: (1.0, 5.0), 8: (2.0, 6.0), 32: (7.0, 14.0)})
    assert padding.recording_for(inputs(3)) == 8  # 2 ms against 5.3
    assert padding.recording_for(inputs(9)) is None  # 7 ms against 6.3
    assert padding.recording_for(inputs(20)) == 32
    assert padding.recording_for(inputs(33)) is None
    assert padding.recording_for((torch.randn(3, 4), torch.randn(3))) is None  # another width


ROWWISE: list[Any] = [
    lambda self, x: F.softmax(x @ x.transpose(1, 2), dim=-1) @ x,
    lambda self, x: torch.cat([torch.ones(1, 1, 4).expand(x.shape[0], -1, -1), x], 1).mean(1),
    lambda self, x: x.reshape(x.shape[0], -1).unsqueeze(1).permute(0, 2, 1).sum((1, 2)),
    lambda self, x: F.layer_norm(x, (3, 4)) + torch.arange(4),
    lambda self, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0, 0],
    lambda self, x: (x > 0)[torch.arange(x.shape[0])[:, None], torch.arange(3)[None]],
    lambda self, x: fused.residual_layer_norm(x, x * 2, None, None)[1].chunk(2, -1)[0],
    lambda self, x: F.normalize(x, dim=1).gather(2, (x > 0).long()).diff(dim=1),
]


@pytest.mark.parametrize("function", [Layer(), *ROWWISE])
def test_rows_are_independent(function: Any) -> None:
    width = 64 if isinstance(function, Layer) else 4
    x = torch.randn(3, 3, width)
    graph = dynamic(function, x)
    batch = batch_of(graph)
    assert isinstance(batch, Batch)
    assert why_not_rowwise(graph, batch.symbol) is None
    with torch.no_grad():
        padded = graph(torch.cat([x, torch.full((2, 3, width), float("nan"))]))[0]
        torch.testing.assert_close(padded[:3], graph(x)[0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: x - x.mean(0), "works across the batch"),
        (lambda self, x: x / x.shape[0], "computes with the batch size"),
        (lambda self, x: x.sum(), "works across the batch"),
        (lambda self, x: x.gather(0, (x > 0).long()), "picks across the batch"),
        (lambda self, x: x.gather(1, torch.zeros(1, 3, 4).long()), "picks across the batch"),
        (lambda self, x: x / x.norm(), "works across the batch"),
        (lambda self, x: x.diff(dim=0), "works across the batch"),
        (lambda self, x: F.softmax(x, 0), "works across the batch"),
        (lambda self, x: x[:, :1] + x[:, 0], "broadcasts the rows"),
        (lambda self, x: x.transpose(0, 1), "works across the batch"),
        (lambda self, x: x.permute(1, 0, 2), "moves the batch"),
        (lambda self, x: x.flip(0), "works across the batch"),
        (lambda self, x: x[1:], "works across the batch"),
        (lambda self, x: torch.cumsum(x, 0), "works across the batch"),
        (lambda self, x: x.reshape(-1, 4), "first dimension is not the batch"),
        (lambda self, x: x[torch.arange(x.shape[0]).flip(0)], "works across the batch"),
        (lambda self, x: x[:, :, 0] @ x[:, :, 0].permute(1, 0), "moves the batch"),
        (lambda self, x: F.batch_norm(x, None, None, training=True), "normalises across the batch"),
        (lambda self, x: torch.full((x.shape[0], 2), x.shape[0]) * x[:, 0, :2], "computes with the batch size"),
        (lambda self, x: (x, torch.ones(2)), "does not have a row for each input row"),
        (lambda self, x: torch.einsum("bij,bkj->bik", x, x), "is not known"),
        (lambda self, x: fused.attention(x[None], x[None], x[None]), "first dimension is not the batch"),
    ],
)  # fmt: skip
def test_rows_that_may_depend_on_each_other(function: Any, reason: str) -> None:
    graph = dynamic(function, torch.randn(3, 3, 4))
    batch = batch_of(graph)
    assert isinstance(batch, Batch)
    assert reason in str(why_not_rowwise(graph, batch.symbol))


# --- preparing


def test_plain_linears_take_the_fused_kernels() -> None:
    graph = trace(nn.Linear(4, 3).half().eval(), torch.randn(2, 4).half())
    plain_linears(graph, (), CompileContext())
    assert "accelkit.linear_activation(%x, %weight, %bias, none)" in graph_text(graph).replace("%input", "%x")


def test_plain_linears_stay_where_no_kernel_takes_them_and_the_callers_graph_stays_as_it_is() -> None:
    graph, x = trace(nn.Linear(4, 3).eval(), torch.randn(2, 4)), torch.randn(2, 4)
    before = graph_text(graph)
    own = prepare(graph, [x], CompileContext())
    assert own is not graph
    plain_linears(own, (), CompileContext())
    assert graph_text(own) == graph_text(graph) == before
