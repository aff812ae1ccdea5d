"""benchmarks/int8_accuracy.py on a tiny untrained ViT: rows, QAT, goals, figures; and the page made of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import ROOT, load, scripts_folders  # noqa: F401 - the fixture is for every test here

import accelkit

DEFAULT = "percentile 99.99"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelkit.checks.TIMING_SECONDS", 0.0)


def tiny_task() -> Any:
    models, vit = load("int8_models"), load("digits_vit")
    torch.manual_seed(0)
    model = vit.DigitsVit(vit.Settings(width=16, layers=1, heads=2)).eval()
    images, labels = torch.randn(12, 1, 8, 8), torch.randint(0, 10, (12,))
    exact = model(images).detach()

    def measure(quantised: Any) -> dict[str, float]:
        with torch.no_grad():
            error = models.relative(quantised(images), exact)
        return {"points": -error, "relative_error": error}

    def batches(epochs: int) -> Any:
        return (
            (part, answers)
            for _ in range(epochs)
            for part, answers in zip(images.split(4), labels.split(4), strict=True)
        )

    return models.Task("tiny", model, images, list(images.split(4)), measure, {}, {}, batches, ("images",))


def test_rows_are_of_schemes_calibrators_and_training() -> None:
    script = load("int8_accuracy")
    rows = script.rows_of(tiny_task(), "eager", ["ft2", "dynamic"], ["max", DEFAULT])
    assert [(r["scheme"], r["calibrator"]) for r in rows] == [
        ("original", None), ("ft2", "max"), ("ft2", DEFAULT), ("dynamic", None),
        ("ft2, 3 layers kept", rows[4]["calibrator"]), ("qat ft2", DEFAULT),
    ]  # fmt: skip
    assert rows[0]["points"] == 0
    assert all(row["failure"] is None for row in rows)
    assert all(-0.5 < row["points"] < 0 for row in rows[1:4])
    assert set(rows[1]["layers"]) >= {"layers.0.attention.qkv", "layers.0.up", "layers.0.down"}
    assert len(rows[4]["kept"]) == 3
    assert set(rows[4]["layers"]) == set(rows[1]["layers"]) - set(rows[4]["kept"])
    assert rows[5]["points"] != rows[2]["points"], "training changed nothing"


def test_a_row_that_fails_says_why() -> None:
    script, task = load("int8_accuracy"), tiny_task()
    row = script.measured(task, "eager", accelkit.Int8("ft1"), None)
    assert row == {"failure": row["failure"]}
    assert "needs calibration data" in row["failure"]


def test_goals_are_of_the_default_calibrator() -> None:
    goals = load("int8_accuracy").goals
    rows = [
        {"scheme": "original", "calibrator": None, "accuracy": 98.0},
        {"scheme": "ft1", "calibrator": "max", "points": -0.1},
        {"scheme": "ft1", "calibrator": DEFAULT, "points": 97.5 - 98.0},
        {"scheme": "ft2", "calibrator": DEFAULT, "points": -1.6},
    ]
    found = [(goal["measured"], goal["met"]) for goal in goals("digits", rows)]
    assert found == [(98.0, True), (-0.5, True), (-1.6, False), (None, False)]


def test_figures_of_embeddings() -> None:
    models = load("int8_models")
    torch.manual_seed(0)
    exact = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    same = models.embedding_figures(exact.clone(), exact)
    assert [same[k] for k in ("rank_correlation", "nearest_kept", "nearest_3_kept")] == pytest.approx([1.0, 1.0, 1.0])
    assert (same["cosine_min"], same["relative_error"], same["nearest_given_up"]) == pytest.approx((1.0, 0.0, 0.0))
    turned = models.embedding_figures(exact.flip(0), exact)
    assert turned["cosine_mean"] < 0.5
    assert turned["nearest_kept"] < 0.5
    assert turned["nearest_given_up"] > 0
    assert models.rank_correlation(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([3.0, 2.0, 1.0])) == pytest.approx(-1.0)
    assert models.rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 30.0, 20.0])) == pytest.approx(0.5)


def test_sentences_of_the_manual() -> None:
    models = load("int8_models")
    found = models.manual_sentences()
    assert len(found) == len(set(found)) > 64 + models.BATCHES * models.SENTENCE_BATCH
    assert all(5 <= len(one.split()) <= 60 and one.endswith(".") and "::" not in one for one in found)


def test_moved_digits_stay_digits() -> None:
    vit = load("digits_vit")
    images = 2 * torch.rand(6, 1, 8, 8) - 1
    generator = torch.Generator().manual_seed(0)
    still = vit.moved(images, vit.Settings(shift=0.0, turn=0.0), generator)
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)
    moved = vit.moved(images, vit.Settings(), generator)
    assert moved.shape == images.shape
    assert 0.01 < float((moved - images).abs().mean()) < 0.5
    assert float(moved.min()) >= -1 - 1e-5


def recorded(folder: Path, target: str, **facts: Any) -> None:
    rows = [
        {"scheme": "original", "calibrator": None, "failure": None, "accuracy": 98.0, "points": 0.0},
        {"scheme": "ft2", "calibrator": "max", "failure": None, "accuracy": 97.0, "points": -1.0,
         "layers": {"layers.0.up": 30.0, "layers.0.down": 21.23}, "against_emulation": 1e-3},
        {"scheme": "ft2", "calibrator": DEFAULT, "failure": "AccuracyError: too far"},
    ]  # fmt: skip
    goals = [{"goal": "PTQ ft2", "wanted": -1.5, "measured": None, "met": False}]
    content = {"model": "digits", "target": target, "title": "Digits", "machine": "2 cores", "date": "2026-01-01",
               "versions": {"torch": "2"}, "default_calibrator": DEFAULT, "goals": goals, "rows": rows}  # fmt: skip
    path = folder / "machine" / f"int8_accuracy_digits_{target}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | facts))


def test_the_page_shows_the_emulation_first_and_says_what_failed(tmp_path: Path) -> None:
    page, render = load("int8_page"), load("generate_tables").markdown_table
    assert page.document(tmp_path, render).startswith("Nothing is recorded yet")
    recorded(tmp_path, "alpha")
    recorded(tmp_path, "eager")
    text = page.document(tmp_path, render)
    assert text.index("## Digits: the emulation, in PyTorch") < text.index("## Digits: the target `alpha`")
    assert "| PTQ ft2 | at least -1.5 | - | no |" in text
    assert "| accuracy, % | 98.00 | - | - | - |" in text
    assert "| ft2 | max | 97.00 | -1.00 | - | - | 21.2, `layers.0.down` | 1.0e-03 |" in text
    assert "AccuracyError: too far" in text
    recorded(tmp_path, "eager", date="")
    with pytest.raises(SystemExit, match="unknown origin: it lacks date"):
        page.document(tmp_path, render)
