"""The .accel file: members and a manifest in one file that is either whole or refused.

    {"program": ..., "engines/0/model": ...} + manifest  --write-->  model.accel  --read-->  Artifact

A .accel file is a zip without compression, so any zip tool lists and extracts it. `manifest.json` is its last member
and holds the SHA-256 and size of every other; the zip's comment holds the SHA-256 of everything that is no member's
data (manifest, headers, padding). So every bit of the file is covered: `read` checks the second, `member`, `view` and
`open` the first before a byte is used, `verify` all of it. Hashes find damage, not malice: who may write the file may
write its hashes.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.accel"
    >>> members = {"engines/0/model": b"an engine", "program": lambda stream: stream.write(b"a program")}
    >>> write(path, {"target": "onnxruntime"}, members)
    >>> artifact = read(path)
    >>> artifact.manifest["target"], artifact.member("engines/0/model")
    ('onnxruntime', b'an engine')
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import secrets
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from accelkit.errors import ArtifactError
from accelkit.program_io import program_from_bytes, program_to_bytes, write_program
from accelkit.tensors_io import ALIGNMENT_BYTES, tensors_from_bytes, tensors_to_bytes, write_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT_BYTES = 2**28
_COMMENT = re.compile(rb"accelkit sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # no clock in the headers: the same content gives the same file
_PADDING_ID = 0xACCE  # an extra field of our own, skipped by every reader
_LOCAL_HEADER_BYTES, _ZIP64_EXTRA_BYTES = 30, 20

Member = bytes | bytearray | memoryview | Path | Callable[[BinaryIO], object]


# --- writing


def write(path: str | os.PathLike[str], manifest: Mapping[str, Any], members: Mapping[str, Member]) -> None:
    """Write a .accel file, whole or not at all: a file that was there stays as it is until the new one is complete on
    disk.

    Args:
        path: the file; its folder must exist. A symbolic link keeps pointing to the same place.
        manifest: JSON values. `format_version` and `members` are filled in.
        members: name -> bytes, a file to copy, or a function that writes to the stream it is given.

    Raises:
        ArtifactError: the manifest is no JSON, a name is unusable, or the file cannot be written (no such folder, no
            permission, disk full).
    """
    path = Path(os.path.realpath(os.fspath(path)))
    for name in members:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ArtifactError(f"{name!r} cannot be the name of a member of {path}: use letters, digits, and ._-/")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb+") as file:
                _write(file, path, manifest, members)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        kept = " The file that was there is unchanged." if path.exists() else ""
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}.{kept}") from error


def _write(file: BinaryIO, path: Path, manifest: Mapping[str, Any], members: Mapping[str, Member]) -> None:
    facts: dict[str, dict[str, Any]] = {}
    data: list[tuple[int, int]] = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, member in members.items():
            with archive.open(_padded(name, file.tell()), "w", force_zip64=True) as stream:
                start = file.tell()
                hashing = _Hashing(cast(BinaryIO, stream))
                _copy(member, cast(BinaryIO, hashing))
            data.append((start, start + hashing.size))
            facts[name] = {"sha256": hashing.digest.hexdigest(), "size": hashing.size}
        complete = {**manifest, "format_version": FORMAT_VERSION, "members": facts}
        try:
            text = json.dumps(complete, indent=1).encode()
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"cannot write {path}: the manifest is no JSON: {error}") from error
        archive.writestr(_padded(MANIFEST, file.tell()), text)
        archive.comment = b"accelkit sha256:" + b"0" * 64
    digest = _structure(file, data)
    file.seek(-64, os.SEEK_END)
    file.write(digest.encode())


def _padded(name: str, offset: int) -> zipfile.ZipInfo:
    # Data starts at a multiple of 64 bytes, so that tensors can be used where they lie in a mapping of the file.
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    fixed = offset + _LOCAL_HEADER_BYTES + len(name.encode()) + (0 if name == MANIFEST else _ZIP64_EXTRA_BYTES) + 4
    padding = -fixed % ALIGNMENT_BYTES
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"\0" * padding
    return info


def _copy(member: Member, stream: BinaryIO) -> None:
    if isinstance(member, Path):
        with member.open("rb") as source:
            shutil.copyfileobj(source, stream, 2**20)
    elif callable(member):
        member(stream)
    else:
        stream.write(member)


class _Hashing(io.RawIOBase):
    """A stream that hashes and counts what goes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.size = stream, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.stream.write(view)
        self.size += len(view)
        return len(view)


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable; Windows has no such call, and some network folders refuse it.
    if os.name == "posix":
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _structure(file: BinaryIO, data: list[tuple[int, int]]) -> str:
    """SHA-256 of all bytes outside the ranges `data`, the last 64 (the place of this hash) left out."""
    end = file.seek(0, os.SEEK_END) - 64
    digest = hashlib.sha256()
    position = 0
    for start, stop in [*sorted(data), (end, end)]:
        file.seek(position)
        remaining = start - position
        while remaining > 0:
            chunk = file.read(min(remaining, 2**20))
            if not chunk:
                raise EOFError("file ends early")
            digest.update(chunk)
            remaining -= len(chunk)
        position = max(position, stop)
    return digest.hexdigest()


