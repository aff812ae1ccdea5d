"""Writes the tables of README.md and of documents in docs/ from the code and from benchmarks/results/.

    python docs/generate_tables.py            # rewrite them
    python docs/generate_tables.py --check    # exit with 1 if one would change

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of TABLES. No number or name in those
tables is written by hand, so that none can outlive the code or the run it came from.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest, mypy and build bring it to Python 3.10

sys.path.append(str(Path(__file__).resolve().parent))  # tests load this file by its path
import gpu_page
import int8_page

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GPU_DOCUMENT = ROOT / "docs" / "benchmarks-gpu.md"
OPERATORS_DOCUMENT = ROOT / "docs" / "fused-operators.md"
INT8_DOCUMENT = ROOT / "docs" / "quantisation-accuracy.md"
PYPROJECT = ROOT / "pyproject.toml"
RESULTS = ROOT / "benchmarks" / "results"
KERNEL_RESULTS = "kernel_choices.json"
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; a `|` inside a cell is escaped."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])


def first_line(thing: object) -> str:
    """The first paragraph of a docstring on one line, which is what a reader of a table has room for."""
    doc = inspect.getdoc(thing)
    if not doc:
        raise SystemExit(f"{thing!r} has no docstring, and the README's table needs its first line")
    return " ".join(doc.split("\n\n")[0].split())


def targets() -> str:
    """What `optimize(target=...)` takes, from the entry points of this distribution's own pyproject.toml."""
    from accelkit import plugins

    rows = []
    for name in own_entries(plugins.BACKENDS):
        backend = plugins.find(plugins.BACKENDS, name)
        if not backend.description:
            raise SystemExit(f"{backend!r} has no description, and the README's table needs one")
        kept = (backend.precisions, backend.devices)
        rows.append((f"`{name}`", f"`{backend.__name__}`", backend.description, *map(", ".join, kept)))
    return markdown_table(("target", "class", "what it does", "precisions", "devices"), rows)


def passes() -> str:
    """The standard passes: those of the default pipeline in its order, then the others."""
    from accelkit import plugins
    from accelkit_passes import DEFAULT

    others = [name for name in own_entries(plugins.PASSES) if name not in DEFAULT]
    rows = []
    for name in [*DEFAULT, *others]:
        cls = plugins.find(plugins.PASSES, name)
        rows.append((DEFAULT.index(name) + 1 if name in DEFAULT else "", f"`{name}`", first_line(cls)))
    return markdown_table(("default order", "pass", "what it does"), rows)


def precisions() -> str:
    """What `optimize(precision=...)` takes."""
    from accelkit.precision import Precision

    rows = [(f"`{p.name}`", f"`{p.dtype}`", p.description) for p in Precision.known.values()]
    return markdown_table(("precision", "dtype inside", "what it means"), rows)


def operators() -> str:
    """The fused operators: what each computes, in its module's words, and where it has other forms."""
    from accelkit.onnx_translations import DIALECTS, translations
    from accelkit.ops import OPERATORS

    forms = {dialect: translations(dialect) for dialect in DIALECTS}
    rows = []
    for name, operator in sorted(OPERATORS.items()):
        meaning = first_line(inspect.getmodule(operator.meaning))
        dialects = [dialect for dialect, known in forms.items() if operator.overload in known]
        rows.append((f"`{name}`", f"`{meaning}`", ", ".join(dialects)))
    return markdown_table(("operator", "what it computes", "ONNX dialects"), rows)


def benchmarks(results: Path = RESULTS) -> str:
    """README's tables of results: all but the long one of kernels, which docs/fused-operators.md has."""
    paths = [path for path in sorted(results.glob("*/*.json")) if path.name != KERNEL_RESULTS]
    return recorded(paths, results) or "No recorded run yet: `make bench` makes one."


def kernels(results: Path = RESULTS) -> str:
    """What each kernel took, by shape."""
    command = "`python benchmarks/kernel_choices.py` on a GPU"
    return (
        recorded(sorted(results.glob(f"*/{KERNEL_RESULTS}")), results) or f"No recorded run yet: {command} makes one."
    )


