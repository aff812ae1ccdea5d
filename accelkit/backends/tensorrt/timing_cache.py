"""TensorRT's timing cache on disk: what it measured of each layer, so that like models build faster.

    file = MAGIC, SHA-256 of the rest, the library's own bytes

The hash is checked before the library sees a byte: a damaged cache is replaced, never a crash. Written under a temporary
name and renamed, under a lock, so that any number of builds share one file and add to it. Standard library and filelock only:
the worker imports this file by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

MAGIC = b"accelkit TensorRT timing cache 1\n"


def read(path: str) -> tuple[bytes, str]:
    """The library's bytes, empty where there are none to use, and why not (empty where nothing is wrong)."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"the timing cache {path} cannot be read ({error.strerror or error}); built without it"
    start = len(MAGIC) + 32
    if not content.startswith(MAGIC) or content[len(MAGIC) : start] != hashlib.sha256(content[start:]).digest():
        return b"", f"the timing cache {path} was damaged and is replaced"
    return content[start:], ""


def write(path: str, data: bytes) -> None:
    """Replace the file, whole or not at all.

    Raises:
        OSError: it cannot be written; a file that was there stays as it is.
    """
    temporary = temporary_path(path, os.getpid())
    try:
        with open(temporary, "wb") as file:
            file.write(MAGIC + hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path: str, timeout_s: float) -> Iterator[str]:
    """Hold the lock of `path`; yields why it is not held, empty where it is.

    The lock is the operating system's: one held by a process that dies is free at once. Its file stays, as it must where
    others may be waiting on it.
    """
    import filelock

    lock = filelock.FileLock(f"{path}.lock", timeout=timeout_s)
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        yield f"another process has held its lock for {timeout_s:g} s"
        return
    except (OSError, NotImplementedError) as error:
        yield str(error)
        return
    try:
        yield ""
    finally:
        lock.release()


def temporary_path(path: str, pid: int) -> Path:
    """Where the process `pid` writes before it renames: whoever ends that process removes it."""
    return Path(f"{path}.{pid}.tmp")
