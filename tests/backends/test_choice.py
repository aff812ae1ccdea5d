"""Which form of a graph the fastertransformer target runs: what is measured, what wins, and what the report says of it.

Recordings and clocks are the tests' own, so that decisions are made on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fused_graphs import Case, encoder, fused_graph, operators, with_random_vectors
from torch import Tensor, fx

from accelkit import Dim
from accelkit.backends.fastertransformer import agreement, choice
from accelkit.backends.fastertransformer.choice import FOLDED, PLAIN, SPLIT, choose
from accelkit.backends.fastertransformer.obstacles import NotRecordable
from accelkit.ops import linear_residual_layer_norm

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@dataclass
class Machine:
    """A GPU of the test's making.

    Attributes:
        milliseconds: what a replay of each form takes, one for each round, the last one again and again.
        unrecordable, failing: forms whose recording, or whose replay, raises this.
        recorded, replayed: what was asked of it, in order.
    """

    milliseconds: dict[str, Sequence[float]]
    unrecordable: dict[str, Exception] = field(default_factory=dict)
    failing: dict[str, Exception] = field(default_factory=dict)
    recorded: list[tuple[str, int]] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    def record(
        self, forward: Callable[..., Any], inputs: Sequence[Tensor], warmup: int, constants: Sequence[Tensor]
    ) -> Any:
        form = _form_of(forward.__self__)  # type: ignore[attr-defined]
        assert constants, "recorded without its weights"
        assert self.settings[-1:] == ["on"], "recorded without the precision's arithmetic"
        if form in self.unrecordable:
            raise self.unrecordable[form]
        self.recorded.append((form, warmup))
        return type("Recording", (), {"replay": lambda: form})

    def call_ms(self, call: Callable[[], str], device: torch.device, repeats: int) -> float:
        form = call()
        self.replayed.append(form)
        if form in self.failing:
            raise self.failing[form]
        times = self.milliseconds[form]
        return times[min(self.replayed.count(form), len(times)) - 1]

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        self.settings.append("on")
        yield
        self.settings.append("off")


def _form_of(graph: fx.GraphModule) -> str:
    found = operators(graph)
    return FOLDED if "folded_linear" in found else SPLIT if "linear_residual_layer_norm" in found else PLAIN


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Every kernel is there, and all forms are equally fast."""
    made = Machine({PLAIN: [1.0], FOLDED: [1.0], SPLIT: [1.0]})
    monkeypatch.setattr(choice, "Recorder", lambda device: made)
    monkeypatch.setattr(choice, "call_ms", made.call_ms)
    monkeypatch.setattr(choice, "why_no_kernel", lambda node: None)
    monkeypatch.setattr(linear_residual_layer_norm, "without_triton", lambda: None)
    return made


class Sum(Case):
    """linear(layer_norm(linear(x) + residual)), 128 wide: its one norm folds."""

    def __init__(self) -> None:
        super().__init__(lambda self, x, residual: self.b(self.normalised(self.a(x), residual)[0]))


@functools.cache
def graph_of(rows: int) -> fx.GraphModule:
    """A post-norm layer, 64 wide, of so many rows; choosing leaves it as it is."""
    return fused_graph(encoder(1, width=64), torch.randn(1, rows, 64), precision="fp16")


def chosen(machine: Machine, rows: int = 2048, device: torch.device = CUDA) -> choice.Choice:
    """The choice for so many rows."""
    graph = graph_of(rows)
    text = str(graph.graph)
    made = choose(graph, [torch.randn(1, rows, 64)], 3, device, machine.arithmetic)
    assert str(graph.graph) == text, "the graph of the passes was changed"
    assert (made.graph is graph) == (made.name == PLAIN)
    assert _form_of(made.graph) == made.name
    return made


# --- what is measured


@pytest.mark.parametrize(
    ("rows", "measured"),
    [
        (1, [PLAIN, SPLIT]),
        (1023, [PLAIN, SPLIT]),
        (1024, [PLAIN, FOLDED, SPLIT]),
        (4096, [PLAIN, FOLDED, SPLIT]),
        (4097, [PLAIN, FOLDED]),
    ],
)
def test_rows_decide_what_is_measured(machine: Machine, rows: int, measured: list[str]) -> None:
    chosen(machine, rows)
    assert machine.recorded == [(form, 3) for form in measured]


def test_folding_can_be_left_out(machine: Machine) -> None:
    graph = fused_graph(encoder(width=64), torch.randn(1, 2048, 64), precision="fp16")
    choose(graph, [torch.randn(1, 2048, 64)], 3, CUDA, machine.arithmetic, fold=False)
    assert set(machine.replayed) <= {PLAIN, SPLIT}
    choose(graph, [torch.randn(1, 2048, 64)], 3, CUDA, machine.arithmetic)
    assert FOLDED in machine.replayed


