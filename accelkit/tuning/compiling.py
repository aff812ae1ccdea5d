"""Kernels compiled ahead by other processes, several at once, into the cache on disk that this process then reads.

    dry run (launches are noted, not made)  -->  compile_worker: one forked process a kernel  -->  Triton's cache

Triton compiles under Python's lock, so threads would take turns. Where there is no second process to be had, each kernel is
compiled when it is first launched, as always.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelkit.tuning.measuring import Task

_WORKER = "accelkit.tuning.compile_worker"


class Compiler:
    """Compiles the kernels of many candidates in other processes.

    Args:
        workers: how many at once; None: one for each processor that this process may use.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers if workers is not None else _processors()
        self._jobs: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}
        self._done: dict[int, str | None] = {}
        self._changed = threading.Condition()
        self._running = False
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Compiler:
        if self.workers > 1 and sys.executable and hasattr(os, "fork"):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 15)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    @property
    def available(self) -> bool:
        """Whether other processes compile."""
        return self._process is not None

    def note(self, task: Task) -> list[int]:
        """The numbers of the compilations that a task's candidates need; nothing is launched."""
        numbers: list[int] = []
        if not self.available:
            return numbers
        try:
            trial = task.trial()
        except RuntimeError:  # no memory: the measuring says so
            return numbers
        for config in task.candidates():
            noted: list[dict[str, Any]] = []
            with _launches_noted(noted), contextlib.suppress(Exception):  # what fails here fails again where it is told
                trial.run(config, 0)
            for job in noted:
                text = json.dumps(job, sort_keys=True)
                if text not in self._numbers:
                    self._numbers[text] = len(self._jobs)
                    self._jobs.append(job | {"number": len(self._jobs)})
                numbers.append(self._numbers[text])
        return numbers

    def go(self) -> None:
        """Compile what was noted, in that order."""
        if self._process is None or self._process.stdin is None:
            return
        from triton.runtime import driver

        target = driver.active.get_current_target()
        order = {"workers": self.workers, "target": [target.backend, target.arch, target.warp_size], "jobs": self._jobs}
        with contextlib.suppress(BrokenPipeError):  # it could not start: `wait` does not wait
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def wait(
        self, numbers: Sequence[int], until: float, told: Callable[[int, int], None] = lambda done, all: None
    ) -> None:
        """Wait for these compilations; no longer than `until` (time.monotonic), nor when the other process has gone."""
        with self._changed:
            while self._running and (left := [n for n in numbers if n not in self._done]):
                told(len(self._done), len(self._jobs))
                remaining = until - time.monotonic()
                if remaining <= 0 or not left:
                    return
                self._changed.wait(min(remaining, 1.0))

    def _start(self) -> None:
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError:  # no second process here: this one compiles
            return
        self._running = True
        threading.Thread(target=self._listen, name="accelkit-compiler", daemon=True).start()

    def _listen(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                report = json.loads(line)
                with self._changed:
                    self._done[report["number"]] = report["error"]
                    self._changed.notify_all()
        except ValueError:  # the pipe was closed, or holds no JSON: nothing more will come
            pass
        with self._changed:
            self._running = False
            self._changed.notify_all()


@contextlib.contextmanager
def _launches_noted(noted: list[dict[str, Any]]) -> Iterator[None]:
    """Launches of kernels that are not compiled yet are noted and not made, in this thread alone."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    runtime: Any = knobs.runtime
    me, before = threading.get_ident(), runtime.jit_cache_hook

    def hook(*args: Any, **kwargs: Any) -> bool | None:
        if threading.get_ident() != me:
            return None if before is None else before(*args, **kwargs)
        function, data = kwargs["fn"], kwargs["compile"]["specialization_data"]
        noted.append({"module": function.module, "name": function.name, "data": data})
        return True

    runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        runtime.jit_cache_hook = before


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
