"""What stays in the build process from one job to the next: the library with its builder, and timing caches in memory.

    Library.start: import tensorrt, logger, builder --any number of jobs--> Library.begin: module, logger, builder

That is most of what a build costs besides its own work. TensorRT 8.6 on an H200: about 8 s until the builder's kernels are
loaded; then for two transformer layers 22.8 s the first time, 10.7 s again in that process, 3.2 s with the timing cache in
memory. Standard library and this folder only: the worker imports this file by itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from accelkit.backends.tensorrt.job import Failure, NodeFailure
    from accelkit.backends.tensorrt.plugin_libraries import load_plugins
else:
    from job import Failure, NodeFailure
    from plugin_libraries import load_plugins


class Refused(Exception):
    """There will be no plan."""

    def __init__(self, kind: str, message: str, nodes: tuple[NodeFailure, ...] = ()) -> None:
        super().__init__(message)
        self.failure = Failure(kind, message, nodes)


class Library:
    """TensorRT in this process.

    Attributes:
        versions: `tensorrt`.
        heard: the library's warnings and errors since the job began, each once. Those of the start are the first job's.
        errors: of these the errors, as often as they came.
    """

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.heard: list[str] = []
        self.errors: list[str] = []
        self._used = False
        self._why_not: Exception | None = None
        self._trt: Any = None
        self._logger: Any = None
        self._builder: Any = None

    def start(self) -> None:
        """Load it. What goes wrong is raised by `begin`: there is nobody to tell before the first job."""
        try:
            self._start()
        except Exception as error:  # noqa: BLE001 - see above
            self._why_not = error

    def begin(self, plugin_libraries: tuple[str, ...]) -> tuple[Any, Any, Any]:
        """The module `tensorrt`, its logger and its builder, for a job with these plugins.

        Raises:
            Refused: the library or a plugin does not load, or the GPU is not reached.
        """
        if self._used:
            self.heard, self.errors = [], []
        self._used = True
        if self._why_not is not None:
            raise self._why_not
        if plugin_libraries and (why := load_plugins(self._trt, self._logger, plugin_libraries)) is not None:
            raise Refused("plugin", why)
        return self._trt, self._logger, self._builder

    def hear(self, message: str, is_error: bool) -> None:
        message = " ".join(message.split())
        if is_error:
            self.errors.append(message)
        if message not in self.heard:
            self.heard.append(message)
            print(message, file=sys.stderr, flush=True)  # the parent quotes the last of them after a crash

    def last_words(self) -> str:
        return "; ".join(dict.fromkeys(self.errors[-3:] or self.heard[-2:]))

    @contextlib.contextmanager
    def aside(self) -> Iterator[list[str]]:
        """Errors that are heard meanwhile come here, and are none of the job's."""
        before = self.heard, self.errors
        self.heard, self.errors = [], []
        try:
            yield self.errors
        finally:
            self.heard, self.errors = before

    def _start(self) -> None:
        try:
            import tensorrt as trt
        except (ImportError, OSError, AttributeError) as error:
            raise Refused("library", f"tensorrt does not load in the build process: {error}") from error
        self.versions["tensorrt"] = str(trt.__version__)
        self._trt, self._logger = trt, self._listening(trt)
        if (why := load_plugins(trt, self._logger, ())) is not None:
            raise Refused("plugin", why)
        try:
            self._builder = trt.Builder(self._logger)
        except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer say nothing
            raise Refused("device", self.last_words() or str(error)) from error

    def _listening(self, trt: Any) -> Any:
        library = self
        severity = trt.ILogger.Severity
        failing = (severity.INTERNAL_ERROR, severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in failing or severity == trt.ILogger.Severity.WARNING:
                    library.hear(msg, severity in failing)

        return Logger()