def test_forms_are_replayed_in_turns(machine: Machine) -> None:
    chosen(machine)
    turns = [machine.replayed[i : i + 3] for i in range(0, len(machine.replayed), 3)]
    assert len(turns) >= 5
    assert all(turn == [PLAIN, FOLDED, SPLIT] for turn in turns)


def test_nothing_is_measured_on_a_cpu(machine: Machine) -> None:
    made = chosen(machine, device=CPU)
    assert made.name == PLAIN
    assert made.note() is None
    assert not machine.recorded


def test_nothing_is_measured_without_residual_norms(machine: Machine) -> None:
    graph = fused_graph(torch.nn.Linear(64, 64).eval(), x := torch.randn(2048, 64))
    made = choose(graph, [x], 3, CUDA, machine.arithmetic)
    assert made.graph is graph
    assert made.note() is None
    assert not machine.recorded


def test_a_form_without_kernels_is_not_measured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_no_kernel", lambda node: "the kernel is for NVIDIA's Hopper GPUs")
    chosen(machine)
    assert [form for form, _ in machine.recorded] == [PLAIN, SPLIT]


def test_rows_of_a_dynamic_batch_are_the_examples(machine: Machine) -> None:
    x = torch.randn(8, 600, 64)
    shapes = {"input": {0: Dim("batch", min=1, max=64)}}
    graph = fused_graph(encoder(1, width=64), x, precision="fp16", dynamic_shapes=shapes)
    choose(graph, [x], 3, CUDA, machine.arithmetic)
    assert [form for form, _ in machine.recorded] == [PLAIN, FOLDED]  # 4800 rows: too many to split
    size = next(iter(graph.graph.nodes)).meta["val"].shape[0]
    assert choice.size_hint(size) == 8
    assert choice.size_hint(5) == 5


def test_the_norm_of_most_rows_decides(machine: Machine) -> None:
    class FewAndMany(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = encoder(1, width=64)

        def forward(self, few: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(few), self.layer(many)

    inputs = (torch.randn(1, 7, 64), torch.randn(1, 5000, 64))
    graph = fused_graph(FewAndMany().eval(), *inputs, precision="fp16")
    choose(graph, inputs, 3, CUDA, machine.arithmetic)
    assert [form for form, _ in machine.recorded] == [PLAIN, FOLDED]


# --- what wins


@pytest.mark.parametrize("fastest", [PLAIN, FOLDED, SPLIT])
def test_the_fastest_runs(machine: Machine, fastest: str) -> None:
    machine.milliseconds[fastest] = [0.5]
    made = chosen(machine)
    assert made.name == fastest
    assert made.milliseconds[fastest] == 0.5
    assert made.failures == {}


@pytest.mark.parametrize(("ms", "form"), [(1.0, PLAIN), (0.985, PLAIN), (0.97, FOLDED)])
def test_near_ties_come_out_the_same(machine: Machine, ms: float, form: str) -> None:
    """A form has to be faster by more than clocks differ from run to run."""
    machine.milliseconds[FOLDED] = [ms]
    assert chosen(machine).name == form


def test_one_fast_round_is_not_fast(machine: Machine) -> None:
    machine.milliseconds[FOLDED] = [0.1, 2.0]
    machine.milliseconds[SPLIT] = [9.0, 0.9]
    made = chosen(machine)
    assert made.name == SPLIT
    assert made.milliseconds == {PLAIN: 1.0, FOLDED: 2.0, SPLIT: 0.9}


def test_the_note_has_every_time(machine: Machine) -> None:
    machine.milliseconds.update({FOLDED: [0.25], SPLIT: [3.0]})
    assert chosen(machine).note() == (
        "measured: as fused by the passes 1.000 ms, layer norms folded into linear layers 0.250 ms, "
        "linear layers split between programs 3.000 ms; runs layer norms folded into linear layers"
    )


# --- what fails


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotRecordable("it waits for the GPU"), "it waits for the GPU"),
        (torch.OutOfMemoryError("tried to allocate 2 GiB\nmore"), "out of memory (tried to allocate 2 GiB)"),
    ],
    ids=["not recordable", "out of memory"],
)
def test_a_form_that_cannot_be_recorded_is_left_out(machine: Machine, error: Exception, reason: str) -> None:
    machine.unrecordable[FOLDED] = error
    machine.milliseconds[SPLIT] = [2.0]
    made = chosen(machine)
    assert made.name == PLAIN
    assert made.failures == {FOLDED: reason}
    assert made.note() == (
        "measured: as fused by the passes 1.000 ms, linear layers split between programs 2.000 ms; "
        f"runs as fused by the passes; not layer norms folded into linear layers: {reason}"
    )


def test_a_form_that_cannot_be_replayed_is_left_out(machine: Machine) -> None:
    machine.milliseconds.update({FOLDED: [0.1], SPLIT: [0.5]})
    machine.failing[FOLDED] = RuntimeError("CUDA error: out of memory")
    made = chosen(machine)
    assert made.name == SPLIT
    assert made.failures == {FOLDED: "CUDA error: out of memory"}
    assert machine.replayed.count(FOLDED) == 1


