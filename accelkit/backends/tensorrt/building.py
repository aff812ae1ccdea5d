"""Building an engine: the job goes to the GPU's build process, and what went wrong comes back in words.

    BuildJob --workers.py, worker.py in a process of its own--> plan (bytes), BuildResult

A build takes seconds to minutes, holds the library's locks, and in TensorRT 8.6 cannot be interrupted. In a process of its
own Ctrl-C, the time limit, the out-of-memory killer and a crash of the library leave the caller's process as it was, and
nothing half-written. That process stays for a while, because the next build in it is several times as quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accelkit.backends.tensorrt import workers
from accelkit.backends.tensorrt.job import BuildJob, BuildResult, Failure, NodeFailure
from accelkit.errors import LoweringError


def build_plan(
    job: BuildJob, *, say: Callable[[str], None] = lambda words: None, time_limit_s: float | None = None
) -> tuple[bytes, BuildResult]:
    """Build the engine that `job` describes, in another process.

    Args:
        job: `job.plan` is filled in here; temporary files lie in a folder beside `job.onnx` and are gone afterwards.
        say: called about every second with what is being done, such as `TensorRT building, 23 s`.
        time_limit_s: the build is stopped after so many seconds, not counting those that it waits for other builds on this GPU;
            None for no limit.

    Returns:
        The plan (empty for `start_only` and `parse_only`), and what the worker found.

    Raises:
        LoweringError: there is no plan; the message says why. Where the parser refuses nodes, `nodes` maps their ONNX names to
            what it says of them.
        KeyboardInterrupt: passed on, after the build process has been ended.
    """
    started = time.monotonic()
    if not sys.executable:
        raise LoweringError("TensorRT builds run in a process of their own, and this Python has no executable to start")
    job = _absolute(job)
    if job.gpu_lock is None and not (job.start_only or job.parse_only):
        job = dataclasses.replace(job, gpu_lock=gpu_lock_path(job.device))
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=Path(job.onnx).parent) as folder:
            job = dataclasses.replace(job, plan=str(Path(folder, "engine.plan")))
            path = Path(folder, "job.json")
            path.write_text(job.to_json())
            result = workers.run(job, path, say, time_limit_s)
            result.seconds["total"] = time.monotonic() - started
            if result.failure is not None:
                raise _error(job, result, result.failure)
            return (b"" if job.parse_only or job.start_only else Path(job.plan).read_bytes()), result
    except OSError as error:
        raise LoweringError(
            f"TensorRT's build of {job.onnx} failed in its files or in starting its process: {error}; it needs room for the engine "
            "beside the ONNX file"
        ) from error


def warm(device: int = 0) -> None:
    """Start the GPU's build process if there is none, and return at once: it loads the library while the caller goes on."""
    if sys.executable:
        with contextlib.suppress(OSError):  # the build tries again, and says why
            workers.warm(device)


def stop_workers() -> None:
    """End the build processes, which free their GPU memory: those that wait for a job now, others after their build."""
    workers.stop()


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


def gpu_lock_path(device: int) -> str | None:
    """The file that builds of all processes of this user lock in turn; None without a GPU or a folder for it."""
    import torch

    from accelkit.cache import EngineCache

    folder = EngineCache(max_bytes=0).folder
    if folder is None or not torch.cuda.is_available():
        return None
    return str(folder / "timing" / f"gpu-{torch.cuda.get_device_properties(device).uuid}")


def _absolute(job: BuildJob) -> BuildJob:
    """The process may have been started in another folder."""
    cache = job.timing_cache
    return dataclasses.replace(
        job,
        onnx=os.path.abspath(job.onnx),
        timing_cache=None if cache is None else os.path.abspath(cache),
        plugin_library=tuple(map(os.path.abspath, job.plugin_library)),
    )


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
