"""A plot a results file: times as fast as plain fp16 PyTorch, over batch sizes, with the floor above all.

    python benchmarks/gpu_plots.py                # every GPU results file under benchmarks/results
    python benchmarks/gpu_plots.py FILE.json ...  # these

Writes <name>.png beside <name>.json. Needs matplotlib; the machine that was measured does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_tables import OURS, by_run, label, measured

RESULTS = Path(__file__).resolve().parent / "results"
PRECISION = "fp16"


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    for path in [Path(word) for word in given] or sorted(RESULTS.glob("*/*.json")):
        result = json.loads(path.read_text())
        if "gpu_title" in result and plot(result, path.with_suffix(".png")):
            print(f"wrote {path.with_suffix('.png')}")
    return 0


def lines(result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """label -> (batch, times as fast as plain PyTorch in fp16 in the same run); the floor's line last.

    Of a later run only the candidates that the first has not.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    floors = {}
    for one in by_run(result):
        rows, known = measured(one, PRECISION), set(found)
        plain = {r["batch"]: r["median_ms"] for r in rows if r["candidate"] == "eager"}
        for row in rows:
            name = label(result, row)
            if row["batch"] not in plain or name in known:
                continue
            found.setdefault(name, []).append((row["batch"], plain[row["batch"]] / row["median_ms"]))
            if "floor_ms" in row and not known:
                floors[row["batch"]] = plain[row["batch"]] / row["floor_ms"]
    if found:
        found = {name: sorted(points) for name, points in found.items()}
        found["the floor"] = sorted(floors.items())
    return found


def plot(result: dict[str, Any], path: Path) -> bool:
    """Draw and write; False where there is nothing to draw."""
    found = lines(result)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    ours = {name for key, name in result["labels"].items() if key.startswith(OURS)}
    for name, points in found.items():
        if not points:
            continue
        style: dict[str, Any] = {"color": "black", "linestyle": ":"} if name == "the floor" else {}
        width = 2.5 if name in ours else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=name, **style)
    batches = sorted({batch for points in found.values() for batch, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="batch size", ylabel=f"times as fast as PyTorch {PRECISION}", title=result["gpu_title"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
