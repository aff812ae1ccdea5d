"""Calls on one static memory: their order on the GPU, whatever threads and streams they come from; with a CUDA of paper."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from planted import in_threads, optimize
from torch import nn

from accelkit import AccelkitWarning
from accelkit.backends.fastertransformer import engine as engines
from accelkit.backends.fastertransformer.engine import Replay, Way
from accelkit.backends.fastertransformer.recording import Recording
from accelkit.backends.fastertransformer.turns import Cuda, Place, Turns

FIRST, SECOND, DEFAULT = (3, 0, 1), (35, 0, 1), (0, 0, 1)  # PyTorch's own streams
BORROWED = (0x7F3A_5500_1230, 0, 1)


class Paper:
    """What was asked of CUDA, in order; each thread has its stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.local = threading.local()

    def on(self, place: Place) -> None:
        self.local.place = place

    def cuda(self) -> Cuda:
        def stream(place: Place) -> Any:
            paper = self

            class Stream:
                def __init__(self) -> None:
                    self.place = place

                def wait_event(self, event: str) -> None:
                    paper.log.append(f"{place[0]} waits for {event}")

            return Stream()

        return Cuda(
            current=lambda: getattr(self.local, "place", DEFAULT),
            stream=stream,
            event="the event",
            record=lambda stream: self.log.append(f"recorded on {stream.place[0]}"),
        )

    def run(self, inputs: Any) -> tuple[torch.Tensor, ...]:
        self.log.append(f"runs on {getattr(self.local, 'place', DEFAULT)[0]}")
        return tuple(inputs)


@pytest.fixture
def paper() -> Paper:
    return Paper()


def test_only_another_stream_waits(paper: Paper) -> None:
    turns = Turns(paper.cuda())
    for place in (FIRST, FIRST, SECOND, DEFAULT):
        paper.on(place)
        turns.take(paper.run, ())
    assert paper.log == [
        "runs on 3", "recorded on 3",
        "runs on 3", "recorded on 3",
        "35 waits for the event", "runs on 35", "recorded on 35",
        "0 waits for the event", "runs on 0", "recorded on 0",
    ]  # fmt: skip


def test_a_borrowed_stream_always_waits_since_its_address_may_be_another_ones_by_now(paper: Paper) -> None:
    turns = Turns(paper.cuda())
    paper.on(BORROWED)
    for _ in range(2):
        turns.take(paper.run, ())
    number = BORROWED[0]
    assert paper.log[2:] == [f"{number} waits for the event", f"runs on {number}", f"recorded on {number}"]


def test_what_a_failed_call_enqueued_is_waited_for(paper: Paper) -> None:
    def fail(inputs: Any) -> Any:
        paper.run(inputs)
        raise torch.OutOfMemoryError("no memory for the result")

    turns = Turns(paper.cuda())
    paper.on(FIRST)
    with pytest.raises(torch.OutOfMemoryError):
        turns.take(fail, ())
    assert torch.is_grad_enabled()
    paper.on(SECOND)
    turns.take(paper.run, ())
    assert paper.log[:3] == ["runs on 3", "recorded on 3", "35 waits for the event"]


@pytest.mark.parametrize("outside", [True, False])
def test_gradients_are_off_inside_and_as_before_afterwards(outside: bool, paper: Paper) -> None:
    seen = []
    with torch.set_grad_enabled(outside):
        Turns(paper.cuda()).take(lambda inputs: seen.append(torch.is_grad_enabled()) or (), ())
        assert torch.is_grad_enabled() is outside
    assert seen == [False]


def planted(model: nn.Module, x: torch.Tensor, paper: Paper, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model compiled, with a recording that doubles planted into its engine."""
    fast = optimize(model, x, target="fastertransformer", passes=())
    engine: Any = fast._built.variants[0].lowered.call  # type: ignore[union-attr]
    assert isinstance(engine, engines.FasterTransformerEngine)
    static, doubled = torch.zeros_like(x), torch.zeros_like(x)

    def replay() -> None:
        paper.run(())
        torch.mul(static, 2, out=doubled)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    recording = Recording((static,), (doubled,), replay)
    shapes = ((x.shape, x.dtype),)
    engine._turns = Turns(paper.cuda())
    engine._recordings[shapes] = recording
    engine._replays[((x.shape, x.dtype, x.device),)] = Replay(recording.run, Way("replayed", shapes))
    return fast


def test_threads_on_streams_of_their_own_get_their_own_results(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = planted(nn.Linear(3, 3), torch.randn(2, 3), paper, monkeypatch)

    def work(index: int) -> None:
        paper.on((2 * index + 1, 0, 1))
        kept = []
        for _ in range(50):
            x = torch.randn(2, 3, requires_grad=True)
            kept.append((x, fast(x)))
        assert all(torch.equal(y, 2 * x) and not y.requires_grad for x, y in kept)

    in_threads(work, 4)
    stats = fast.stats()
    assert stats["calls"] == 200
    assert stats["engines"] == {"as captured": {"replayed [2, 3]": 200}}
    ran = [entry for entry in paper.log if entry.startswith("runs")]
    after = [paper.log[i + 1] for i, entry in enumerate(paper.log) if entry.startswith("runs")]
    assert after == [entry.replace("runs", "recorded") for entry in ran], "a call got between a run and its event"
    changes = sum(a != b for a, b in itertools.pairwise(ran))
    assert sum("waits" in entry for entry in paper.log) == changes


def test_another_device_and_other_shapes_do_not_replay(paper: Paper, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = planted(nn.Linear(3, 3), torch.randn(2, 3), paper, monkeypatch)
    engine = fast._built.variants[0].lowered.call
    with pytest.raises(engines.InputError, match="input 0 is on meta, the engine on cpu"):
        engine(torch.randn(2, 3, device="meta"))
    engine(torch.randn(4, 3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # the user's own recording
    engine(torch.randn(2, 3))
    assert not paper.log
    assert engine.calls() == {"not recorded": 1}


def test_changed_weights_are_told_by_the_same_call_after_the_work_is_enqueued(
    paper: Paper, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    fast = planted(model, x, paper, monkeypatch)
    with torch.no_grad():
        model.bias.add_(1)
    with pytest.warns(AccelkitWarning, match="weights were changed after optimize") as told:
        y = fast(x)
    assert torch.equal(y, 2 * x)
    assert sum("weights were changed" in str(w.message) for w in told) == 1
    assert paper.log == ["runs on 0", "recorded on 0"]
