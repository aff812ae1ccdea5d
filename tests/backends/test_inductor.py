"""Inductor: compiled once, right at every size, weights frozen, refusals with reasons."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelkit import Dim
from accelkit.backend_api import CompileContext, Engine
from accelkit.backends.inductor import Inductor
from accelkit.errors import AccelkitWarning, BackendUnavailableError, LoweringError
from accelkit.testing import relative_error, trace

needs_compiler = pytest.mark.skipif(Inductor().unavailable() is not None, reason="no C++ compiler")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(x)))


def compiled(model: nn.Module, *inputs: torch.Tensor, dynamic_shapes: Any = None, **options: Any) -> tuple[Engine, Any]:
    graph = trace(model.eval(), *inputs, dynamic_shapes=dynamic_shapes)
    return Inductor(**options).compile(graph, inputs, CompileContext()), graph


def compilations() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]) + int(
        torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    ) + int(torch._dynamo.utils.counters["stats"]["unique_graphs"])  # fmt: skip


@needs_compiler
def test_layouts_gradients_threads_and_own_memory() -> None:
    engine, graph = compiled(Mlp(), torch.randn(4, 16))
    before = compilations()
    for x in (
        torch.randn(4, 16),
        torch.randn(16, 4).T,
        torch.randn(1, 16).expand(4, 16),
        torch.randn(4, 16).requires_grad_(),
    ):
        with torch.no_grad():
            torch.testing.assert_close(engine(x)[0], graph(x)[0])
        assert not engine(x)[0].requires_grad
    failures: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(4, 16, generator=generator)
            with torch.no_grad():
                if not torch.allclose(engine(x)[0], graph(x)[0], atol=1e-5):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert compilations() == before
    x = torch.randn(4, 16)
    (first,), (second,) = engine(x), engine(x)
    assert first.data_ptr() != second.data_ptr()
    assert engine.serialize() == {}


@needs_compiler
@pytest.mark.slow
def test_every_batch_size_without_another_compilation() -> None:
    engine, graph = compiled(Mlp(), torch.randn(3, 5, 16), dynamic_shapes=({0: Dim("batch"), 1: Dim("length")},))
    before = compilations()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelkitWarning)
        for batch, length in ((3, 5), (5, 5), (1, 5), (1, 7), (9, 2), (64, 33)):
            x = torch.randn(batch, length, 16)
            with torch.no_grad():
                torch.testing.assert_close(engine(x)[0], graph(x)[0])
    assert compilations() == before
    # a length of 1 is what the code was specialised against: right, and said once
    x = torch.randn(4, 1, 16)
    with pytest.warns(AccelkitWarning, match="run in PyTorch"):
        (result,) = engine(x)
    with torch.no_grad():
        torch.testing.assert_close(result, graph(x)[0])
    assert compilations() == before


@needs_compiler
def test_weights_are_frozen() -> None:
    model, x = Mlp(), torch.randn(4, 16)
    engine, _ = compiled(model, x)
    before = engine(x)[0].clone()
    with torch.no_grad():
        model.first.weight.mul_(3.0)
    assert torch.equal(engine(x)[0], before)
    facts = engine.describe()
    assert facts.memory_bytes == sum(p.nbytes for p in model.parameters())
    assert facts.precisions == {"fp32": 4}


@needs_compiler
def test_bf16() -> None:
    model, x = Mlp(), torch.randn(4, 16)
    with torch.no_grad():
        truth = model.double()(x.double())
        model = model.to(torch.bfloat16)
        eager = relative_error(model(x.bfloat16()), truth)
    engine, _ = compiled(model, x.bfloat16())
    (result,) = engine(x.bfloat16())
    assert result.dtype is torch.bfloat16
    assert relative_error(result, truth) <= 2 * eager + 1e-3
    assert engine.describe().precisions == {"bf16": 4}


@needs_compiler
def test_outputs_that_are_views_of_inputs_are_copied() -> None:
    class View(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.view(-1), x + 1

    x = torch.randn(2, 3)
    kept = x.clone()
    engine, _ = compiled(View(), x)
    engine(x)[0].fill_(3.0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.dropout(x, training=True), "random"),
        (lambda x: torch.fft.fft(x).abs(), "complex numbers"),
    ],
    ids=["random", "complex"],
)
def test_refusals(function: Any, reason: str) -> None:
    class Of(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    graph = trace(Of(), torch.randn(8))
    reasons = [Inductor().unsupported(n) for n in graph.graph.nodes if n.op == "call_function"]
    assert any(r is not None and reason in r for r in reasons), reasons


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    why = Inductor().unavailable()
    assert why is not None
    assert "install one" in why
    assert str(tmp_path) in why
    with pytest.raises(BackendUnavailableError, match="target inductor: Inductor needs a C"):
        compiled(nn.ReLU(), torch.randn(2))


@needs_compiler
def test_errors_are_lowering_errors() -> None:
    with pytest.raises(LoweringError, match="Inductor cannot compile the graph"):
        compiled(Mlp(), torch.randn(4, 16), options=(("no_such_setting", 1),))
