"""Progress: on a terminal only, late, and never in the way."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import pytest

import accelkit.progress
from accelkit.progress import Progress


class Terminal:
    """Standard error that says it is a terminal and keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(accelkit.progress, "DELAY_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def work(progress: Progress, seconds: float, terminal: Any) -> None:
    # here and not in the fixture: pytest puts its own standard error in place when the test begins
    with contextlib.redirect_stderr(terminal), progress.running("optimizing Model"), progress.stage("capture"):
        time.sleep(seconds)


def test_a_long_build_is_shown_with_its_stage(terminal: Any) -> None:
    pytest.importorskip("rich.console").Console().status("")  # imported beforehand: that may take longer than the work
    work(Progress(), 0.5, terminal)
    assert "optimizing Model: capture" in terminal.text


def test_a_short_one_is_not(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelkit.progress, "DELAY_S", 5.0)
    work(Progress(), 0.02, terminal)
    assert terminal.text == ""


def test_switched_off_or_no_terminal_is_silent(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work(Progress(enabled=False), 0.1, terminal)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    work(Progress(), 0.1, terminal)
    assert terminal.text == ""


def test_without_rich_it_works_in_silence(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    work(Progress(), 0.1, terminal)
    assert terminal.text == ""


def test_stages_are_timed_even_when_they_fail() -> None:
    seconds: dict[str, float] = {}
    progress = Progress()

    def fail() -> None:
        with progress.stage("lowering", seconds):
            time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seconds["lowering"] >= 0.01
