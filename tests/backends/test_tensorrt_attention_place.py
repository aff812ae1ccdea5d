"""Attention in PyTorch on request: where lowering cuts the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tensorrt_backend import Machine
from torch import nn

from accelkit import InputError
from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT
from accelkit.backends.tensorrt.attention_place import ATTENTION, attentions
from accelkit.lowering import lower
from accelkit.testing import run, trace

pytest.importorskip("onnx")


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


def test_the_attentions_of_a_graph() -> None:
    graph = graph_of(torch.randn(2, 5, 16))
    assert attentions(graph) == dict.fromkeys(
        [n.name for n in graph.graph.nodes if n.target is ATTENTION], "runs in PyTorch: asked for"
    )
    assert len(attentions(graph)) == 2


def test_it_stays_in_the_engine_unless_asked_for(machine: Machine) -> None:
    machine.has("8.6")
    x = torch.randn(2, 5, 16)
    lowered = lower(graph_of(x), TensorRT(cuda_graph=False), [x], CompileContext())
    assert (len(lowered.pieces), lowered.torch_operators) == (1, 0)


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
    with pytest.raises(InputError, match=r"attention='triton'\): known are engine, pytorch"):
        TensorRT(attention="triton")
