"""The files of tuned choices: whole, mergeable, readable by people, shared by processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from fake_problems import ENVIRONMENT

from accelkit.errors import AccelkitWarning, CacheError
from accelkit.tuning import files


def entry(rows: int, choice: str = "fast") -> files.Entry:
    return {"kind": "fake", "problem": {"rows": rows}, "choice": choice}


def test_one_line_a_problem_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "h200.json"
    files.merge(path, ENVIRONMENT, [entry(1), entry(2)])
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert content["environment"]["gpu"] == "NVIDIA H200"
    assert files.environment_in(path)["driver"] == "580.1"
    assert sum('"rows"' in line for line in path.read_text().splitlines()) == 2


def test_entries_replace_those_of_the_same_problem(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    files.merge(path, ENVIRONMENT, [entry(1), entry(2)])
    files.merge(path, ENVIRONMENT, [entry(2, "slow"), entry(3)])
    assert files.read(path) == [entry(1), entry(2, "slow"), entry(3)]
    assert {p.name for p in tmp_path.iterdir()} <= {"h200.json", "h200.lock"}


def _write(path: Path, first: int) -> None:
    for rows in range(first, first + 20):
        files.merge(path, ENVIRONMENT, [entry(rows)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, first)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            json.loads(path.read_text())  # whole at any time
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(e["problem"]["rows"] for e in files.read(path)) == [*range(20), *range(100, 120)]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "entries": [3]}', '{"format": 1, "entries": {}}', "\0" * 40]
)
def test_a_damaged_file_is_a_warning_and_written_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "h200.json"
    path.write_text(text)
    with pytest.warns(AccelkitWarning, match="cannot be read from .*; the rules decide until"):
        assert files.read(path) == []
    assert files.environment_in(path) == {}
    files.merge(path, ENVIRONMENT, [entry(1)])
    assert files.read(path) == [entry(1)]


def test_another_format_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "h200.json"
    path.write_text('{"format": 2, "entries": "of another kind"}')
    assert files.read(path) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(AccelkitWarning, match="could not be kept in"):
        files.merge(tmp_path / "file" / "h200.json", ENVIRONMENT, [entry(1)])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h200.json"
    files.merge(path, ENVIRONMENT, [entry(1)])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(AccelkitWarning, match="No space left on device"):
        files.merge(path, ENVIRONMENT, [entry(2)])
    assert files.read(path) == [entry(1)]
    assert not list(tmp_path.glob("*.tmp"))


def test_clear() -> None:
    folder = files.folder()
    assert folder == Path(os.environ["ACCELKIT_CACHE_DIR"]) / "tuning"
    assert files.paths() == []
    assert files.clear() == 0
    for name in ("a", "b"):
        files.merge(folder / f"{name}.json", ENVIRONMENT, [entry(1)])
    (folder / "notes.txt").write_text("the user's own")
    assert files.clear() == 2
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_clear_says_what_it_cannot_remove() -> None:
    (Path(os.environ["ACCELKIT_CACHE_DIR"]) / "tuning" / "a.json").mkdir(parents=True)
    with pytest.raises(CacheError, match="cannot remove"):
        files.clear()


def test_the_kernels_are_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import accelkit.kernels

    files._kernels.cache_clear()
    before = files._kernels()
    (tmp_path / "linear.py").write_text("another kernel")
    monkeypatch.setattr(accelkit.kernels, "__file__", str(tmp_path / "__init__.py"))
    files._kernels.cache_clear()
    assert files._kernels() != before
    files._kernels.cache_clear()
