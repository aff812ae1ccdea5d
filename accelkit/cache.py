"""Engines on disk, by their content's name, so that the same build happens once.

    engine_key(...) --> folder/engines/<key>.engine: an artifact file (accelkit.artifact) with the engine's blobs and
    facts

Every entry is whole and hashed: an entry that was truncated, changed or left half-written is removed with a warning and
built again. Entries are replaced by renames, so that any number of processes share a folder. A cache that cannot be
read or written (read-only, full, no home folder) costs a warning, never a build.

    >>> import tempfile
    >>> cache = EngineCache(tempfile.mkdtemp())
    >>> with cache.building("0123abcd"):                # a second process waits here, and then finds the entry
    ...     if (blobs := cache.get("0123abcd")) is None:
    ...         cache.put("0123abcd", {"model.onnx": b"an engine"}, {"backend": "onnxruntime"})
    >>> cache.get("0123abcd"), cache.facts("0123abcd")
    ({'model.onnx': b'an engine'}, {'backend': 'onnxruntime'})
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelkit import artifact
from accelkit.errors import AccelkitWarning, ArtifactError, CacheError, InputError

DEFAULT_MAX_BYTES = 10 * 2**30
STALE_S = 3600.0  # a temporary file this old was left by a process that died
_KEY = re.compile(r"[A-Za-z0-9_\-]{1,128}")
_TEMPORARY = re.compile(r"\.[A-Za-z0-9_\-]{1,128}\.engine\.\d+-[0-9a-f]+\.tmp")


@dataclass(frozen=True)
class Entry:
    """One engine in the cache: its key, its size on disk, when it was last used (seconds since 1970)."""

    key: str
    size_bytes: int
    last_used: float


class EngineCache:
    """A folder of engines, bounded in size: the least recently used go first.

    Args:
        folder: where; None for the environment's ACCELKIT_CACHE_DIR, else the user's cache folder.
        max_bytes: the bound; None for the environment's ACCELKIT_CACHE_MAX_BYTES, else 10 GiB.
        lock_timeout_s: how long `building` waits for another process.

    Raises:
        InputError: ACCELKIT_CACHE_MAX_BYTES is no number.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
        *,
        lock_timeout_s: float = 600.0,
    ) -> None:
        self.folder = Path(folder) if folder is not None else _default_folder()
        self.max_bytes = max_bytes if max_bytes is not None else _default_max_bytes()
        self.lock_timeout_s = lock_timeout_s

    # --- what a build uses: never raises for the folder's sake

    def get(self, key: str) -> dict[str, bytes] | None:
        """The engine's blobs, each checked against its hash, or None. A damaged entry is removed with a warning."""
        path = self._path(key)
        if path is None:
            return None
        while True:
            before = _inode(path)
            try:
                blobs = _blobs(artifact.read(path))
            except ArtifactError as error:
                if _inode(path) != before:
                    continue  # another process replaced or evicted it meanwhile
                self._refuse(path, error)
                return None
            with contextlib.suppress(OSError):  # a read-only cache serves as well, it only forgets when it was used
                os.utime(path)
            return blobs

    def put(self, key: str, blobs: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
        """Keep an engine, and then as many of the others as fit. `facts` (JSON) is what `facts` and `accelkit cache`
        show.

        Raises:
            ArtifactError: `facts` is no JSON. A folder that cannot be written is a warning.
        """
        path = self._path(key)
        if path is None:
            _warn("there is no home folder to keep engines in", "set ACCELKIT_CACHE_DIR to a folder")
            return
        names = list(blobs)
        members = {f"blobs/{number}": blobs[name] for number, name in enumerate(names)}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            artifact.write(path, {"blobs": names, "facts": dict(facts), "key": key}, members)
        except (OSError, ArtifactError) as error:
            if isinstance(error, ArtifactError) and not isinstance(error.__cause__, OSError):
                raise
            _warn(
                f"the engine could not be kept, so the next build takes as long: {error}",
                f"free or make writable {self.folder}, or set ACCELKIT_CACHE_DIR to another folder",
            )
            return
        self._evict(path)

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[None]:
        """Hold the right to build `key`; other processes and threads wait, for `lock_timeout_s` at most, and then go
        on.

        The lock belongs to the operating system: one held by a process that dies is free at once.
        """
        path = self._path(key)
        lock = None if path is None else self._acquire(path.with_suffix(".lock"))
        try:
            yield
        finally:
            if lock is not None:
                with contextlib.suppress(
                    OSError
                ):  # others may wait on it; they find the entry whichever file they lock
                    os.unlink(lock.lock_file)
                lock.release()

    # --- what people use

    def facts(self, key: str) -> dict[str, Any] | None:
        """What `put` was told about the engine; None where there is no such entry, or it is damaged."""
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            facts = artifact.read(path).manifest.get("facts")
        except ArtifactError:
            return None  # `get` says so and removes it
        return facts if isinstance(facts, dict) else None

    def entries(self) -> list[Entry]:
        """All entries, the least recently used first."""
        found = []
        for path in self._files():
            if path.suffix == ".engine" and _KEY.fullmatch(path.stem):
                with contextlib.suppress(FileNotFoundError):  # evicted by another process
                    facts = path.stat()
                    found.append(Entry(path.stem, facts.st_size, facts.st_mtime_ns / 1e9))
        return sorted(found, key=lambda entry: (entry.last_used, entry.key))

    def size_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.size_bytes for entry in self.entries())

    def remove(self, key: str) -> bool:
        """Remove one entry; whether there was one.

        Raises:
            CacheError: it cannot be removed.
        """
        path = self._path(key)
        return path is not None and _unlink(path)

    def clear(self) -> int:
        """Remove every entry, and what killed processes left; returns the number of entries. Other files are not
        touched.

        Raises:
            CacheError: something cannot be removed.
        """
        removed = sum(self.remove(entry.key) for entry in self.entries())
        for path in self._files():
            if _TEMPORARY.fullmatch(path.name) or path.suffix == ".lock":
                _unlink(path)
        return removed

    # ---

    def _path(self, key: str) -> Path | None:
        if not _KEY.fullmatch(key):
            raise CacheError(f"{key!r} is no cache key: letters, digits, - and _ only")
        return None if self.folder is None else self.folder / "engines" / f"{key}.engine"

    def _files(self) -> list[Path]:
        if self.folder is None:
            return []
        try:
            return list((self.folder / "engines").iterdir())
        except OSError:
            return []  # no such folder: nothing is in it

    def _refuse(self, path: Path, error: ArtifactError) -> None:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return
        if isinstance(error.__cause__, OSError):
            _warn(f"an engine in the cache cannot be read: {error.__cause__}", f"make {self.folder} readable")
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        warnings.warn(
            f"a damaged engine in the cache was removed and is built again: {error}", AccelkitWarning, stacklevel=3
        )

    def _evict(self, kept: Path) -> None:
        entries = self.entries()
        total = sum(entry.size_bytes for entry in entries)
        for entry in entries:
            if total <= self.max_bytes:
                break
            path = kept.with_name(f"{entry.key}.engine")
            if path != kept:
                with contextlib.suppress(OSError):  # in use on Windows: it goes next time
                    path.unlink(missing_ok=True)
                    total -= entry.size_bytes
        for path in self._files():
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_S:
                        path.unlink(missing_ok=True)

    def _acquire(self, path: Path) -> Any:
        import filelock

        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=self.lock_timeout_s, thread_local=False)
            lock.acquire()
            return lock
        except filelock.Timeout:
            _warn(
                f"another process has been building the same engine for {self.lock_timeout_s:.0f} s; "
                "it is built here too",
                f"if no other process is running, remove {path}",
            )
        except (OSError, NotImplementedError):
            return None  # a folder without locks or rights: `put` tells of it
        return None


