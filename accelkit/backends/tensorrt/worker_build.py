"""One build in the build process.

    ONNX file --parse--> network --profile, flags, timing cache--> builder --> plan file, BuildResult

Standard library and this folder only: the worker imports this file by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from accelkit.backends.tensorrt import timing_cache, versions
    from accelkit.backends.tensorrt.job import BuildJob, BuildResult, Failure, NodeFailure
    from accelkit.backends.tensorrt.worker_library import Library, Refused
    from accelkit.backends.tensorrt.worker_timings import Timings
else:
    import timing_cache
    import versions
    from job import BuildJob, BuildResult, Failure, NodeFailure
    from worker_library import Library, Refused
    from worker_timings import Timings

Say = Callable[[dict[str, Any]], None]

MAX_WARNINGS = 50
GPU_LOCK_TIMEOUT_S = 600.0  # then another process is taken to be stuck
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


def run(job: BuildJob, library: Library, timings: dict[str, Timings], say: Say) -> BuildResult:
    """Build; whatever goes wrong is in the result.

    Args:
        library: started; it serves all jobs of a process.
        timings: timing caches by file, which stay from job to job.
        say: is given each message for the parent.
    """
    build = Build(job, library, timings, say)
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
        dict(library.versions),
        tuple(library.heard[:MAX_WARNINGS]),
        failure,
        build.timing_cache_bytes,
        tuple(build.notes),
    )


class Build:
    """One build, from the job to the plan on disk."""

    def __init__(self, job: BuildJob, library: Library, timings: dict[str, Timings], say: Say) -> None:
        self.job, self.library, self.timings, self.say = job, library, timings, say
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.timing_cache_bytes: tuple[int, int] | None = None

    def run(self) -> None:
        trt, logger, builder = self.library.begin(self.job.plugin_library)
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
            timings = self._use_timing_cache(builder, config)
            monitor = versions.set_progress_monitor(trt, config, self._progress)
            with self._gpu_locked():
                plan = builder.build_serialized_network(network, config)
            del monitor  # it has to outlive the build
            if plan is None:
                raise self._build_failure()
        self.seconds["build"] -= self.seconds.get("wait", 0.0)
        with self._stage("write", "writing"):
            with open(self.job.plan, "wb") as file:
                file.write(plan)
            if timings is not None:
                self._keep_timing_cache(timings, builder)

    # --- parse

    def _parse_failure(self, parser: Any) -> Refused:
        found = [versions.refused_node(parser.get_error(i)) for i in range(parser.num_errors)]
        nodes = tuple(NodeFailure(**node) for node in found)
        return Refused("parse", self.library.last_words() or "the file, without saying why", nodes)

    # --- configure

    def _configure(self, trt: Any, config: Any) -> None:
        job = self.job
        versions.set_precision(trt, config, job.precision, job.tf32)
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
        versions.demand(trt, config, network, set(self.job.demanded), self.job.precision)
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
            raise Refused("option", f"it does not take the profile {self.job.profile}: {self.library.last_words()}")

    def _use_timing_cache(self, builder: Any, config: Any) -> Timings | None:
        """What the build reads and adds to; None without one."""
        path = self.job.timing_cache
        if path is None:
            return None
        timings = self.timings.setdefault(path, Timings(path))
        timings.use(self.library, builder, config)
        return timings

    def _keep_timing_cache(self, timings: Timings, builder: Any) -> None:
        timings.keep(self.library, builder)
        self.notes += timings.notes
        self.timing_cache_bytes = (timings.bytes_before, timings.bytes_after)

    # --- build and write

    def _progress(self, phase: str, done: int, of: int) -> None:
        self.say({"phase": phase, "done": done, "of": of})

    def _build_failure(self) -> Refused:
        lack = next((message for message in self.library.heard if OUT_OF_MEMORY.search(message)), None)
        if lack is not None:
            return Refused("memory", lack)
        return Refused("build", self.library.last_words() or "it gave no reason")

    @contextlib.contextmanager
    def _gpu_locked(self) -> Iterator[None]:
        """While the builder times kernels no other process does so on this GPU: each would time the other's load as well."""
        path = self.job.gpu_lock
        if path is None:
            yield
            return
        started = time.monotonic()
        with contextlib.ExitStack() as held:
            if why := held.enter_context(timing_cache.locked(path, timeout_s=0)):
                self.say({"stage": "waiting for another build on this GPU", "waits": True})
                why = held.enter_context(timing_cache.locked(path, timeout_s=GPU_LOCK_TIMEOUT_S))
                self.seconds["wait"] = time.monotonic() - started
                self.say({"stage": "building"})
            if why:
                self.notes.append(
                    f"other builds on this GPU may have disturbed what TensorRT measured: {path} was not locked, {why}"
                )
            yield

    @contextlib.contextmanager
    def _stage(self, name: str, words: str) -> Iterator[None]:
        self.say({"stage": words})
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - started


@functools.cache  # the libraries stay as they are
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
