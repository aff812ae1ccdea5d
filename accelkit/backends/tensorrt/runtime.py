"""A plan as an engine of the library: loaded once, with the library's own words where it refuses.

plan --deserialize--> ICudaEngine
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any

from accelkit.backends.tensorrt.plugin_libraries import load_plugins
from accelkit.errors import LoweringError


@functools.cache
def log_of(tensorrt: Any) -> Any:
    """The process's logger for the library: it prints nothing and keeps the latest errors; `last()` is the latest, or ''.

    One for all engines: the library takes the first that it is given for everything that belongs to no engine.
    """
    errors = (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR)

    class Log(tensorrt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: collections.deque[str] = collections.deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                self.errors.append(" ".join(msg.split()))

        def clear(self) -> None:
            self.errors.clear()

        def last(self) -> str:
            return self.errors[-1] if self.errors else ""

    return Log()


def said(log: Any) -> str:
    """`: ` and the library's latest error, or nothing."""
    return f": {log.last()}" if log.last() else ""


def deserialised(
    tensorrt: Any, plan: bytes, plugin_libraries: Sequence[str] = (), *, host_code: bool = False
) -> tuple[Any, Any]:
    """The engine, and the runtime that it needs for as long as it lives.

    Args:
        plan: hashed and checked against this machine before (manifest.py).
        host_code: the plan holds code for the processor too (version-compatible plans), which may be run.

    Raises:
        LoweringError: the library refuses it.
    """
    log = log_of(tensorrt)
    log.clear()
    if (why := load_plugins(tensorrt, log, plugin_libraries)) is not None:
        raise LoweringError(f"the engine cannot be loaded: {why}")
    runtime = tensorrt.Runtime(log)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise LoweringError(f"TensorRT {tensorrt.__version__} does not load the engine{said(log)}")
    return engine, runtime
