"""The GPU measurements as Markdown, from the results files alone: the README's table and docs/benchmarks-gpu.md's sections.

A results file is one of them where it has a "gpu_title"; a machine or a benchmark without a file has no section.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import gpu_tables  # noqa: E402
import tensorrt_tables  # noqa: E402

Render = Callable[[Sequence[str], Iterable[Sequence[object]]], str]
ORDER = (
    "fastertransformer_vit_b16_384", "fastertransformer_vit_l16_384", "fastertransformer_vit_b16_224",
    "fastertransformer_vit_l16_224", "vision_language_vit", "xformers_vit_small", "xformers_vit_b16_224",
    "xformers_vit_b16_1024", "fx2ait_encoder", "bert_tools", "bert_tools_padded",
)  # fmt: skip
HEADLINE = ("fastertransformer_vit_b16_384", "fx2ait_encoder", "bert_tools")
DOCUMENT = "docs/benchmarks-gpu.md"
BUILDS = "tensorrt_build"


def headline(results: Path, render: Render) -> str:
    """README's: ours beside the best peer of the same run and the floor; nothing where no GPU was measured."""
    parts = []
    for path, result in files(results, HEADLINE):
        for number, one in enumerate(gpu_tables.by_run(result)):
            table = gpu_tables.summary(one) if number == 0 else tensorrt_tables.engines(one)
            rows = [line for line in cells(table) if number == 0 or line[0] == "fp16"]
            if rows:
                words = "fp16" if number == 0 else "TensorRT, fp16"
                parts += [f"**{result['gpu_title']}, {words}**", render(table.columns, rows), origin(path, one)]
    if parts:
        parts.append(f"All candidates, precisions, errors, floors and plots: [{DOCUMENT}]({DOCUMENT}).")
    return "\n\n".join(parts)


def document(results: Path, render: Render) -> str:
    """docs/benchmarks-gpu.md's sections, one a results file."""
    published = json.loads((BENCHMARKS / "published.json").read_text())
    parts = []
    for path, result in files(results, ORDER):
        parts += [f"## {result['gpu_title']}", f"{result['description']}.", origin(path, result)]
        parts.append(gpu_tables.ceilings(result))
        if path.with_suffix(".png").exists():
            where = f"../benchmarks/results/{path.parent.name}/{path.stem}.png"
            parts.append(f"![{result['gpu_title']}: times as fast as PyTorch fp16]({where})")
        for table in gpu_tables.tables(result, published):
            parts += [f"**{table.title}**", render(table.columns, cells(table)), *table.notes]
    for path, result in files(results, (BUILDS,), "build_title"):
        parts += [f"## {result['build_title']}", origin(path, result)]
        for table in tensorrt_tables.builds(result):
            parts += [f"**{table.title}**", render(table.columns, cells(table)), *table.notes]
    return "\n\n".join(parts) or "Nothing is recorded yet."


def files(results: Path, names: Sequence[str], kind: str = "gpu_title") -> list[tuple[Path, dict[str, Any]]]:
    """The GPU results files of these names, machine by machine, in the names' order.

    Raises:
        SystemExit: one of a tiny run, whose numbers measure nothing; one that does not say where it comes from.
    """
    found = []
    for path in sorted(results.glob("*/*.json"), key=lambda p: (p.parent.name, _place(p.stem, names))):
        result = json.loads(path.read_text())
        if kind not in result or path.stem not in names:
            continue
        if result["tiny"]:
            raise SystemExit(f"{path} is from a run with --tiny, which measures nothing: delete it")
        if missing := [key for key in ("machine", "date", "versions") if not result.get(key)]:
            raise SystemExit(f"{path}: numbers of unknown origin: it lacks {', '.join(missing)}")
        found.append((path, result))
    return found


def cells(table: gpu_tables.Table) -> list[list[str]]:
    """An absent value is a dash."""
    return [["-" if cell is None else str(cell) for cell in row] for row in table.rows]


def origin(path: Path, result: dict[str, Any]) -> str:
    """Where the numbers come from; a sentence for each machine, date, environment and run."""
    sets = list(result.get("sets", {}).values()) or [result]
    sentences = list(dict.fromkeys(_origin(one) for one in sets))
    where = f"benchmarks/results/{path.parent.name}/{path.name}"
    return "; and ".join(sentences) + f"; from `{where}`."


def _origin(one: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in one["versions"].items())
    beside = one.get("gpus_at_once", 1)
    words = [
        *([f"run {one['run']}"] if "run" in one else []), one["machine"],
        *([f"{beside} GPUs at once, each with {one['threads']} processor threads"] if beside > 1 else []),
        *([f"accelkit's target `{one['target']}`"] if "target" in one else []), versions, one["date"],
    ]  # fmt: skip
    return "; ".join(words)


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)
