"""A timing cache of the build process: an object of the library that stays in memory, and its file.

    before a build: memory + what is new in the file --> config        after it: memory + what others wrote --> file

The object is worth more than its file. 8.6 on an H200 does not load again what it wrote for a transformer ("Myelin error from
unknown graph", and then the whole file is refused, in whatever process), while the object in memory halves the next build. So
nothing is written that the library does not load: the file keeps what it had, and the rest lives as long as the process.
Standard library and this folder only: the worker imports this file by itself.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from accelkit.backends.tensorrt import timing_cache
    from accelkit.backends.tensorrt.worker_library import Library
else:
    import timing_cache
    from worker_library import Library

LOCK_TIMEOUT_S = 30.0


class Timings:
    """The timing cache of one file.

    Attributes:
        notes: what is to be told of it with this build.
        bytes_before, bytes_after: of what was measured, around the latest build.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.notes: list[str] = []
        self.bytes_before = self.bytes_after = 0
        self._cache: Any = None
        self._origin: Any = None  # the config that made it, kept because nothing says that the library can do without
        self._on_disk = b""  # what the file held when it was last read or written
        self._refused = False  # the file is one that the library does not load
        self._loads = True  # the library loads what it wrote itself

    def use(self, library: Library, builder: Any, config: Any) -> None:
        """Have the build read it and add to it."""
        found, note = timing_cache.read(self.path)
        self.notes = [note] if note else []
        if self._on_disk and not found and not note:
            self._cache = None  # removed: what it held is not to be used again
        if found and found != self._on_disk:
            read, why = self._loaded(library, builder, found)
            self._refused = bool(why)
            if why:
                self.notes.append(f"TensorRT does not load the timing cache {self.path}, which is replaced: {why}")
            else:
                self._add(read)
        self._on_disk = found
        if self._cache is None:
            self._origin = builder.create_builder_config()
            self._cache = self._origin.create_timing_cache(b"")
            self.bytes_before = 0
        else:
            self.bytes_before = len(bytes(self._cache.serialize()))
        config.set_timing_cache(self._cache, False)

    def keep(self, library: Library, builder: Any) -> None:
        """Put what was measured into the file, beside what other processes put there meanwhile."""
        data = bytes(self._cache.serialize())
        self.bytes_after = len(data)
        if not self._loads:
            return
        try:
            with timing_cache.locked(self.path, LOCK_TIMEOUT_S) as why:
                if why:
                    self.notes.append(f"the timing cache {self.path} keeps nothing of this build: {why}")
                    return
                now, _ = timing_cache.read(self.path)
                if now and now != self._on_disk:
                    read, why = self._loaded(library, builder, now)
                    if not why:
                        self._add(read)
                        data = bytes(self._cache.serialize())
                if data != now:
                    self._write(library, builder, data)
        except OSError as error:
            self.notes.append(f"the timing cache {self.path} could not be written: {error.strerror or error}")

    def _write(self, library: Library, builder: Any, data: bytes) -> None:
        _, why = self._loaded(library, builder, data)
        if not why:
            timing_cache.write(self.path, data)
            self._on_disk = data
            return
        self._loads = False
        self.notes.append(
            f"what TensorRT measured for the timing cache stays in the build process, and is not written to {self.path}: it would "
            f"not load it again ({why})"
        )
        if self._refused:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            self._on_disk = b""

    def _add(self, read: tuple[Any, Any]) -> None:
        if self._cache is None:
            self._origin, self._cache = read
        else:
            self._cache.combine(read[1], False)

    def _loaded(self, library: Library, builder: Any, data: bytes) -> tuple[tuple[Any, Any], str]:
        """A config and the cache that it makes of these bytes, and why the library does not take them (empty where it does)."""
        config = builder.create_builder_config()
        with library.aside() as errors:
            cache = config.create_timing_cache(data)
            fits = cache is not None and config.set_timing_cache(cache, False)
        why = "; ".join(dict.fromkeys(errors)) or ("" if fits else "it is of another TensorRT or GPU")
        return (config, cache), why
