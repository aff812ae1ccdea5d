"""Attention in PyTorch where it was measured faster: what is measured, what is kept, and where lowering cuts the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tensorrt_backend import Machine
from torch import nn

from accelkit import Dim, InputError
from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT, attention_place
from accelkit.backends.tensorrt.attention_place import ATTENTION, Times, alone, in_pytorch, problem_of
from accelkit.errors import LoweringError
from accelkit.lowering import lower
from accelkit.testing import run, trace

pytest.importorskip("onnx")

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


class Layer(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).unflatten(2, (3, 2, 8)).unbind(2)
            x = x + out(ATTENTION(q, k, v, mask).flatten(2))
        return x


def graph_of(*inputs: torch.Tensor, **options: Any) -> Any:
    return trace(Layer().eval(), *inputs, **options)


class Kept:
    """The machine's file of choices, and what measuring finds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: Times | None) -> None:
        self.entries: list[Any] = []
        self.measured = 0
        self.times = times
        monkeypatch.setattr(attention_place.files, "entries_of", lambda device: self.entries)
        monkeypatch.setattr(attention_place.files, "keep", self._keep)
        monkeypatch.setattr(attention_place, "_measured", self._measure)

    def _keep(self, device: torch.device, new: Any) -> None:
        self.entries[:] = [e for e in self.entries if e["problem"] != new[0]["problem"]] + new

    def _measure(self, *given: Any) -> Times | None:
        self.measured += 1
        return self.times


FASTER, SAME = Times(0.26, 0.117, 0.04), Times(0.014, 0.015, 0.04)


def test_it_pays_or_not() -> None:
    assert FASTER.better_in_pytorch
    assert not SAME.better_in_pytorch
    assert not Times(0.06, 0.03, 0.04).better_in_pytorch, "the border costs more than is won"
    assert not Times(1.0, 0.9, 0.01).better_in_pytorch


def test_measured_once_for_a_shape_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(monkeypatch, FASTER)
    graph = graph_of(torch.randn(2, 5, 16))
    names = [n.name for n in graph.graph.nodes if n.target is ATTENTION]
    why = "runs in PyTorch: 0.117 ms there, 0.26 ms in an engine of its own; the border costs 0.04 ms"
    for _ in range(2):
        assert in_pytorch(graph, "auto", "8.6.0", GPU, None) == dict.fromkeys(names, why)
    assert (kept.measured, len(names)) == (1, 2)
    in_pytorch(graph, "auto", "10.16", GPU, None)
    in_pytorch(graph_of(torch.randn(3, 5, 16)), "auto", "10.16", GPU, None)
    assert kept.measured == 3
    kept.entries[0]["choice"] = {"engine": "?"}
    in_pytorch(graph, "auto", "8.6.0", GPU, None)
    assert kept.measured == 4, "a damaged entry is measured anew"


@pytest.mark.parametrize("times", [SAME, None], ids=["no faster", "not built"])
def test_it_stays_in_the_engine(monkeypatch: pytest.MonkeyPatch, times: Times | None) -> None:
    kept = Kept(monkeypatch, times)
    graph = graph_of(torch.randn(2, 5, 16))
    assert in_pytorch(graph, "auto", "8.6.0", GPU, None) == {}
    assert len(kept.entries) == (times is not None)
    assert kept.measured == 1, "layers of one shape are measured once"


def test_where_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(monkeypatch, FASTER)
    x = torch.randn(2, 5, 16)
    graph = graph_of(x)
    assert in_pytorch(graph, "engine", "8.6.0", GPU, None) == {}
    assert in_pytorch(graph, "auto", "8.6.0", torch.device("cpu"), None) == {}
    dynamic = graph_of(x, dynamic_shapes=({0: Dim("batch", max=8)}, None))
    assert in_pytorch(dynamic, "auto", "8.6.0", GPU, None) == {}
    node = next(n for n in graph.graph.nodes if n.target is ATTENTION)
    assert in_pytorch(alone(node), "auto", "8.6.0", GPU, None) == {}
    assert kept.measured == 0


def test_the_problem_has_what_the_time_depends_on() -> None:
    graph = graph_of(torch.randn(2, 5, 16), torch.ones(2, 1, 1, 5, dtype=torch.bool))
    node = next(n for n in graph.graph.nodes if n.target is ATTENTION)
    assert problem_of(node, "8.6.0") == {
        "tensorrt": "8.6.0", "query": ["float32", 2, 5, 2, 8], "key": ["float32", 2, 5, 2, 8], "value": ["float32", 2, 5, 2, 8],
        "mask": ["bool", 2, 1, 1, 5], "causal": False, "kind": "auto",
    }  # fmt: skip


def test_what_is_timed_is_the_attention_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("8.6")
    graph = graph_of(torch.randn(2, 5, 16))
    node = next(n for n in graph.graph.nodes if n.target is ATTENTION)
    part = alone(node)
    inputs = [torch.randn(graphs.val(n).shape) for n in part.graph.find_nodes(op="placeholder")]
    torch.testing.assert_close(run(part, *inputs)[0], ATTENTION(*inputs))
    monkeypatch.setattr(attention_place, "_host_ms", lambda call, device: 0.01)
    monkeypatch.setattr(attention_place, "_SECONDS", 0.0)
    target = TensorRT(cuda_graph=False)
    times = attention_place._measured(node, torch.device("cpu"), lambda p, x: target.compile(p, x, CompileContext()))
    assert times is not None
    assert times.borders == 0.02
    assert min(times) > 0

    def refuses(*given: Any) -> Any:
        raise LoweringError("no")

    assert attention_place._measured(node, torch.device("cpu"), refuses) is None


def test_lowering_cuts_the_graph_there(machine: Machine) -> None:
    machine.has("8.6")
    x = torch.randn(2, 5, 16)
    graph = graph_of(x)
    lowered = lower(graph, TensorRT(cuda_graph=False, attention="pytorch"), [x], CompileContext())
    torch.testing.assert_close(lowered.call(x)[0], run(graph, x)[0])
    assert [r.reason for r in lowered.refusals] == ["accelkit.attention.default: runs in PyTorch: asked for"] * 2
    assert (len(lowered.pieces), lowered.torch_operators) == (3, 2)
    sizes = [
        tuple(map(tuple, (graphs.val(n).shape for n in p.graph.graph.output_node().args[0]))) for p in lowered.pieces
    ]
    assert sizes == [((2, 5, 2, 8),) * 3, ((2, 5, 16), *((2, 5, 2, 8),) * 3), ((2, 5, 16),)], "what crosses"


def test_an_unknown_place() -> None:
    with pytest.raises(InputError, match=r"attention='triton'\): known are auto, engine, pytorch"):
        TensorRT(attention="triton")
