"""The build processes that stay: one for each GPU, started early, lent to one build at a time, ended when idle.

    job.json --the GPU's process, or a new one--> messages --> BuildResult

Why it stays: see worker_library. Why one for each GPU: the builder times kernels, and two that build at once on one GPU time
each other. So builds from several threads take turns here; those of several processes do by a file lock around the
builder's call (`BuildJob.gpu_lock`), which leaves starting, parsing and writing side by side.

A process is ended: after `IDLE_S` without a job; when a build is interrupted, takes longer than it may, or fails in a way that
may have left the library or the GPU's memory in disorder; when the next job needs another environment, or none of the plugins
that it has loaded; by `stop`; and by itself when its standard input is closed, which the end of this process does. It is in a
session of its own, so that the terminal's Ctrl-C reaches this process alone. In a forked child there are none, and what it
inherits of ours is closed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from accelkit.backends.tensorrt.job import BuildJob, BuildResult
from accelkit.backends.tensorrt.worker_process import SAY_EVERY_S, GoneError, WorkerProcess

IDLE_S = 60.0
WORKER = Path(__file__).with_name("worker.py")
HARMLESS = ("parse", "option", "disk")  # kinds of failure after which the process goes on
MATTERS = re.compile(r"CUDA|CUDNN|CUBLAS|NVIDIA|TENSORRT|TRT|^LD_|^PYTHON")
"""Environment variables that decide what a build process does: with other values it takes another process."""

Say = Callable[[str], None]


def run(job: BuildJob, path: Path, say: Say, time_limit_s: float | None) -> BuildResult:
    """What the GPU's process makes of the job that lies in the file `path`.

    Raises:
        LoweringError: the process died, or took longer than `time_limit_s`.
        OSError: no process can be started.
    """
    environment = environment_of(job.device)
    return _gpu(environment).run(job, path, environment, say, time_limit_s)


def warm(device: int) -> None:
    """Start the GPU's process, if there is none, and do not wait for it.

    Raises:
        OSError: no process can be started.
    """
    environment = environment_of(device)
    _gpu(environment).warm(environment)


def stop() -> None:
    """End all processes: idle ones now, others after their build."""
    with _guard:
        gpus = list(_gpus.values())
    for gpu in gpus:
        gpu.stop()


def environment_of(device: int) -> dict[str, str]:
    """Ours, with the same modules to be found, and with no other GPU than the job's."""
    environment = dict(os.environ)
    paths = [*environment.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in paths if path))
    visible = [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    environment["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
    environment.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch sets it, but only once it uses the GPU
    return environment


class _Gpu:
    """One GPU's process, and whose turn it is."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: WorkerProcess | None = None
        self._timer: threading.Timer | None = None
        self._stops = False

    def run(
        self, job: BuildJob, path: Path, environment: dict[str, str], say: Say, time_limit_s: float | None
    ) -> BuildResult:
        waited = self._take_turn(say)
        try:
            result = self._run(job, path, environment, say, time_limit_s)
        finally:
            self._turn.release()
            if self._stops:
                self.stop()
        if waited or "wait" in result.seconds:
            result.seconds["wait"] = waited + result.seconds.get("wait", 0.0)
        return result

    def _run(
        self, job: BuildJob, path: Path, environment: dict[str, str], say: Say, time_limit_s: float | None
    ) -> BuildResult:
        plugins = _stamps(job.plugin_library)
        try:
            while True:
                process, is_new = self._fitting(environment, plugins)
                try:
                    result = process.run(job, path, say, time_limit_s, may_be_gone=not is_new)
                    break
                except GoneError:  # it died since its last job, or never heard of this one
                    self._end()
        except BaseException:
            self._end(at_work=True)
            raise
        process.plugins |= plugins
        if result.failure is None or result.failure.kind in HARMLESS:
            self._idle_from_now()
        else:
            self._end()
        return result

    def warm(self, environment: dict[str, str]) -> None:
        if not self._turn.acquire(blocking=False):
            return  # it is at work, and then here
        try:
            self._fitting(environment, None)
            self._idle_from_now()
        finally:
            self._turn.release()

    def stop(self) -> None:
        self._stops = True
        if self._turn.acquire(blocking=False):
            try:
                self._end()
                self._stops = False
            finally:
                self._turn.release()

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        if self._process is not None:
            self._process.forget()

    def _take_turn(self, say: Say) -> float:
        """Seconds until other threads had their builds."""
        if self._turn.acquire(blocking=False):
            return 0.0
        started = time.monotonic()
        while not self._turn.acquire(timeout=SAY_EVERY_S):
            say(f"TensorRT waiting for another build on this GPU, {time.monotonic() - started:.0f} s")
        return time.monotonic() - started

    def _fitting(
        self, environment: dict[str, str], plugins: frozenset[tuple[str, int, int]] | None
    ) -> tuple[WorkerProcess, bool]:
        """The process, and whether it is new. It may have loaded no other plugins than these; None: whichever."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        command = (sys.executable, str(WORKER))
        key = (command, frozenset(item for item in environment.items() if MATTERS.search(item[0])))
        process = self._process
        fits = process is not None and process.key == key and (plugins is None or process.plugins <= plugins)
        if process is not None and fits and process.is_alive():
            return process, False
        self._end()
        self._process = process = WorkerProcess(command, environment, key)
        return process, True

    def _idle_from_now(self) -> None:
        self._timer = threading.Timer(IDLE_S, self._end_if_idle)
        self._timer.daemon = True
        self._timer.start()

    def _end_if_idle(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                if self._timer is threading.current_thread():  # else there was a job meanwhile
                    self._end()
            finally:
                self._turn.release()

    def _end(self, at_work: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        process, self._process = self._process, None
        if process is not None:
            process.end(at_work=at_work)


def _stamps(paths: tuple[str, ...]) -> frozenset[tuple[str, int, int]]:
    """Plugin libraries as they are now: one that was compiled anew takes a process that has not loaded the old one."""
    found = set()
    for path in paths:
        with contextlib.suppress(OSError):  # the build says that there is no such file
            facts = os.stat(path)
            found.add((path, facts.st_mtime_ns, facts.st_size))
    return frozenset(found)


_gpus: dict[str, _Gpu] = {}  # by what the process sees as its GPU
_guard = threading.Lock()


def _gpu(environment: dict[str, str]) -> _Gpu:
    with _guard:
        return _gpus.setdefault(environment["CUDA_VISIBLE_DEVICES"], _Gpu())


def _forget() -> None:
    global _guard
    _guard = threading.Lock()  # another thread may have held it
    for gpu in _gpus.values():
        gpu.forget()
    _gpus.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
