"""The README keeps its word: its code runs, its commands exist, its links lead somewhere, its tables are the code's."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tables", ROOT / "docs" / "generate_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_first_code_block_runs_as_it_stands(tmp_path: Path) -> None:
    block = code_blocks(README, "python")[0]
    assert 'target="onnxruntime"' in block
    (tmp_path / "block.py").write_text(block)
    done = subprocess.run([sys.executable, "block.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout, "the report that the block prints does not name the target"
    assert (tmp_path / "model.accel").stat().st_size > 0


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make (\w+)", README))
    assert {"demo", "test"} <= commands
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), f"README says `make {command}`, not so the Makefile"


def test_tables_are_those_of_the_code(tables: ModuleType) -> None:
    assert tables.render(README) == README, "README.md is out of date: run `make tables`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if not re.match(r"[a-z]+:", link):
            assert (document.parent / link).exists(), f"{document.name} links to {link}, which does not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_is_python(document: Path) -> None:
    for block in code_blocks(document.read_text(), "python"):
        compile(block, document.name, "exec")


def result_file(folder: Path, **changes: object) -> Path:
    result: dict[str, object] = {
        "title": "BERT-base, length 128",
        "machine": "2 cores of a CPU",
        "date": "2026-01-31",
        "versions": {"torch": "2.13.0"},
        "table": {"columns": ["batch", "eager, ms", "accelkit, ms"], "rows": [[1, 137.26, None], [8, 12345.6, 0.5]]},
        **changes,
    }
    path = folder / "benchmarks" / "results" / "some-machine" / "bert.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in result.items() if value is not None}))
    return path.parent.parent


def test_benchmark_table_comes_from_the_result_file(tables: ModuleType, tmp_path: Path) -> None:
    text = tables.benchmarks(result_file(tmp_path))
    assert text.splitlines() == [
        "**BERT-base, length 128**",
        "",
        "| batch | eager, ms | accelkit, ms |",
        "| --- | --- | --- |",
        "| 1 | 137 | - |",
        "| 8 | 12346 | 0.5 |",
        "",
        "2 cores of a CPU; torch 2.13.0; 2026-01-31; from `benchmarks/results/some-machine/bert.json`.",
    ]


def test_result_without_a_table_is_not_shown(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.benchmarks(result_file(tmp_path, table=None)) == "No recorded run yet: `make bench` makes one."


@pytest.mark.parametrize("key", ["machine", "date", "versions", "title"])
def test_numbers_of_unknown_origin_are_refused(tables: ModuleType, tmp_path: Path, key: str) -> None:
    with pytest.raises(SystemExit, match=f"lacks {key}"):
        tables.benchmarks(result_file(tmp_path, **{key: None}))


def test_ragged_table_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="other than 2 cells"):
        tables.benchmarks(result_file(tmp_path, table={"columns": ["a", "b"], "rows": [[1]]}))


def test_missing_and_unknown_markers_are_refused(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no place for these tables: targets"):
        tables.render(README.replace("<!-- table: targets -->", ""))
    with pytest.raises(SystemExit, match="unknown table 'colours'; known: targets"):
        tables.render("<!-- table: colours -->\n<!-- end -->\n" + README)
