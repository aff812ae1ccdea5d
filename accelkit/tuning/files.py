"""Tuned choices on disk: one JSON file for each GPU model, driver and set of versions, one line a problem.

    <cache>/tuning/nvidia-h200-1a2b3c4d.json:   {"format": 1, "environment": {...}, "entries": [{...}, ...]}

What was measured with another driver, PyTorch, CUDA, Triton or other kernels is in another file and never used. A file is
replaced by a rename, under a lock: two processes lose none of each other's entries. A file that cannot be read is one
warning, and is replaced by what is tuned next.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from accelkit.cache import EngineCache
from accelkit.errors import CacheError, warn

FORMAT = 1
LOCK_TIMEOUT_S = 30.0
Entry = dict[str, Any]
_DAMAGED = (ValueError, KeyError, TypeError, RecursionError)


class Environment(NamedTuple):
    """What a measured time depends on, beside the problem.

    Attributes:
        gpu: its model. capability: `9.0`. driver: NVIDIA's. torch, cuda, triton: versions.
        kernels: the first digits of the hash of accelkit's own kernels.
    """

    gpu: str
    capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    kernels: str

    @property
    def name(self) -> str:
        """The file's name without its ending: `nvidia-h200-1a2b3c4d`."""
        words = "".join(c if c.isalnum() else " " for c in self.gpu.lower()).split()
        return "-".join([*words, hashlib.sha256("\n".join(self).encode()).hexdigest()[:8]])


@functools.cache
def environment_of(device: torch.device) -> Environment:
    """What measurements on this GPU hold for."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    properties = torch.cuda.get_device_properties(device)
    return Environment(
        properties.name,
        f"{properties.major}.{properties.minor}",
        _driver(),
        torch.__version__,
        str(torch.version.cuda),
        triton,
        _kernels(),
    )


def folder() -> Path | None:
    """Where the files are; None where the user has no cache folder."""
    cache = EngineCache(max_bytes=0).folder  # of the environment only the folder is asked
    return None if cache is None else cache / "tuning"


def path_of(device: torch.device) -> Path | None:
    """The device's file, whether there is one or not."""
    parent = folder()
    return None if parent is None else parent / f"{environment_of(device).name}.json"


def entries_of(device: torch.device) -> list[Entry]:
    """What is known on this device; a damaged file is a warning, and nothing is known."""
    path = path_of(device)
    return [] if path is None else read(path)


def read(path: Path) -> list[Entry]:
    """A file's entries; empty, with a warning, where it is damaged."""
    try:
        stamp = path.stat()
    except OSError:
        return []
    return _read_once(path, stamp.st_ino, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=4)
def _read_once(path: Path, *state: int) -> list[Entry]:
    """For each state of a file: the kinds of choice are loaded one after another, a warning is one."""
    try:
        return _parsed(path)
    except (OSError, *_DAMAGED) as error:
        warn(
            f"tuned choices cannot be read from {path} ({type(error).__name__}: {error}); the rules decide until "
            "`accelkit tune` measures anew"
        )
        return []


def _parsed(path: Path) -> list[Entry]:
    """The entries; none where there is no file, or one of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if content["format"] != FORMAT:
        return []
    entries = content["entries"]
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise TypeError("its entries are no list of objects")
    return entries


def _parsed_or_none(path: Path) -> list[Entry]:
    """The same where something is written next: a damaged file was told of when it was read, and is replaced."""
    try:
        return _parsed(path)
    except _DAMAGED:
        return []


def environment_in(path: Path) -> dict[str, str]:
    """What a file's measurements hold for; empty where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["environment"]
    except (OSError, *_DAMAGED):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def paths() -> list[Path]:
    """All files, of this machine's present versions and of others."""
    parent = folder()
    return sorted(parent.glob("*.json")) if parent is not None and parent.is_dir() else []


def keep(device: torch.device, entries: Sequence[Entry]) -> None:
    """Add entries to the device's file, in place of older ones of the same problems; a warning where that fails."""
    path = path_of(device)
    if path is None:
        warn("tuned choices are not kept: there is no cache folder; set ACCELKIT_CACHE_DIR to one")
        return
    merge(path, environment_of(device), entries)


def merge(path: Path, environment: Environment, entries: Sequence[Entry]) -> None:
    """Add entries to a file, in place of older ones of the same problems; a warning where it cannot be written.

    A provisional entry, which some of the candidates were measured for, does not take the place of a whole one.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path):
            merged = {_identity(e): e for e in _parsed_or_none(path)}
            for entry in entries:
                before = merged.get(_identity(entry), entry)
                if before.get("provisional") or not entry.get("provisional"):
                    merged[_identity(entry)] = entry
            _replace(path, _text(environment, list(merged.values())))
    except OSError as error:
        warn(f"tuned choices could not be kept in {path} ({error}); this process uses them, the next one tunes again")


def clear() -> int:
    """Remove every file; returns how many there were.

    Raises:
        CacheError: one cannot be removed.
    """
    found = paths()
    for path in found:
        try:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(f"cannot remove {path}: {error.strerror or error}") from error
    return len(found)


def _identity(entry: Entry) -> str:
    return f"{entry.get('kind')} {json.dumps(entry.get('problem'), sort_keys=True)}"


def _text(environment: Environment, entries: Sequence[Entry]) -> str:
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    head = json.dumps(environment._asdict())
    return f'{{\n "format": {FORMAT},\n "environment": {head},\n "entries": [\n{lines}\n ]\n}}\n'


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import filelock

    try:
        lock = filelock.FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S)
        lock.acquire()
    except (filelock.Timeout, NotImplementedError):  # another holds it for ever, or the folder has no locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _driver() -> str:
    """NVIDIA's driver, as the kernel module tells; where it does not, the CUDA version that the driver is for."""
    for path in (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version")):
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8").strip().splitlines()[0]
    return f"CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


@functools.cache
def _kernels() -> str:
    import accelkit.kernels

    digest = hashlib.sha256()
    for path in sorted(Path(accelkit.kernels.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