# --- reading


class Artifact:
    """An open .accel file whose manifest and layout have been checked.

    Attributes:
        path: the file.
        manifest: what `write` was given, with `format_version` and `members` (name -> sha256, size).
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], offsets: dict[str, int], identity: tuple[int, ...]
    ) -> None:
        self.path, self.manifest = path, manifest
        self._offsets, self._identity = offsets, identity

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members, in the order in which they were written."""
        return tuple(self._offsets)

    def size(self, name: str) -> int:
        """Bytes of a member."""
        return int(self._facts(name)["size"])

    def member(self, name: str) -> bytes:
        """A member's bytes, checked against their hash.

        Raises:
            ArtifactError: there is no such member, or it is damaged.
        """
        size = self.size(name)
        with self._file() as file:
            file.seek(self._offsets[name])
            data = file.read(size)
        self._check(name, data)
        return data

    def view(self, name: str) -> memoryview:
        """A member as memory mapped from the file, checked: no copy is made, and pages that nobody uses take no memory.

        Writing to it changes this process's copy alone. The mapping lives as long as something uses it. Nobody may
        write into the file meanwhile; replacing it, as `write` does, is safe.

        Raises:
            ArtifactError: there is no such member, or it is damaged.
        """
        offset, size = self._offset(name), self.size(name)
        if size == 0:
            return memoryview(bytearray())
        first = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._file() as file:
            try:
                mapping = mmap.mmap(file.fileno(), offset - first + size, access=mmap.ACCESS_COPY, offset=first)
            except (OSError, ValueError) as error:
                raise ArtifactError(f"cannot map {name} of {self.path}: {error}") from error
        view = memoryview(mapping)[offset - first :]
        self._check(name, view)
        return view

    def open(self, name: str) -> BinaryIO:
        """A member as a stream, checked."""
        return _Reader(self.view(name))

    def verify(self) -> None:
        """Check every member.

        Raises:
            ArtifactError: one is damaged; the message names it.
        """
        for name in self.members:
            self.view(name).release()

    def _facts(self, name: str) -> dict[str, Any]:
        self._offset(name)
        return cast(dict[str, Any], self.manifest["members"][name])

    def _offset(self, name: str) -> int:
        if name not in self._offsets:
            raise ArtifactError(f"{self.path} has no member {name!r}; it has {', '.join(self._offsets) or 'none'}")
        return self._offsets[name]

    @contextlib.contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb") as file:
                if _identity(file) != self._identity:
                    raise ArtifactError(f"{self.path} was replaced while it was in use: load it again")
                yield file
        except OSError as error:
            raise ArtifactError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _check(self, name: str, data: bytes | memoryview) -> None:
        if len(data) != self.size(name) or hashlib.sha256(data).hexdigest() != self._facts(name)["sha256"]:
            _damaged(self.path, f"its member {name} does not match its hash")


class _Reader(io.BytesIO):
    def __init__(self, view: memoryview) -> None:
        super().__init__(view)


