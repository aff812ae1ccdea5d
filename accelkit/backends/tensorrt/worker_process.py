"""The parent's end of one build process: start it, give it jobs, follow them, end it.

path of a job.json --standard input--> worker.py --standard output, a JSON message a line--> BuildResult
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from accelkit.backends.tensorrt.job import BuildJob, BuildResult
from accelkit.backends.tensorrt.timing_cache import temporary_path
from accelkit.errors import LoweringError

SAY_EVERY_S = 1.0
GRACE_S = 2.0  # between asking the process to end and killing it
STDERR_LINES = 40  # what is kept of what the library and Python print: enough for a traceback


class GoneError(Exception):
    """The process had ended before it took the job."""


class WorkerProcess:
    """A process that runs worker.py.

    Attributes:
        key: whoever has another key needs another process.
        plugins: what has been loaded there for earlier jobs.
    """

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], key: object) -> None:
        self.key = key
        self.plugins: frozenset[Any] = frozenset()
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._said: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._is_ready = False
        self._timing_cache: str | None = None
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # plain files: a forked child can close them without the locks that a buffer has
            env=environment,
            start_new_session=True,
        )
        self._threads = [
            threading.Thread(target=self._read_messages, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(
        self, job: BuildJob, path: Path, say: Callable[[str], None], time_limit_s: float | None, *, may_be_gone: bool
    ) -> BuildResult:
        """Give it a job and follow it to the end.

        Args:
            path: where the job lies as JSON.
            may_be_gone: the process has been idle, and may have ended of itself.

        Raises:
            GoneError: it had.
            LoweringError: it ended at the job, or took longer than it may: `end` it then.
        """
        self._timing_cache = job.timing_cache
        was_ready = self._is_ready
        if was_ready:  # what it said until now is of no interest any more
            self._said.clear()
            while not self._messages.empty():
                if self._messages.get() is None:
                    raise GoneError
        with contextlib.suppress(OSError):  # it has ended: then its messages end, too
            _stream(self._process.stdin).write(json.dumps(str(path)).encode() + b"\n")
        following = _Following(say, time_limit_s, "parsing" if was_ready else "starting")
        while True:
            try:
                message = self._messages.get(timeout=following.due_s())
            except queue.Empty:
                continue
            if message is None:
                if may_be_gone and not following.is_taken:
                    raise GoneError
                raise LoweringError(self._death(following.stage))
            if "result" in message:
                result = BuildResult.from_json(message["result"])
                return dataclasses.replace(result, seconds={"start": following.start_s, **result.seconds})
            following.hear(message)

    def end(self, *, at_work: bool = False) -> None:
        """End it if it still runs, and remove what it may have left half-written."""
        process = self._process
        with contextlib.suppress(OSError):
            _stream(process.stdin).close()  # this ends it, unless the library keeps it from noticing
        for act in (process.terminate, process.kill) if at_work else (lambda: None, process.terminate, process.kill):
            act()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
                break
        else:
            process.wait()
        for thread in self._threads:
            thread.join(GRACE_S)
        if self._timing_cache is not None:
            with contextlib.suppress(OSError):
                temporary_path(self._timing_cache, process.pid).unlink()

    def forget(self) -> None:
        """In a forked child: hold nothing of it open, so that it ends with its parent; it is no child of ours to wait for."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                _stream(stream).close()
        self._process.returncode = 0

    def _death(self, stage: str) -> str:
        self._threads[1].join(GRACE_S)  # until all that it said is read
        code = self._process.returncode
        last = "; the last it said: " + " | ".join(self._said) if self._said else ""
        if code == -signal.SIGKILL:
            return (
                "the process that builds with TensorRT was killed (SIGKILL): on Linux that is the machine running out of memory "
                f"(RAM, not the GPU's); free some, or build a smaller part{last}"
            )
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return (
                f"TensorRT crashed while {stage} ({name}); this process is unharmed. Known remedies: another TensorRT version, "
                f"optimization_level below 3, leaving plugin libraries out{last}"
            )
        return f"the process that builds with TensorRT ended with status {code} and without a result{last}"

    def _read_messages(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            with contextlib.suppress(ValueError):  # a line cut short by a crash
                message = json.loads(line)
                self._is_ready = self._is_ready or "ready" in message
                self._messages.put(message)
        self._process.wait()  # it has ended: no zombie is left, even if nobody asks for it again
        self._messages.put(None)

    def _read_errors(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            if text := line.decode(errors="replace").strip():
                self._said.append(text[:500])


class _Following:
    """How far a job is, told about every second, and whether it has taken longer than it may."""

    def __init__(self, say: Callable[[str], None], time_limit_s: float | None, stage: str) -> None:
        self.say, self.time_limit_s, self.stage = say, time_limit_s, stage
        self.started = self._next_words = time.monotonic()
        self.start_s = 0.0
        self.is_taken = False
        self._share = ""
        self._waited_s = 0.0  # for other builds: it is not counted
        self._waits_since: float | None = None

    def due_s(self) -> float:
        """Say what is due; seconds until it is again."""
        now = time.monotonic()
        left = float("inf")
        if self.time_limit_s is not None and self._waits_since is None:
            left = self.started + self._waited_s + self.time_limit_s - now
        if left <= 0:
            raise LoweringError(
                f"TensorRT was still {self.stage} after the {self.time_limit_s:g} s that the build may take, and was stopped: "
                "raise time_limit_s, lower optimization_level, or keep a timing cache, which makes the next build shorter"
            )
        if now >= self._next_words:
            self.say(f"TensorRT {self.stage}{self._share}, {now - self.started:.0f} s")
            self._next_words = now + SAY_EVERY_S
        return max(0.0, min(left, self._next_words - now))

    def hear(self, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "ready" in message:
            self.start_s = now - self.started
            return
        self.is_taken = True
        if "stage" in message:
            if message["stage"] != self.stage:
                self.stage, self._share, self._next_words = message["stage"], "", now
            if self._waits_since is not None:
                self._waited_s += now - self._waits_since
            self._waits_since = now if message.get("waits") else None
        elif message.get("of"):
            self._share = f" {100 * message['done'] // message['of']} %"


def _stream(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise OSError("no pipe")  # all three are pipes
    return pipe


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines as they come, to the end; then the stream is closed."""
    with stream:
        rest = b""
        while data := stream.read(2**16):
            *lines, rest = (rest + data).split(b"\n")
            yield from lines
        if rest:
            yield rest
