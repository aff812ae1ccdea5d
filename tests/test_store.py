"""Engines from the cache, and what checking them found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import optimize
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:.*slower")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(tmp_path / "cache"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x))


def build(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    return optimize(model, x, **({"target": "onnxruntime", "cache": True, "passes": None} | options))


def origins(fast: Any) -> list[str]:
    return [p.origin for v in fast.report().variants for p in v.pieces]


def test_the_second_build_is_from_the_cache_and_says_so() -> None:
    model, x = Model(), torch.randn(2, 4)
    first, second = build(model, x), build(model, x)
    assert origins(first) == ["compiled"]
    assert origins(second) == ["cache"]
    assert torch.equal(first(x), second(x))
    one, two = first.report().variants[0], second.report().variants[0]
    assert one.accuracy == two.accuracy
    assert [r.name for r in one.ledger] == [r.name for r in two.ledger]  # the ONNX passes' records are kept too
    assert any("remembered from an earlier build" in n for n in two.notes)
    assert not any("remembered" in n for n in one.notes)


def test_other_weights_share_the_engine_but_not_the_findings() -> None:
    x = torch.randn(2, 4)
    build(Model(), x)
    other = Model()
    second = build(other, x)
    assert origins(second) == ["cache"]
    assert not any("remembered" in n for n in second.report().variants[0].notes)
    torch.testing.assert_close(second(x), other(x).detach())


def test_other_inputs_tolerances_and_precisions_are_checked_anew() -> None:
    model, x = Model(), torch.randn(2, 4)
    build(model, x)
    for again in (build(model, torch.randn(2, 4)), build(model, x, tolerance=1e-3)):
        assert not any("remembered" in n for n in again.report().variants[0].notes)
    assert origins(build(model, torch.randn(3, 4))) == ["compiled"]


def test_what_stays_in_pytorch_counts_for_the_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pipelines that differ only in what no engine holds must not share findings."""
    from dataclasses import dataclass

    from accelkit import AccuracyError
    from accelkit.backends.onnxruntime import OnnxRuntime
    from accelkit.pass_api import GraphPass, PassResult

    @dataclass(frozen=True)
    class SinToCos(GraphPass):
        def run(self, graph: Any) -> PassResult:
            result = PassResult()
            for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
                node.target = torch.ops.aten.cos.default
                result.rewrote(node)
            return result

    unsupported = OnnxRuntime.unsupported
    monkeypatch.setattr(
        OnnxRuntime,
        "unsupported",
        lambda self, n: "planted" if "sin" in str(n.target) or "cos" in str(n.target) else unsupported(self, n),
    )
    model, x = Model(), torch.randn(2, 4)
    assert origins(build(model, x, passes=())) == ["compiled"]
    with pytest.raises(AccuracyError):
        build(model, x, passes=(SinToCos(),))


def test_no_cache_writes_nothing(tmp_path: Path) -> None:
    build(Model(), torch.randn(2, 4), cache=False)
    assert not (tmp_path / "cache").exists()