def read(path: str | os.PathLike[str]) -> Artifact:
    """Open a .accel file and check its manifest and layout; members are checked when they are used.

    Raises:
        ArtifactError: it does not exist, is no .accel file, is damaged, or was written by a newer accelkit.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read(file, path)
    except ArtifactError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the file's start: an offset is wrong
            _damaged(path, f"{type(error).__name__}: {error}")
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, OverflowError, EOFError, struct.error,
            KeyError, TypeError, AttributeError, MemoryError) as error:  # fmt: skip
        _damaged(path, f"{type(error).__name__}: {error}", error)


def _read(file: BinaryIO, path: Path) -> Artifact:
    start = file.read(4)
    if start != b"PK\3\4":
        raise ArtifactError(
            f"{path} is no .accel file (or its start is damaged): such files are written by CompiledModel.save"
        )
    with zipfile.ZipFile(file) as archive:
        infos, comment = archive.infolist(), _COMMENT.fullmatch(archive.comment)
    if comment is None:
        raise ArtifactError(
            f"{path} is a zip, but no .accel file (or its end is damaged): such files are written by CompiledModel.save"
        )
    total = file.seek(0, os.SEEK_END)
    ranges: dict[str, tuple[int, int]] = {}
    for info in infos:
        name = info.filename
        if not _NAME.fullmatch(name):
            _damaged(path, f"it has a member with the name {name!r}, which accelkit never writes")
        if name in ranges:
            _damaged(path, f"it has two members with the name {name!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            _damaged(path, f"its member {name} is compressed, which accelkit never does")
        ranges[name] = _data_range(file, info, total, path)
    if MANIFEST not in ranges:
        _damaged(path, f"it has no {MANIFEST}")
    manifest_start, manifest_stop = ranges.pop(MANIFEST)
    _check_apart([*ranges.values(), (manifest_start, manifest_stop)], path)
    if _structure(file, list(ranges.values())) != comment[1].decode():
        _damaged(path, "its manifest or layout does not match its hash")
    if manifest_stop - manifest_start > MANIFEST_LIMIT_BYTES:
        _damaged(path, f"its {MANIFEST} has {manifest_stop - manifest_start} bytes")
    file.seek(manifest_start)
    manifest = json.loads(file.read(manifest_stop - manifest_start))
    _check_manifest(manifest, ranges, path)
    return Artifact(path, manifest, {name: start for name, (start, _) in ranges.items()}, _identity(file))


def _data_range(file: BinaryIO, info: zipfile.ZipInfo, total: int, path: Path) -> tuple[int, int]:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\3\4":
        _damaged(path, f"its member {info.filename} has no header")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    if file.read(name_length) != info.filename.encode():
        _damaged(path, f"its member {info.filename} has another name in its header")
    start = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
    if start + info.file_size > total:
        _damaged(path, f"its member {info.filename} reaches past the end of the file")
    return start, start + info.file_size


def _check_apart(ranges: list[tuple[int, int]], path: Path) -> None:
    ordered = sorted(ranges)
    for (_, stop), (start, _) in itertools.pairwise(ordered):
        if start < stop:
            _damaged(path, "two of its members overlap")


def _check_manifest(manifest: Any, ranges: dict[str, tuple[int, int]], path: Path) -> None:
    if not isinstance(manifest, dict) or type(manifest.get("format_version")) is not int:
        _damaged(path, f"its {MANIFEST} has no format_version")
    if manifest["format_version"] > FORMAT_VERSION:
        by = manifest.get("versions", {}).get("accelkit") if isinstance(manifest.get("versions"), dict) else None
        raise ArtifactError(
            f"{path} has format {manifest['format_version']}{f', written by accelkit {by}' if by else ''}; this "
            f"accelkit reads up to format {FORMAT_VERSION}: pip install --upgrade accelkit"
        )
    facts = manifest.get("members")
    if not isinstance(facts, dict):
        _damaged(path, f"its {MANIFEST} lists no members")
    for name in facts.keys() - ranges.keys():
        _damaged(path, f"its member {name!r} is missing")
    for name in ranges.keys() - facts.keys():
        _damaged(path, f"it has a member {name!r} that its {MANIFEST} does not list")
    for name, (start, stop) in ranges.items():
        if facts[name].get("size") != stop - start or not isinstance(facts[name].get("sha256"), str):
            _damaged(
                path, f"its member {name} has {stop - start} bytes, not the {facts[name].get('size')} it should have"
            )


def _identity(file: BinaryIO) -> tuple[int, ...]:
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size  # no times: the engine cache touches its files


def _damaged(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise ArtifactError(f"{path} is damaged: {what}. Copy it again, or save the model again") from cause


__all__ = [
    "FORMAT_VERSION", "Artifact", "Member", "program_from_bytes", "program_to_bytes", "read", "tensors_from_bytes",
    "tensors_to_bytes", "write", "write_program", "write_tensors",
]  # fmt: skip
