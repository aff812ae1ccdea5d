"""The build process: `python worker.py job.json`.

    ONNX file --parse--> network --profile, flags, timing cache--> builder --> plan file, result.json

Started by accelkit.backends.tensorrt.building. It imports TensorRT and the small files beside it, neither torch nor accelkit,
and tells how far it is in lines of JSON on standard output: {"stage": "parsing"}, {"phase": "...", "done": 3, "of": 20}.
What the library itself prints goes to standard error. Every foreseen failure is written to result.json; anything else
(a crash, a kill) is for the parent to notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from accelkit.backends.tensorrt import timing_cache, versions
    from accelkit.backends.tensorrt.job import BuildJob, BuildResult, Failure, NodeFailure
    from accelkit.backends.tensorrt.plugin_libraries import load_plugins
else:
    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, _folder)
    import timing_cache
    import versions
    from job import BuildJob, BuildResult, Failure, NodeFailure
    from plugin_libraries import load_plugins

    while _folder in sys.path:  # what TensorRT imports must not be found among the other files here
        sys.path.remove(_folder)

Say = Callable[[dict[str, Any]], None]

MAX_WARNINGS = 50
OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|memory is insufficient|insufficient memory|MemoryAllocation|bad_alloc|"
    r"GPU memory \(\d+ bytes\) could not be allocated",
    re.IGNORECASE,
)
# How each outside library makes a handle, and unmakes it: one that loads may be a stub, or not fit the driver. Only 8.6 uses
# them by default, and it comes for CUDA 12 and for CUDA 11.
HANDLES = {
    "cublas": (("libcublas.so.12", "libcublas.so.11"), "cublasCreate_v2", "cublasDestroy_v2"),
    "cublas_lt": (("libcublasLt.so.12", "libcublasLt.so.11"), "cublasLtCreate", "cublasLtDestroy"),
    "cudnn": (("libcudnn.so.8",), "cudnnCreate", "cudnnDestroy"),
}


class Refused(Exception):
    """There will be no plan."""

    def __init__(self, kind: str, message: str, nodes: tuple[NodeFailure, ...] = ()) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message, nodes)


def main(path: str) -> None:
    say = _own_standard_output()
    _end_with_parent()
    with open(path, encoding="utf-8") as file:
        job = BuildJob.from_json(file.read())
    result = run(job, say)
    with open(os.path.join(os.path.dirname(job.plan), "result.json"), "w", encoding="utf-8") as file:
        file.write(result.to_json())
    sys.stderr.flush()
    os._exit(0)  # all is written: the library's own end takes time and has been seen to crash


def run(job: BuildJob, say: Say) -> BuildResult:
    """Build; whatever goes wrong is in the result."""
    build = Build(job, say)
    failure = None
    try:
        build.run()
    except Refused as error:
        failure = error.failure
    except versions.NotInThisVersionError as error:
        failure = Failure("option", str(error))
    except MemoryError:
        failure = Failure("memory", "the machine's memory is full")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        failure = Failure("disk" if full else "worker", f"{error.filename or job.plan}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - the parent raises it, with these words
        at = traceback.extract_tb(error.__traceback__)[-1]
        failure = Failure(
            "worker", f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}, line {at.lineno})"
        )
    return BuildResult(
        build.seconds,
        build.versions,
        tuple(build.heard[:MAX_WARNINGS]),
        failure,
        build.timing_cache_bytes,
        tuple(build.notes),
    )


class Build:
    """One build, from the job to the plan on disk."""

    def __init__(self, job: BuildJob, say: Say) -> None:
        self.job, self.say = job, say
        self.seconds: dict[str, float] = {}
        self.versions: dict[str, str] = {}
        self.heard: list[str] = []  # warnings and errors, each once
        self.errors: list[str] = []
        self.notes: list[str] = []
        self.usable_bytes = 0  # of the timing cache
        self.timing_cache_bytes: tuple[int, int] | None = None

    def run(self) -> None:
        with self._stage("start", "starting"):
            trt, logger, builder = self._start()
        if self.job.start_only:
            return
        with self._stage("parse", "parsing"):
            network = builder.create_network(versions.network_flags(trt))
            parser = trt.OnnxParser(network, logger)
            if not parser.parse_from_file(self.job.onnx):
                raise self._parse_failure(parser)
        if self.job.parse_only:
            return
        with self._stage("build", "building"):
            config = builder.create_builder_config()
            self._configure(trt, config)
            self._configure_network(trt, builder, config, network)
            cache, found = self._use_timing_cache(config)
            monitor = versions.set_progress_monitor(trt, config, self._progress)
            plan = builder.build_serialized_network(network, config)
            del monitor  # it has to outlive the build
            if plan is None:
                raise self._build_failure()
        with self._stage("write", "writing"):
            with open(self.job.plan, "wb") as file:
                file.write(plan)
            if cache is not None and self.job.timing_cache is not None:
                self._keep_timing_cache(self.job.timing_cache, config, cache, found)

    # --- start

    def _start(self) -> tuple[Any, Any, Any]:
        try:
            import tensorrt as trt
        except (ImportError, OSError, AttributeError) as error:
            raise Refused("library", f"tensorrt does not load in the build process: {error}") from error
        self.versions["tensorrt"] = str(trt.__version__)
        logger = self._logger(trt)
        if (why := load_plugins(trt, logger, self.job.plugin_library)) is not None:
            raise Refused("plugin", why)
        try:
            return trt, logger, trt.Builder(logger)
        except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer say nothing
            raise Refused("device", self._last_words() or str(error)) from error

    def _logger(self, trt: Any) -> Any:
        build = self
        severity = trt.ILogger.Severity
        failing = (severity.INTERNAL_ERROR, severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in failing or severity == trt.ILogger.Severity.WARNING:
                    build.hear(msg, severity in failing)

        return Logger()

    def hear(self, message: str, is_error: bool) -> None:
        message = " ".join(message.split())
        if is_error:
            self.errors.append(message)
        if message not in self.heard:
            self.heard.append(message)
            print(message, file=sys.stderr, flush=True)  # the parent quotes the last of them after a crash

    def _last_words(self) -> str:
        return "; ".join(dict.fromkeys(self.errors[-3:] or self.heard[-2:]))

    # --- parse

    def _parse_failure(self, parser: Any) -> Refused:
        found = [versions.refused_node(parser.get_error(i)) for i in range(parser.num_errors)]
        nodes = tuple(NodeFailure(**node) for node in found)
        return Refused("parse", self._last_words() or "the file, without saying why", nodes)

    # --- configure

    def _configure(self, trt: Any, config: Any) -> None:
        job = self.job
        versions.set_precision(trt, config, job.precision)
        for wanted, flag in (
            (job.refittable, trt.BuilderFlag.REFIT),
            (job.sparse_weights, trt.BuilderFlag.SPARSE_WEIGHTS),
            (job.version_compatible, trt.BuilderFlag.VERSION_COMPATIBLE),
        ):
            if wanted:
                config.set_flag(flag)
        if job.hardware_compatible == "ampere_plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if job.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
        if job.optimization_level is not None:
            config.builder_optimization_level = job.optimization_level
        if job.max_aux_streams is not None:
            config.max_aux_streams = job.max_aux_streams
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the proof of precision reads the layers
        if job.tactic_sources is not None:
            config.set_tactic_sources(versions.tactic_source_mask(trt, job.tactic_sources))
        else:
            self._leave_out_missing_libraries(trt, config)

    def _leave_out_missing_libraries(self, trt: Any, config: Any) -> None:
        """The default sources, less those whose library does not start here: with them the build would fail."""
        mask = config.get_tactic_sources()
        missing = {}
        for name, bit in versions.outside_sources(trt).items():
            if mask & bit and (why := _no_handle(*HANDLES[name])) is not None:
                mask &= ~bit
                missing[name] = why
        if missing:
            config.set_tactic_sources(mask)
            self.notes.append(f"built without tactics from {', '.join(missing)}: {next(iter(missing.values()))}")

    def _configure_network(self, trt: Any, builder: Any, config: Any, network: Any) -> None:
        if left := versions.keep_fp32(trt, config, network, set(self.job.keep_fp32)):
            self.notes.append(f"of the nodes to keep in fp32 the network has no layer for {', '.join(sorted(left))}")
        if not self.job.profile:
            return
        inputs = [network.get_input(i).name for i in range(network.num_inputs)]
        profile = builder.create_optimization_profile()
        for name, shapes in self.job.profile.items():
            if name not in inputs:
                raise Refused(
                    "option", f"the profile has shapes for {name!r}; the network's inputs are {', '.join(inputs)}"
                )
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise Refused("option", f"it does not take the profile {self.job.profile}: {self._last_words()}")

    def _use_timing_cache(self, config: Any) -> tuple[Any, bytes]:
        """The cache that the build reads and adds to, and what the file held; None without a file."""
        path = self.job.timing_cache
        if path is None:
            return None, b""
        found, note = timing_cache.read(path)
        cache = config.create_timing_cache(found) if found else None
        if found and (cache is None or not config.set_timing_cache(cache, False)):
            note, cache = f"the timing cache {path} is of another TensorRT or GPU, and is replaced", None
        if note:
            self.notes.append(note)
        self.usable_bytes = 0 if cache is None else len(found)
        if cache is None:
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return cache, found

    # --- build and write

    def _progress(self, phase: str, done: int, of: int) -> None:
        self.say({"phase": phase, "done": done, "of": of})

    def _build_failure(self) -> Refused:
        lack = next((message for message in self.heard if OUT_OF_MEMORY.search(message)), None)
        if lack is not None:
            return Refused("memory", lack)
        return Refused("build", self._last_words() or "it gave no reason")

    def _keep_timing_cache(self, path: str, config: Any, cache: Any, found: bytes) -> None:
        """Put what was measured into the file, beside what other processes put there meanwhile."""
        try:
            with timing_cache.locked(path) as mine:
                if not mine:
                    self.notes.append(f"the timing cache {path} could not be locked, and keeps nothing of this build")
                    return
                now, _ = timing_cache.read(path)
                if now and now != found and (others := config.create_timing_cache(now)) is not None:
                    cache.combine(others, False)
                data = bytes(cache.serialize())
                if data != now:
                    timing_cache.write(path, data)
        except OSError as error:
            self.notes.append(f"the timing cache {path} could not be written: {error.strerror or error}")
            return
        self.timing_cache_bytes = (self.usable_bytes, len(data))

    @contextlib.contextmanager
    def _stage(self, name: str, words: str) -> Iterator[None]:
        self.say({"stage": words})
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - started


# --- the process


def _own_standard_output() -> Say:
    """Lines for the parent on what was standard output; what anything else prints there goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()  # the progress monitor is called from the builder's threads

    def say(message: dict[str, Any]) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            channel.write(json.dumps(message) + "\n")

    return say


def _end_with_parent() -> None:
    """Standard input is a pipe that nothing is written to: it ends when the parent closes it, or is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _no_handle(libraries: tuple[str, ...], make: str, unmake: str) -> str | None:
    """Why none of these libraries can be used, or None: one of them must load and make a handle on this GPU."""
    reasons = []
    for library in libraries:
        handle = ctypes.c_void_p()
        try:
            loaded = ctypes.CDLL(library)
            status = getattr(loaded, make)(ctypes.byref(handle))
            if status == 0:
                getattr(loaded, unmake)(handle)
                return None
            reasons.append(f"{library} loads, but {make} gives status {status}")
        except (OSError, AttributeError) as error:
            reasons.append(str(error))
    return "; ".join(reasons)


if __name__ == "__main__":
    main(sys.argv[1])