def _default_folder() -> Path | None:
    if folder := os.environ.get("ACCELKIT_CACHE_DIR"):
        return Path(folder)
    import platformdirs

    try:
        path = Path(platformdirs.user_cache_dir("accelkit", appauthor=False))
    except (OSError, RuntimeError, KeyError):
        return None
    return path if path.is_absolute() else None  # "~/.cache" where the user has no home


def _default_max_bytes() -> int:
    text = os.environ.get("ACCELKIT_CACHE_MAX_BYTES")
    if not text:
        return DEFAULT_MAX_BYTES
    if not text.isascii() or not text.isdigit():
        raise InputError(
            f"ACCELKIT_CACHE_MAX_BYTES must be a whole number of bytes, such as {DEFAULT_MAX_BYTES}, not {text!r}"
        )
    return int(text)


def _blobs(entry: artifact.Artifact) -> dict[str, bytes]:
    names = entry.manifest.get("blobs")
    if not isinstance(names, list) or len(names) != len(entry.members):
        raise ArtifactError(f"{entry.path} is no entry of the engine cache")
    return {str(name): entry.member(f"blobs/{number}") for number, name in enumerate(names)}


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CacheError(f"cannot remove {path}: {error.strerror or error}") from error
    return True


def _warn(what: str, remedy: str) -> None:
    warnings.warn(f"engine cache: {what}. To fix it: {remedy}", AccelkitWarning, stacklevel=4)
