"""Which form of a graph runs, where forms fail; no GPU: recordings and clocks are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import fx, nn

from accelkit.backends.fastertransformer import choice
from accelkit.backends.fastertransformer.choice import FOLDED, PLAIN, SPLIT, Choice, choose
from accelkit.backends.fastertransformer.obstacles import NotRecordable
from accelkit.testing import trace

Failing = dict[str, Exception]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")


class _Recording:
    def __init__(self, form: str) -> None:
        self.form = form

    def replay(self) -> None:
        pass


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    """Choose between the three forms, some of which fail when they are made, recorded or replayed."""

    def run(ms: dict[str, float], made: Failing = {}, recorded: Failing = {}, replayed: Failing = {}) -> Choice:  # noqa: B006
        def rewrite(name: str) -> Callable[[fx.GraphModule], int]:
            def one(graph: fx.GraphModule) -> int:
                if name in made:
                    raise made[name]
                graph.form = name
                return 1

            return one

        class Recorder:
            def __init__(self, device: torch.device) -> None: ...

            def record(self, forward: Any, inputs: Any, warmup: int) -> _Recording:
                name = getattr(forward.__self__, "form", PLAIN)
                if name in recorded:
                    raise recorded[name]
                return _Recording(name)

        def call_ms(call: Any, device: torch.device, repeats: int) -> float:
            name = call.__self__.form
            if name in replayed:
                raise replayed[name]
            return ms[name]

        monkeypatch.setattr(choice, "Recorder", Recorder)
        monkeypatch.setattr(choice, "call_ms", call_ms)
        monkeypatch.setattr(choice, "fold_layer_norms", rewrite(FOLDED))
        monkeypatch.setattr(choice, "split_linears", rewrite(SPLIT))
        monkeypatch.setattr(choice, "_rows", lambda graph: 2048)
        graph = trace(nn.Linear(4, 4), torch.randn(2, 4))
        return choose(graph, [torch.randn(2, 4)], 1, torch.device("cuda"), nullcontext)

    return run


TIMES = {PLAIN: 3.0, FOLDED: 1.0, SPLIT: 2.0}


def test_the_fastest(chosen: Callable[..., Choice]) -> None:
    found = chosen(TIMES)
    assert found.name == FOLDED
    assert found.graph.form == FOLDED
    assert found.note() == (
        "measured: as fused by the passes 3.000 ms, layer norms folded into linear layers 1.000 ms, "
        "linear layers split between programs 2.000 ms; runs layer norms folded into linear layers"
    )


@pytest.mark.parametrize("step", ["made", "recorded", "replayed"])
def test_out_of_memory_leaves_a_form_out(chosen: Callable[..., Choice], step: str) -> None:
    found = chosen(TIMES, **{step: {FOLDED: OUT_OF_MEMORY}})
    assert found.name == SPLIT
    assert FOLDED not in found.milliseconds
    assert found.note() == (
        "measured: as fused by the passes 3.000 ms, linear layers split between programs 2.000 ms; runs linear layers "
        "split between programs; not layer norms folded into linear layers: out of memory (CUDA out of memory. Tried "
        "to allocate 2 GiB)"
    )


def test_only_another_form_can_be_recorded(chosen: Callable[..., Choice]) -> None:
    found = chosen(TIMES, recorded={PLAIN: OUT_OF_MEMORY, SPLIT: NotRecordable("waits")})
    assert found.name == FOLDED
    assert set(found.failures) == {PLAIN, SPLIT}


def test_nothing_can_be_recorded(chosen: Callable[..., Choice]) -> None:
    """The engine tries the graph as it is, and reports the one reason."""
    found = chosen(TIMES, recorded=dict.fromkeys(TIMES, NotRecordable("waits for the GPU")))
    assert (found.name, found.milliseconds, found.note()) == (PLAIN, {}, None)


def test_no_other_form_can_be_made(chosen: Callable[..., Choice]) -> None:
    found = chosen(TIMES, made={FOLDED: OUT_OF_MEMORY, SPLIT: RuntimeError("a malformed graph")})
    assert found.name == PLAIN
    assert not hasattr(found.graph, "form")
    assert found.note() == (
        "runs as fused by the passes; not layer norms folded into linear layers: out of memory (CUDA out of memory. "
        "Tried to allocate 2 GiB); not linear layers split between programs: a malformed graph"
    )
