"""The parent's side of a build: run the worker, tell how far it is, and say what went wrong.

    BuildJob --worker.py in a process of its own--> plan (bytes), BuildResult

A build takes seconds to minutes, holds the library's locks, and in TensorRT 8.6 cannot be interrupted. In a process of its
own Ctrl-C, the time limit, the out-of-memory killer and a crash of the library leave the caller's process as it was, and
nothing half-written. The worker imports TensorRT only, so that it starts in a fraction of a second; it is in a session of its
own, so that the terminal's Ctrl-C reaches the parent alone, which then ends it; and it ends by itself when the parent is gone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from accelkit.backends.tensorrt.job import BuildJob, BuildResult, Failure, NodeFailure
from accelkit.backends.tensorrt.timing_cache import temporary_path
from accelkit.errors import LoweringError

SAY_EVERY_S = 1.0
GRACE_S = 2.0  # between asking the worker to end and killing it
WORKER = Path(__file__).with_name("worker.py")
STDERR_LINES = 40  # what is kept of what the library and Python print: enough for a traceback


def build_plan(
    job: BuildJob, *, say: Callable[[str], None] = lambda words: None, time_limit_s: float | None = None
) -> tuple[bytes, BuildResult]:
    """Build the engine that `job` describes, in another process.

    Args:
        job: `job.plan` is filled in here; temporary files lie in a folder beside `job.onnx` and are gone afterwards.
        say: called about every second with what is being done, such as `TensorRT building, 23 s`.
        time_limit_s: the build is stopped after so many seconds; None for no limit.

    Returns:
        The plan (empty for `start_only` and `parse_only`), and what the worker found.

    Raises:
        LoweringError: there is no plan; the message says why. Where the parser refuses nodes, `nodes` maps their ONNX names to
            what it says of them.
        KeyboardInterrupt: passed on, after the worker has been ended.
    """
    started = time.monotonic()
    if not sys.executable:
        raise LoweringError("TensorRT builds run in a process of their own, and this Python has no executable to start")
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=Path(job.onnx).parent) as folder:
            job = dataclasses.replace(job, plan=str(Path(folder, "engine.plan")))
            with _running(job, Path(folder)) as worker:
                worker.follow(say, time_limit_s)
            result = worker.result()
            result.seconds["total"] = time.monotonic() - started
            if result.failure is not None:
                raise _error(job, result, result.failure)
            return (b"" if job.parse_only or job.start_only else Path(job.plan).read_bytes()), result
    except OSError as error:
        raise LoweringError(
            f"TensorRT's build of {job.onnx} failed in its files: {error}; it needs room for the engine beside the ONNX file"
        ) from error


def start_failure(device: int = 0) -> str | None:
    """Why TensorRT does not start on this GPU and what to do about it, or None.

    Asked in a process of its own: 8.6's runtime crashes where the driver is older than the CUDA that it was built for.
    """
    with tempfile.TemporaryDirectory(prefix="accelkit-tensorrt-") as folder:
        try:
            build_plan(BuildJob(str(Path(folder, "none.onnx")), device=device, start_only=True))
        except LoweringError as error:
            return str(error)
    return None


def timing_cache_path(version: str, device: int) -> Path | None:
    """The timing cache in accelkit's cache folder for this TensorRT, GPU and driver; None where the user has no such folder."""
    import torch

    from accelkit.cache import EngineCache
    from accelkit.tuning.files import environment_of

    folder = EngineCache(max_bytes=0).folder
    if folder is None:
        return None
    gpu = environment_of(torch.device("cuda", device))
    words = f"tensorrt {version} {gpu.gpu} {gpu.capability} driver {gpu.driver}".lower()
    name = "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())
    return folder / "timing" / f"{name}.cache"


# --- the process