def recorded(paths: Iterable[Path], results: Path) -> str:
    """One table per `benchmarks/results/<machine>/<name>.json` that holds a "table", each with its machine and date.

    The contract with the benchmarks that write those files, keys of the JSON object:

        "title":    str                         heading of the table
        "machine":  str                         what it ran on, for a reader: "2 cores of AMD EPYC 9B14, 24 GiB"
        "date":     str                         YYYY-MM-DD
        "versions": {package: version}          those that bear on the numbers
        "table":    {"columns": [str, ...], "rows": [[str | number | null, ...], ...]}
                                                what documents show; units stand in the column's name

    Any other key is the benchmark's own. A file without "table" is not shown. One with a table but without
    the rest is an error: a number whose machine and date are unknown must not be shown.
    """
    parts = []
    for path in paths:
        result = json.loads(path.read_text())
        if "table" not in result:
            continue
        missing = [key for key in ("title", "machine", "date", "versions") if not result.get(key)]
        if missing:
            raise SystemExit(f"{path}: has a table for the README, but lacks {', '.join(missing)}")
        table = result["table"]
        ragged = [row for row in table["rows"] if len(row) != len(table["columns"])]
        if ragged:
            raise SystemExit(f"{path}: a row of the table has other than {len(table['columns'])} cells: {ragged[0]}")
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        parts += [
            f"**{result['title']}**",
            markdown_table(table["columns"], (map(number, row) for row in table["rows"])),
            f"{result['machine']}; {versions}; {result['date']}; from `{path.relative_to(results.parent.parent)}`.",
        ]
    return "\n\n".join(parts)


def number(value: Any) -> str:
    """A cell of a benchmark table: floats with three significant digits, an absent value as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        digits = f"{value:.3g}"
        return f"{value:.0f}" if "e+" in digits else digits
    return str(value)


def own_entries(group: str) -> list[str]:
    """Names that this distribution registers in a group, in pyproject.toml's order; a plug-in adds no row."""
    return list(tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][group])


def gpu() -> str:
    """README's GPU tables; nothing where no GPU was measured."""
    return gpu_page.headline(RESULTS, markdown_table)


def gpu_document() -> str:
    """The sections of docs/benchmarks-gpu.md."""
    return gpu_page.document(RESULTS, markdown_table)


def int8_document() -> str:
    """The sections of docs/quantisation-accuracy.md."""
    return int8_page.document(RESULTS, markdown_table)


TABLES: dict[str, Callable[[], str]] = {
    "targets": targets,
    "passes": passes,
    "precisions": precisions,
    "gpu": gpu,
    "benchmarks": benchmarks,
}
GPU_TABLES: dict[str, Callable[[], str]] = {"gpu-document": gpu_document}
OPERATORS_TABLES: dict[str, Callable[[], str]] = {"operators": operators, "kernels": kernels}
INT8_TABLES: dict[str, Callable[[], str]] = {"int8-accuracy": int8_document}
DOCUMENTS = {
    README: TABLES,
    GPU_DOCUMENT: GPU_TABLES,
    OPERATORS_DOCUMENT: OPERATORS_TABLES,
    INT8_DOCUMENT: INT8_TABLES,
}
"""Each file with tables, and those that have to stand in it."""


def render(text: str, tables: dict[str, Callable[[], str]] = TABLES, document: str = "README.md") -> str:
    """The text with every marked table made anew."""
    absent = [name for name in tables if f"<!-- table: {name} -->" not in text]
    if absent:
        places = "add `<!-- table: NAME -->` and `<!-- end -->`"
        raise SystemExit(f"{document} has no place for these tables: {', '.join(absent)}; {places}")

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise SystemExit(f"{document} asks for an unknown table {name!r}; known: {', '.join(tables)}")
        body = tables[name]()
        return f"{match[1]}{body}\n{match[4]}" if body else f"{match[1]}{match[4]}"

    return BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, tables in DOCUMENTS.items():
        before = path.read_text()
        after = render(before, tables, path.name)
        if before == after:
            continue
        if check:
            print(f"{path.name} is out of date: run `make tables`", file=sys.stderr)
            stale = 1
            continue
        path.write_text(after)
        print(f"{path.name} rewritten")
    return stale


if __name__ == "__main__":
    sys.exit(main())
