"""INT8's accuracy as Markdown, from benchmarks/results/*/int8_accuracy_<model>_<target>.json alone.

goals         goal, wanted, measured, met
seed's table  original, PTQ ft1, PTQ ft2, QAT ft2, each with its difference to the original
all rows      every scheme with every calibrator, the least signal-to-noise ratio and whose it is
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Render = Callable[[Sequence[str], Iterable[Sequence[object]]], str]
FIGURES: dict[str, dict[str, tuple[str, str]]] = {
    "digits": {
        "accuracy": ("accuracy, %", ".2f"),
        "points": ("points against float32", "+.2f"),
        "same_class": ("float32's class kept", ".2%"),
        "relative_error": ("error of the scores", ".1e"),
    },
    "minilm": {
        "cosine_mean": ("cosine, mean", ".4f"),
        "cosine_min": ("cosine, least", ".4f"),
        "rank_correlation": ("rank correlation of pairs", ".4f"),
        "nearest_kept": ("nearest neighbour kept", ".1%"),
        "nearest_3_kept": ("of the nearest 3 kept", ".1%"),
    },
}
COLUMNS = {"original": "original", "ft1": "PTQ ft1", "ft2": "PTQ ft2", "qat ft2": "QAT ft2"}
"""FasterTransformer's layout: the original, the two modes, and the finer of them trained."""


def document(results: Path, render: Render) -> str:
    """The sections, one a results file; the emulation's of each model first."""
    parts = []
    for path in sorted(results.glob("*/int8_accuracy_*.json"), key=_place):
        result = json.loads(path.read_text())
        if missing := [key for key in ("machine", "date", "versions", "title") if not result.get(key)]:
            raise SystemExit(f"{path}: numbers of unknown origin: it lacks {', '.join(missing)}")
        parts += section(path, result, render)
    return "\n\n".join(parts) or "Nothing is recorded yet: `python benchmarks/int8_accuracy.py` does it."


def section(path: Path, result: dict[str, Any], render: Render) -> list[str]:
    target, figures = result["target"], FIGURES[result["model"]]
    words = "the emulation, in PyTorch" if target == "eager" else f"the target `{target}`"
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    where = f"benchmarks/results/{path.parent.name}/{path.name}"
    return [
        f"## {result['title']}: {words}",
        f"{result['machine']}; {versions}; {result['date']}; from `{where}`.",
        render(("goal", "wanted", "measured", "met"), map(_goal, result["goals"])),
        f"**Calibrated with {result['default_calibrator']}**",
        _modes(result, figures, render),
        "**Every scheme and calibrator**",
        _everything(result, figures, render),
    ]


def _modes(result: dict[str, Any], figures: dict[str, tuple[str, str]], render: Render) -> str:
    rows = {r["scheme"]: r for r in result["rows"] if r["calibrator"] in (None, result["default_calibrator"])}
    lines = [
        [head, *(_cell(rows.get(scheme, {}).get(name), form) for scheme in COLUMNS)]
        for name, (head, form) in figures.items()
    ]
    return render(("", *COLUMNS.values()), lines)


def _everything(result: dict[str, Any], figures: dict[str, tuple[str, str]], render: Render) -> str:
    compared = any("against_emulation" in row for row in result["rows"])
    columns = ["scheme", "calibrator", *(head for head, _ in figures.values()), "least signal-to-noise, dB"]
    lines = []
    for row in result["rows"]:
        worst = min(row.get("layers", {}).items(), key=lambda pair: pair[1], default=None)
        noise = f"{worst[1]:.1f}, `{worst[0]}`" if worst else row.get("failure")
        line = [row["scheme"], row["calibrator"] or "", *(_cell(row.get(n), form) for n, (_, form) in figures.items())]
        more = [_cell(row.get("against_emulation"), ".1e")] if compared else []
        lines.append([*line, noise or "-", *more])
    return render([*columns, *(["against the emulation"] if compared else [])], lines)


def _goal(goal: dict[str, Any]) -> list[str]:
    measured = _cell(goal["measured"], ".4g")
    return [goal["goal"], f"at least {goal['wanted']:g}", measured, "yes" if goal["met"] else "no"]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _place(path: Path) -> tuple[str, str, bool, str]:
    _, _, model, target = path.stem.split("_", 3)
    return path.parent.name, model, target != "eager", target
