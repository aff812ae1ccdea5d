"""Whether last operators run outside of a recording: what is measured, what wins; recordings and clock are the tests' own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accelkit.backends.fastertransformer import record_ends
from accelkit.backends.fastertransformer.obstacles import NotRecordable
from accelkit.backends.fastertransformer.record_ends import EndsRecorder
from accelkit.backends.fastertransformer.recording import Recording
from accelkit.testing import trace

CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8).half(), nn.LayerNorm(8).half()

    def forward(self, x: Tensor) -> Tensor:
        x = x.half()
        normed, _ = torch.ops.accelkit.residual_layer_norm(self.linear(x), x, self.norm.weight, self.norm.bias)
        return normed


class Paper:
    """A recorder: its recordings run the forward into static memory. `alone` and `in_a_row`: ms of the whole, and of the split."""

    def __init__(self) -> None:
        self.alone, self.in_a_row = (1.0, 0.9), (1.0, 0.9)
        self.recordings: list[Any] = []
        self.failure: Exception | None = None
        self.inside = False
        self.took: list[Any] = []

    def __call__(self, device: torch.device) -> Paper:
        return self

    def record(self, forward: Callable[..., Any], inputs: Sequence[Tensor], warmup: int, constants: Any) -> Recording:
        if self.recordings and self.failure is not None:
            raise self.failure
        assert self.inside, "recorded without the precision's arithmetic"
        assert constants, "recorded without its weights"
        static = tuple(torch.empty_like(i) for i in inputs)
        with torch.no_grad():
            outputs = tuple(torch.empty_like(o) for o in forward(*inputs))

        def replay() -> None:
            for output, value in zip(outputs, forward(*static), strict=True):
                output.copy_(value)

        recording = Recording(static, outputs, replay)
        self.recordings.append(weakref.ref(static[0]))
        return recording

    def take(self, run: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.took.append(run.__self__)  # type: ignore[attr-defined]
        return run(inputs)

    def call_ms(self, call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
        self.took.clear()
        with torch.no_grad():
            call()
        split = self.took[-1].end is not None
        return self.alone[split] if len(self.took) == 1 else self.in_a_row[split] * len(self.took)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Paper:
    made = Paper()
    monkeypatch.setattr(record_ends, "Recorder", made)
    monkeypatch.setattr(record_ends, "call_ms", made.call_ms)
    monkeypatch.setattr(record_ends, "SPLIT_FROM_BYTES", 4 * 8 * 2)
    return made


def recorded(paper: Paper, rows: int = 4, **options: Any) -> tuple[Recording, list[str]]:
    model, x = Layer().eval(), torch.randn(rows, 8)
    ends = EndsRecorder(trace(model, x), CPU, 2, paper.arithmetic, **options)
    recording = ends.record(paper, [x], paper.take)  # type: ignore[arg-type]
    assert recording.inputs[0].dtype is torch.float16, "the copy casts"
    paper.took.clear()
    for _ in range(2):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            (result,) = recording.run([x])
            assert torch.equal(result, model(x))
        assert result.untyped_storage().data_ptr() not in {o.untyped_storage().data_ptr() for o in recording.outputs}
    return recording, ends.notes


def test_last_operators_run_outside_where_that_is_faster(paper: Paper) -> None:
    recording, notes = recorded(paper)
    assert recording.end is not None
    (note,) = notes
    assert note == (
        "[4, 8]: accelkit.residual_layer_norm.default after the CUDA graph, into the results: 0.900 ms against "
        "1.000 ms with a copy of them"
    )
    assert [r() is not None for r in paper.recordings] == [False, False, True], "a recording that lost keeps its memory"


@pytest.mark.parametrize(
    ("alone", "in_a_row"), [((1.0, 0.9), (1.0, 1.1)), ((1.0, 1.1), (1.0, 0.9)), ((1.0, 0.995),) * 2]
)
def test_it_has_to_be_faster_alone_and_in_a_row(alone: Any, in_a_row: Any, paper: Paper) -> None:
    paper.alone, paper.in_a_row = alone, in_a_row
    recording, notes = recorded(paper)
    assert recording.end is None
    assert not notes
    assert len(paper.recordings) == 2


def test_small_results_are_copied(paper: Paper) -> None:
    assert recorded(paper, rows=3)[0].end is None
    assert len(paper.recordings) == 1


def test_not_where_an_arithmetic_has_to_be_in_force(paper: Paper) -> None:
    assert recorded(paper, split=False)[0].end is None
    assert len(paper.recordings) == 1


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("no room\nat all"), NotRecordable("no room")])
def test_a_trial_that_fails_is_told(failure: Exception, paper: Paper) -> None:
    paper.failure = failure
    recording, notes = recorded(paper)
    assert recording.end is None
    assert notes == ["[4, 8]: results are copied out of the CUDA graph's memory (no room)"]
