"""Giving pieces back: what an engine runs slower than PyTorch stays in PyTorch, with both times, and is built once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from planted import GraphEngine, Planted
from torch import fx, nn

from accelkit import give_back
from accelkit.backend_api import CompileContext, Engine
from accelkit.capture import capture
from accelkit.give_back import why_given_back
from accelkit.lowering import Lowered, lower


class Sandwich(nn.Module):
    """Three products with an operator between them that the test refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.sin(self.second(torch.sin(self.first(x)))))


class StoredEngine(GraphEngine):
    def serialize(self) -> dict[str, bytes]:
        return {"plan": b"an engine"}


@dataclass(frozen=True)
class Slow(Planted):
    """An engine of the products in `slow` waits at each call."""

    slow: frozenset[str] = frozenset()
    contexts: list[CompileContext] = field(default_factory=list, compare=False, repr=False)

    measures_pieces: ClassVar[bool] = True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        engine = super().compile(graph, inputs, context)
        names = {str(node.target).split(".")[0] for node in graph.graph.find_nodes(op="get_attr")}
        return (
            StoredEngine(graph, _wait if names & self.slow else _hurry) if isinstance(engine, GraphEngine) else engine
        )


def _wait(results: list[Any], inputs: tuple[Any, ...]) -> list[Any]:
    time.sleep(0.004)
    return results


def _hurry(results: list[Any], inputs: tuple[Any, ...]) -> list[Any]:
    return results


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(give_back, "SECONDS", 0.05)


def lowered_sandwich(backend: Slow) -> tuple[Lowered, bool]:
    program = capture(Sandwich(), (torch.randn(2, 8),), {})
    lowered = lower(program.graph, backend, program.inputs, CompileContext())
    x = torch.randn(2, 8)
    with torch.no_grad():
        return lowered, torch.equal(lowered.call(x)[0], program.graph(x)[0])


def test_a_slow_piece_runs_in_pytorch_and_the_reason_has_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # a machine that does other work must not decide what this test is not about
    monkeypatch.setattr(give_back, "interleaved", _only_waits_count)
    backend = Slow(refuse=frozenset({"sin"}), slow=frozenset({"second"}))
    lowered, same = lowered_sandwich(backend)
    assert same
    assert [p.operators for p in lowered.pieces] == [1, 1]
    (reason,) = [r.reason for r in lowered.refusals if r.node == "linear_1"]
    assert reason.startswith("aten.linear.default: measured slower in an engine than in PyTorch: ")
    assert reason.count(" ms ") == 2
    assert lowered.torch_operators == 3
    assert len(backend.compiled) == 3, "a piece that stayed was built again"
    assert [blobs for _, blobs in lowered.serialized()] == [{"plan": b"an engine"}] * 3, "a file has to keep all three"


def _only_waits_count(candidates: Any, **options: Any) -> Any:
    """As accelkit.measure.interleaved, with times rounded to milliseconds."""
    from accelkit.measure import Timing

    found = {}
    for name, call in candidates.items():
        started = time.perf_counter()
        call()
        waited = float(time.perf_counter() - started > 0.003)
        found[name] = Timing(waited, waited, waited, waited, 1)
    return found


def test_every_piece_may_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(give_back, "interleaved", _only_waits_count)
    lowered, same = lowered_sandwich(Slow(refuse=frozenset({"sin"}), slow=frozenset({"first", "second", "third"})))
    assert same
    assert lowered.pieces == []
    assert len(lowered.given_back) == 3


def test_a_graph_in_one_piece_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(give_back, "interleaved", None)
    lowered, same = lowered_sandwich(Slow(slow=frozenset({"second"})))
    assert same
    assert [p.operators for p in lowered.pieces] == [5]


def test_a_backend_that_does_not_ask_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(give_back, "interleaved", None)
    program = capture(Sandwich(), (torch.randn(2, 8),), {})
    assert len(lower(program.graph, Planted(refuse=frozenset({"sin"})), program.inputs, CompileContext()).pieces) == 3


def test_the_measurement_itself() -> None:
    x = torch.randn(4)
    assert why_given_back(lambda x: (x,), lambda x: time.sleep(0.004), [x]) is None
    why = why_given_back(lambda x: time.sleep(0.004), lambda x: (x,), [x])
    assert why is not None
    assert "measured slower in an engine than in PyTorch" in why


def test_a_saved_model_keeps_the_engine_that_was_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import accelkit
    from accelkit.backends.onnxruntime import OnnxRuntime

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(OnnxRuntime, "measures_pieces", True)
    refused = OnnxRuntime.unsupported
    monkeypatch.setattr(
        OnnxRuntime, "unsupported", lambda self, n: "planted" if "sin" in str(n.target) else refused(self, n)
    )
    slow = [True]

    def planted(engine: Any, in_pytorch: Any, inputs: Any) -> str | None:
        return "measured slower (planted)" if slow and slow.pop() else None

    monkeypatch.setattr("accelkit.pieces.why_given_back", planted)
    fast = accelkit.optimize(Sandwich(), torch.randn(2, 8), target="onnxruntime", passes=(), cache=False)
    path = tmp_path / "model.accel"
    fast.save(path)
    slow.append(True)
    monkeypatch.setattr(OnnxRuntime, "compile", None)  # nothing is built on loading
    loaded = accelkit.load(path, cache=False)
    x = torch.randn(2, 8)
    assert torch.equal(loaded(x), fast(x))
    assert len(loaded.report().variants[0].pieces) == 2