class _Worker:
    """A worker that has been started."""

    def __init__(self, process: subprocess.Popen[bytes], job: BuildJob) -> None:
        self.process, self.job = process, job
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._said: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._threads = [
            threading.Thread(target=self._read_messages, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def follow(self, say: Callable[[str], None], time_limit_s: float | None) -> None:
        """Until it ends, or has taken longer than it may."""
        started = time.monotonic()
        stage, share, next_words = "starting", "", started
        while True:
            now = time.monotonic()
            left = float("inf") if time_limit_s is None else started + time_limit_s - now
            if left <= 0:
                raise LoweringError(
                    f"TensorRT was still {stage} after the {time_limit_s:g} s that the build may take, and was stopped: raise "
                    "time_limit_s, lower optimization_level, or keep a timing cache, which makes the next build shorter"
                )
            if now >= next_words:
                say(f"TensorRT {stage}{share}, {now - started:.0f} s")
                next_words = now + SAY_EVERY_S
            try:
                message = self._messages.get(timeout=max(0.0, min(left, next_words - now)))
            except queue.Empty:
                continue
            if message is None:
                break
            if "stage" in message:
                stage, share, next_words = message["stage"], "", 0.0
            elif message.get("of"):
                share = f" {100 * message['done'] // message['of']} %"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)

    def end(self) -> None:
        """End it if it still runs, and remove what it may have left half-written."""
        process = self.process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.job.timing_cache is not None:
            with contextlib.suppress(OSError):
                temporary_path(self.job.timing_cache, process.pid).unlink()

    def result(self) -> BuildResult:
        """What it wrote before it ended."""
        try:
            return BuildResult.from_json(Path(self.job.plan).with_name("result.json").read_text())
        except (OSError, ValueError, KeyError) as error:
            raise LoweringError(self._death()) from error

    def _death(self) -> str:
        code = self.process.returncode
        last = "; the last it said: " + " | ".join(self._said) if self._said else ""
        if code == -signal.SIGKILL:
            return (
                "the process that builds with TensorRT was killed (SIGKILL): on Linux that is the machine running out of memory "
                f"(RAM, not the GPU's); free some, or build a smaller part{last}"
            )
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return (
                f"TensorRT crashed while building ({name}); this process is unharmed. Known remedies: another TensorRT version, "
                f"optimization_level below 3, leaving plugin libraries out{last}"
            )
        return f"the process that builds with TensorRT ended with status {code} and without a result{last}"

    def _read_messages(self, stream: IO[bytes]) -> None:
        for line in stream:
            with contextlib.suppress(ValueError):  # a line cut short by a crash
                message = json.loads(line)
                self._messages.put(message)
        self._messages.put(None)

    def _read_errors(self, stream: IO[bytes]) -> None:
        for line in stream:
            if text := line.decode(errors="replace").strip():
                self._said.append(text[:500])


@contextlib.contextmanager
def _running(job: BuildJob, folder: Path) -> Iterator[_Worker]:
    """A worker at its job; it is ended on the way out, whatever happened."""
    path = folder / "job.json"
    path.write_text(job.to_json())
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(path)],
        stdin=subprocess.PIPE,  # never written to: the worker ends when it is closed, by us or by our end
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(job.device),
        start_new_session=True,
    )
    worker = _Worker(process, job)
    try:
        yield worker
    finally:
        worker.end()


def _environment(device: int) -> dict[str, str]:
    """Ours, with the same modules to be found, and with no other GPU than the job's."""
    environment = dict(os.environ)
    paths = [path for path in (environment.get("PYTHONPATH"), *sys.path) if path]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    visible = [entry for entry in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    environment["CUDA_VISIBLE_DEVICES"] = visible[device] if device < len(visible) else str(device)
    return environment


# --- what went wrong, in words


def _error(job: BuildJob, result: BuildResult, failure: Failure) -> LoweringError:
    library = f"TensorRT {result.versions.get('tensorrt', '')}".strip()
    if failure.kind == "parse":
        nodes = _with_names(job.onnx, failure.nodes)
        refused = "; ".join(_node_text(node) for node in nodes[:5]) or failure.message
        more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
        reasons = {node.name: f"{library}'s parser refuses it: {node.message}" for node in nodes if node.name}
        return LoweringError(f"{library}'s parser refuses {refused}{more}", reasons)
    if failure.kind == "memory":
        workspace = "all memory" if job.workspace_bytes is None else f"{job.workspace_bytes / 2**30:.1f} GiB"
        return LoweringError(
            f"{library} ran out of memory while building ({failure.message}): free memory on GPU {job.device}, lower workspace_gib "
            f"(now {workspace}), or build for smaller shapes"
        )
    if failure.kind == "device":
        return LoweringError(
            f"{library} does not start on GPU {job.device}: {failure.message}; where that is a CUDA initialization failure, the "
            "driver is older than the CUDA that this TensorRT was built for (nvidia-smi shows the newest that it runs): update "
            "the driver, or install the TensorRT package for its CUDA"
        )
    remedies = {
        "build": "see the library's own words; a lower optimization_level or other tactic_sources often help",
        "disk": "free room beside the ONNX file, or set TMPDIR to a folder with more",
        "plugin": "check plugin_libraries: the path, and that the library was built for this TensorRT",
        "option": "leave the option out, or install a version that has it",
    }
    remedy = remedies.get(failure.kind)
    return LoweringError(f"{library} built no engine: {failure.message}" + (f"; {remedy}" if remedy else ""))


def _node_text(node: NodeFailure) -> str:
    what = " ".join([node.operator or "node", repr(node.name)] if node.name else ["node", str(node.index)])
    return f"{what}: {node.message}"


def _with_names(path: str, nodes: tuple[NodeFailure, ...]) -> tuple[NodeFailure, ...]:
    """With the names and operators that this version of the parser does not tell, read from the file."""
    if all(node.name and node.operator for node in nodes):
        return nodes
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    named = []
    for node in nodes:
        if 0 <= node.index < len(graph.node):
            there = graph.node[node.index]
            node = dataclasses.replace(node, name=node.name or there.name, operator=node.operator or there.op_type)
        named.append(node)
    return tuple(named)
