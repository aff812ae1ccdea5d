"""The problems in a graph, and the option that tunes them while compiling; measuring itself needs a GPU (the last part)."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels to choose among need Triton")

import torch
from torch import fx, nn

import accelkit
from accelkit import Dim, InputError
from accelkit.accuracy import relative_error
from accelkit.backend_api import CompileContext
from accelkit.backends.fastertransformer import FasterTransformer
from accelkit.backends.fastertransformer import tune as tuning_of_graphs
from accelkit.backends.fastertransformer.prepare import plain_linears
from accelkit.backends.fastertransformer.tune import DEFAULT_S, GraphTimer, seconds_of, tasks_of, tasks_of_model
from accelkit.precision import FP16
from accelkit.testing import float64_reference, trace
from accelkit.tuning import choices, files
from accelkit.tuning.measuring import measure
from accelkit.tuning.problems import task_of

fused = torch.ops.accelkit
half = torch.float16


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


PROBLEMS = {
    "linear {rows} x 64 to 192 float16": 1,
    "attention {batch} x 4 x 5 x 16 float16": 1,
    "linear {rows} x 64 to 64 float16": 1,
    "residual layer norm {rows} x 64 float16": 2,
    "linear {rows} x 64 to 128 float16, gelu": 1,
    "linear {rows} x 128 to 64 float16": 1,
    "split linear {rows} x 64 to 64 float16, residual layer norm": 1,
    "split linear {rows} x 128 to 64 float16, residual layer norm": 1,
}


def problems(batch: int) -> dict[str, int]:
    return {name.format(batch=batch, rows=5 * batch): count for name, count in PROBLEMS.items()}


def prepared(model: nn.Module, x: torch.Tensor, **options: Any) -> fx.GraphModule:
    """As on a GPU, where every linear layer is a fused operator."""
    graph = trace(model.half().eval(), x, **options)
    plain_linears(graph, (x,), CompileContext(FP16))
    return graph


def test_every_operator_of_a_graph_and_of_its_split_form() -> None:
    x = torch.randn(2, 5, 64, dtype=half)
    tasks = tasks_of(prepared(Layer(), x), (x,))
    assert Counter(map(str, tasks)) == problems(2)
    (attention,) = (task for task in tasks if task.choices.kind == "attention")
    assert attention.problem.packed


def test_dynamic_graphs_at_the_sizes_of_the_examples() -> None:
    x = torch.randn(3, 5, 64, dtype=half)
    graph = prepared(Layer(), x, dynamic_shapes={"x": {0: Dim("batch", max=16)}})
    assert Counter(map(str, tasks_of(graph, (x,)))) == problems(3)
    assert Counter(map(str, tasks_of(graph, (torch.randn(7, 5, 64, dtype=half),)))) == problems(7)


def test_what_depends_on_numbers_has_no_problem_and_hides_none() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return self.layer(y[y.sum(1) > 0])

    x = torch.randn(6, 64, dtype=half)
    graph = prepared(Model(), x, dynamic_shapes={"x": {0: Dim("rows", max=16)}})
    assert [str(task) for task in tasks_of(graph, (x,))] == ["linear 6 x 64 to 64 float16"]


def test_operators_without_a_kernel_have_no_problem() -> None:
    x = torch.randn(2, 5, 64)
    found = Counter(str(task).split(" ")[0] for task in tasks_of(trace(Layer(), x), (x,)))
    assert found == {"attention": 1, "residual": 2}  # the linear kernels take 16 bits


def test_many_rows_are_not_split() -> None:
    x = torch.randn(1, 5000, 64, dtype=half)
    assert not any(task.choices.kind == "split" for task in tasks_of(prepared(Layer(), x), (x,)))


def test_a_model_by_its_default_passes() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
            return y

    model = Plain()
    found = {str(task) for task in tasks_of_model(model, (torch.randn(2, 5, 64),), FP16)}
    assert {"linear 10 x 64 to 128 float16, gelu", "residual layer norm 10 x 64 float16"} <= found
    assert next(model.parameters()).dtype is torch.float32


@pytest.mark.parametrize("tune", [0, -1, 0.0, float("inf"), float("nan"), "yes", None])
def test_the_option_takes_seconds(tune: Any) -> None:
    with pytest.raises(InputError, match=r"tune has to be False, True or a number of seconds above 0, not"):
        FasterTransformer(tune=tune)


def test_seconds() -> None:
    assert [seconds_of(tune) for tune in (True, 5, 0.5)] == [DEFAULT_S, 5.0, 0.5]


def test_on_a_cpu_there_is_nothing_to_tune() -> None:
    x = torch.randn(2, 5, 64)
    fast = accelkit.optimize(Layer(), x, target=FasterTransformer(tune=True), progress=False)
    assert "nothing to tune: on a CPU fused operators run their plain definitions" in str(fast.report())


# --- on a GPU

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


def gpu(test: Any) -> Any:
    for mark in on_gpu:
        test = mark(test)
    return test


@pytest.fixture
def _nothing_known() -> Iterator[None]:
    """Before and after: choices as a new process has them."""
    for kind in choices.KINDS.values():
        kind.forget()
    yield
    for kind in choices.KINDS.values():
        kind.forget()


def notes_of(fast: Any) -> str:
    return "\n".join(note for piece in fast.report().variants[0].pieces for note in piece.facts.notes)


@gpu
@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.slow
def test_tuning_while_compiling() -> None:
    model, x = Layer().cuda().eval(), torch.randn(2, 5, 64, device="cuda")
    before = torch.cuda.get_rng_state()
    target = FasterTransformer(tune=120)
    fast = accelkit.optimize(model, x, target=target, precision="fp16", cache=False, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    notes = notes_of(fast)
    assert "tuned 8 problems" in notes, notes
    assert "not tuned" not in notes, notes
    assert "passed over" not in notes, notes
    (truth,) = float64_reference(model, x)
    (plain,) = (model.half()(x.half()),)
    assert relative_error(fast(x), truth) <= 2 * relative_error(plain, truth)
    path = files.path_of(torch.device("cuda", 0))
    assert path is not None
    assert len(files.read(path)) == 8

    for kind in choices.KINDS.values():
        kind.forget()  # as another process
    again = accelkit.optimize(model.float(), x, target=target, precision="fp16", cache=False, progress=False)
    assert "tuned before: 8 problems" in notes_of(again)


@gpu
@pytest.mark.usefixtures("_nothing_known")
def test_attention_is_measured_without_tuning() -> None:
    model, x = Layer().cuda().eval(), torch.randn(2, 5, 64, device="cuda")
    fast = accelkit.optimize(model, x, target="fastertransformer", precision="fp16", cache=False, progress=False)
    (note,) = (n for n in notes_of(fast).splitlines() if n.startswith("attention 2 x 4 x 5 x 16 float16"))
    measured, _, runs = note.partition(": measured ")[2].partition("; runs ")
    for kind in ("triton", "cudnn", "flash", "efficient"):
        assert f"{kind} 0." in measured or f"; not {kind}: " in runs, note
    assert f"{runs.partition(';')[0]} 0." in measured, note
    choices.KINDS["attention"].forget()
    again = accelkit.optimize(model, x, target="fastertransformer", precision="fp16", cache=False, progress=False)
    (later,) = (n for n in notes_of(again).splitlines() if n.startswith("attention 2 x 4 x 5 x 16 float16"))
    assert ": measured on " in later
    assert later.partition("; runs ")[2] == runs.partition(";")[0]


@gpu
@pytest.mark.usefixtures("_nothing_known")
def test_candidates_that_cannot_run_leave_nothing() -> None:
    from accelkit.kernels.linear import LinearConfig

    x, w = torch.randn(64, 256, device="cuda", dtype=half), torch.randn(256, 256, device="cuda", dtype=half)
    task = task_of("linear_activation", x, w, None, "gelu")
    assert task is not None
    too_big = LinearConfig("tiles", 256, 256, 128, 4, 6)  # more shared memory than a multiprocessor has
    task.candidates = lambda: [task.default(), too_big]  # type: ignore[method-assign]
    measure(task, GraphTimer(task.device))
    gc.collect()
    before = torch.cuda.memory_allocated()
    result = measure(task, GraphTimer(task.device))
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert list(result.failed) == [too_big]
    assert result.choice == task.default()
    assert result.default_ms is not None
    assert result.default_ms > 0


@gpu
@pytest.mark.usefixtures("_nothing_known")
def test_out_of_memory_keeps_the_default_and_the_memory() -> None:
    from accelkit.kernels.linear import LinearProblem
    from accelkit.tuning.problems.linear import LinearTask

    gpu = torch.device("cuda", 0)
    task = LinearTask(LinearProblem(2**31, 2**20, 2**10, half, "none", False, False), gpu)
    before = torch.cuda.memory_allocated()
    outcome = tuning_of_graphs.tune_tasks([task], 30.0, gpu)
    gc.collect()
    assert "its operands cannot be made: OutOfMemoryError" in outcome.left[str(task)]
    assert torch.cuda.memory_allocated() == before
    assert task.choices[gpu, task.problem] is None


@gpu
@pytest.mark.usefixtures("_nothing_known")
def test_a_choice_on_disk_is_what_the_next_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.kernels import linear

    x, w = torch.randn(64, 256, device="cuda", dtype=half), torch.randn(256, 256, device="cuda", dtype=half)
    task = task_of("linear_activation", x, w, None, "gelu")
    assert task is not None
    tiles = next(c for c in task.candidates() if c.implementation == "tiles")
    entry = {"kind": "linear", "problem": choices.to_json(task.problem), "choice": choices.to_json(tiles)}
    files.keep(task.device, [entry])
    linear.chosen.forget()
    ran: list[Any] = []
    original = linear._IMPLEMENTATIONS["tiles"]
    monkeypatch.setitem(linear._IMPLEMENTATIONS, "tiles", lambda *a: ran.append(a[-1]) or original(*a))
    fused.linear_activation(x, w, None, "gelu")
    assert ran == [tiles]
