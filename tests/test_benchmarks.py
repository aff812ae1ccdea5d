"""The benchmarks' own arithmetic, and that what they write is what the README's tables are made from."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from accelkit.measure import write_results

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of benchmarks/ or docs/ as its own folder would."""
    before = set(sys.modules)
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("bert_tools", "by_hand", "cpu_goals", "cpu_parts", "generate_tables"):
            del sys.modules[name]


def row(tool: str, batch: int, **measured: object) -> dict[str, object]:
    return {"tool": tool, "precision": "fp32", "batch": batch, "failure": None, **measured}


def test_tools_table_and_file_fit_the_readme(load: Any, tmp_path: Path) -> None:
    tools, tables = load("bert_tools"), load("generate_tables")
    rows = [
        row("PyTorch", 1, median_ms=137.26, speedup=1.0, within_spread=True, error=1e-6),
        row("PyTorch", 8, median_ms=1000.4, speedup=1.0, within_spread=True, error=2e-6),
        row("accelkit", 1, median_ms=71.51, speedup=1.919, within_spread=False, error=3e-6),
        row("accelkit", 8) | {"failure": "out of memory"},
    ]
    table = tools.results_table(rows, [1, 8])
    assert table["columns"] == ["tool", "precision", "batch 1", "batch 8", "error against float64"]
    assert table["rows"] == [
        ["PyTorch", "fp32", "137 (~1.00x)", "1000 (~1.00x)", "2.0e-06"],
        ["accelkit", "fp32", "71.5 (1.92x)", None, "3.0e-06"],
    ]
    results = tmp_path / "benchmarks" / "results"
    path = write_results("bert_tools", rows, results, title="BERT-base", table=table, packages=("pytest",))
    assert json.loads(path.read_text())["versions"]["pytest"] == pytest.__version__
    shown = tables.benchmarks(results)
    assert "| accelkit | fp32 | 71.5 (1.92x) | - | 3.0e-06 |" in shown
    assert f"torch {torch.__version__}" in shown


def test_plot_is_drawn_where_a_tool_failed(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("PyTorch", b, median_ms=1.0, speedup=1.0) for b in (1, 8)] + [row("other", 1)]
    load("bert_tools").plot(rows, "a title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_goals_are_met_or_missed_as_measured(load: Any) -> None:
    goal = load("cpu_goals").Goal
    assert goal("speed", 1.85, "x", True, 1.85).met
    assert not goal("speed", 1.85, "x", True, 1.84).met
    assert goal("seconds", 0.3, "s", False, 0.3).met
    assert not goal("seconds", 0.3, "s", False, 0.31).met
    unmeasured = goal("seconds", 0.3, "s", False, None, {"failure": "no such package"})
    assert not unmeasured.met
    assert unmeasured.cells() == ["seconds", "at most 0.3 s", None, "no"]
    assert unmeasured.to_json()["met"] is False


def test_a_part_that_fails_makes_a_missed_goal(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("cpu_goals")
    runner = module.Runner(quick=True)
    monkeypatch.setattr(runner, "part", lambda *_, **__: {"failure": "exit code 1"})
    for group in module.GROUPS:
        goals = getattr(runner, f"{group}_goals")()
        assert goals
        assert not any(g.met or g.measured is not None for g in goals)


def test_written_by_hand_agrees_with_the_model(load: Any) -> None:
    by_hand: ModuleType = load("by_hand")
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)).eval()
    inputs = (torch.randn(4, 6),)
    truth = by_hand.float64_outputs(model, inputs)
    assert truth[0].dtype == torch.float64
    assert model[0].weight.dtype == torch.float32, "the model itself was cast"
    for call in (by_hand.plain(model, inputs, torch.float32), by_hand.onnxruntime_session(model, inputs)):
        assert by_hand.worst_error(call, truth) < 1e-6
    if importlib.util.find_spec("openvino") is not None:
        assert by_hand.worst_error(by_hand.openvino_model(model, inputs), truth) < 1e-6
    assert 1e-6 < by_hand.worst_error(by_hand.plain(model, inputs, torch.bfloat16), truth) < 0.1
    assert by_hand.worst_error(lambda: [truth[0] * 1.5], truth) == pytest.approx(0.5)
