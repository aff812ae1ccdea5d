"""Progress on a terminal: one line that says what is being done, shown only when it takes longer than two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DELAY_S = 2.0


class Progress:
    """A status line (rich), silent when standard error is no terminal, when rich is missing, or when switched off."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._lock = threading.Lock()
        self._status: Any = None
        self._running = False
        self._started = 0.0
        self._what, self._words = "", ""

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Show `what` while the region runs, from its third second on."""
        if not self.enabled or not sys.stderr.isatty():
            yield
            return
        self._what, self._started, self._running = what, time.perf_counter(), True
        timer = threading.Timer(DELAY_S, self._show)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._running = False
                if self._status is not None:
                    self._status.stop()
                    self._status = None

    def _show(self) -> None:
        with self._lock:
            if not self._running:
                return
            try:
                from rich.console import Console
            except ImportError:
                return
            self._status = Console(stderr=True).status(self._line())
            self._status.start()

    def _line(self) -> str:
        return f"{self._what}: {self._words}" if self._words else self._what

    def say(self, words: str) -> None:
        """What is being done now."""
        with self._lock:
            self._words = words
            if self._status is not None:
                self._status.update(f"{self._line()} ({time.perf_counter() - self._started:.0f} s)")

    @contextmanager
    def stage(self, name: str, seconds: dict[str, float] | None = None) -> Iterator[Stage]:
        """Say the stage's name and time it; its seconds are kept in `seconds[name]` and in the yielded value."""
        self.say(name)
        timed = Stage()
        started = time.perf_counter()
        try:
            yield timed
        finally:
            timed.seconds = time.perf_counter() - started
            if seconds is not None:
                seconds[name] = timed.seconds


class Stage:
    """A timed stage; `seconds` is set when it ends."""

    seconds: float = 0.0
