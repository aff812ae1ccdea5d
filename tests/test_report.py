"""The report as text and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, optimize
from torch import nn


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.dropout(torch.sin(self.one(x)), 0.5, False))


@pytest.fixture(scope="module")
def fast() -> Any:
    return optimize(Model(), torch.randn(2, 4), target=Planted(refuse=frozenset({"sin"})), passes=("remove_dropout",))


@pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")
def test_the_text_has_what_a_user_asks_for(fast: Any) -> None:
    text = str(fast.report())
    for words in (
        "Model -> planted",
        "fp32",
        "captured   4 operators",
        "remove_dropout",
        "4 -> 3",
        "in PyTorch 1 operators",
        "left alone: sin: aten.sin.default: planted refusal of sin",
        "engine     1 operators on planted (compiled",
        "error      output: ",
        "against float64",
        "latency    original ",
        "times as fast",
        "built in ",
        "capture ",
        "x [2, 4]",
    ):
        assert words in text, f"{words!r} is not in:\n{text}"
    assert repr(fast.report()) == text


def test_json_is_plain_data_and_says_the_same(fast: Any, tmp_path: Path) -> None:
    report = fast.report()
    report.save(tmp_path / "r.json")
    report.save(tmp_path / "r.txt")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data == json.loads(json.dumps(report.to_json()))
    (variant,) = data["variants"]
    assert variant["torch_operators"] == 1
    assert [p["operators"] for p in variant["pieces"]] == [1, 1]
    assert variant["ledger"][0]["name"] == "remove_dropout"
    assert variant["speedup"] == pytest.approx(
        variant["timings"]["original"]["median_ms"] / variant["timings"]["compiled"]["median_ms"], rel=0.01
    )
    assert variant["accuracy"][0]["ok"] is True
    assert set(variant["seconds"]) == {"capture", "passes", "lowering", "checks"}
    assert (tmp_path / "r.txt").read_text() == str(report) + "\n"


def test_many_refusals_are_gathered_by_reason() -> None:
    class Many(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(6):
                x = torch.sin(x)
            return x

    report = optimize(Many(), torch.randn(2), target=Planted(refuse=frozenset({"sin"}))).report()
    assert "left alone: sin, sin_1, sin_2 and 3 more: aten.sin.default: planted refusal of sin" in str(report)