def test_only_another_form_can_be_recorded(machine: Machine) -> None:
    machine.unrecordable = {PLAIN: torch.OutOfMemoryError("2 GiB"), SPLIT: NotRecordable("waits")}
    made = chosen(machine)
    assert made.name == FOLDED
    assert set(made.failures) == {PLAIN, SPLIT}


def test_where_nothing_can_be_recorded_the_graph_stays(machine: Machine) -> None:
    machine.unrecordable = dict.fromkeys((PLAIN, FOLDED, SPLIT), NotRecordable("dropout draws random numbers"))
    made = chosen(machine)
    assert made.name == PLAIN
    assert made.note() is None, "the engine meets the same obstacle, and reports it"


def test_a_rewrite_that_fails_is_left_out(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: fx.GraphModule) -> int:
        raise KeyError("weight")

    monkeypatch.setattr(choice, "fold_layer_norms", broken)
    machine.milliseconds[SPLIT] = [0.5]
    made = chosen(machine)
    assert made.name == SPLIT
    assert made.failures == {FOLDED: "'weight'"}


def test_where_no_other_form_can_be_made_the_reasons_are_told(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Callable[[fx.GraphModule], int]:
        def rewrite(graph: fx.GraphModule) -> int:
            raise error

        return rewrite

    monkeypatch.setattr(choice, "fold_layer_norms", failing(torch.OutOfMemoryError("2 GiB\nmore lines")))
    monkeypatch.setattr(choice, "split_linears", failing(RuntimeError("a malformed graph")))
    made = chosen(machine)
    assert not machine.recorded
    assert made.note() == (
        "runs as fused by the passes; not layer norms folded into linear layers: out of memory (2 GiB); "
        "not linear layers split between programs: a malformed graph"
    )


def test_other_errors_while_recording_are_not_swallowed(machine: Machine) -> None:
    machine.unrecordable[FOLDED] = KeyError("a bug")
    with pytest.raises(KeyError):
        chosen(machine)


# --- what is exact enough


def folded_fastest(machine: Machine, *inputs: Tensor) -> choice.Choice:
    """The choice for a Sum of these inputs, in float32 (which is never split), where folding is the fastest form."""
    machine.milliseconds[FOLDED] = [0.2]
    graph = fused_graph(with_random_vectors(Sum()), *inputs)
    return choose(graph, inputs, 3, CUDA, machine.arithmetic)


def test_folding_runs_where_it_loses_nothing(machine: Machine) -> None:
    made = folded_fastest(machine, torch.randn(1, 1024, 128), torch.randn(1, 1024, 128))
    assert made.name == FOLDED
    assert made.failures == {}


def test_folding_is_passed_over_where_rows_have_large_means(machine: Machine) -> None:
    """Deviations of 1.4 around a mean of 200: the product of the sum with W loses what layer norm would have kept."""
    residual = 200.0 + torch.randint(-2, 3, (1, 1024, 128)).float()
    made = folded_fastest(machine, torch.randn(1, 1024, 128), residual)
    assert made.name == PLAIN
    assert made.milliseconds[FOLDED] == 0.2
    assert set(made.failures) == {FOLDED}
    assert re.search(
        r"runs as fused by the passes; not layer norms folded into linear layers: output 0 has an error of "
        r"\d\.\de-\d\d against float64, the form of the passes \d\.\de-\d\d \(allowed \d\.\de-\d\d\)$",
        made.note() or "",
    )


def test_the_next_fastest_takes_the_place_of_a_wrong_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.milliseconds.update({FOLDED: [0.2], SPLIT: [0.5]})

    def fault(self: agreement.Agreement, form: fx.GraphModule) -> str | None:
        return "twice as wrong" if _form_of(form) == FOLDED else None

    monkeypatch.setattr(agreement.Agreement, "fault", fault)
    made = chosen(machine)
    assert made.name == SPLIT
    assert made.failures == {FOLDED: "twice as wrong"}


def test_without_float64_a_form_may_differ_by_8_epsilon(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("float64")

    monkeypatch.setattr(agreement, "reference_outputs", no_memory)
    near, far = torch.randn(1, 1024, 128), 1e4 + 8.0 * torch.randint(-2, 3, (1, 1024, 128)).float()
    assert folded_fastest(machine, torch.randn(1, 1024, 128), near).name == FOLDED
    made = folded_fastest(machine, torch.randn(1, 1024, 128), far)
    assert made.name == PLAIN
    assert re.match(r"output 0 differs from it by \d\.\de-\d\d, allowed 7\.6e-06", made.failures[FOLDED])


def test_a_form_that_cannot_be_compared_is_passed_over(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("2 GiB")

    monkeypatch.setattr(agreement.Agreement, "_run", no_memory)
    made = folded_fastest(machine, torch.randn(1, 1024, 128), torch.randn(1, 1024, 128))
    assert made.name == PLAIN
    assert made.failures == {FOLDED: "it cannot be compared, out of memory (2 GiB)"}
