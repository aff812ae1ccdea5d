"""The engine cache: whole entries or none, shared by processes, bounded, and never in a build's way."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from accelkit import artifact
from accelkit.cache import DEFAULT_MAX_BYTES, EngineCache
from accelkit.errors import AccelkitWarning, ArtifactError, CacheError, InputError

KEY = "a1b2c3"


def random_bytes(size: int) -> bytes:
    return torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def path_of(cache: EngineCache, key: str = KEY) -> Path:
    assert cache.folder is not None
    return cache.folder / "engines" / f"{key}.engine"


def set_age(cache: EngineCache, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path_of(cache, key), (then, then))


# --- keeping


def test_what_is_put_is_got(cache: EngineCache) -> None:
    blobs = {"model.onnx": random_bytes(5000), "weights/..: any name": random_bytes(1), "empty": b""}
    facts = {"backend": "onnxruntime", "seconds": 1.5, "shapes": [[1, 128]]}
    assert cache.get(KEY) is None
    assert cache.facts(KEY) is None
    cache.put(KEY, blobs, facts)
    assert cache.get(KEY) == blobs
    assert cache.facts(KEY) == facts
    (entry,) = cache.entries()
    assert (entry.key, entry.size_bytes) == (KEY, path_of(cache).stat().st_size)
    assert cache.size_bytes() == entry.size_bytes >= 5001


def test_a_second_put_replaces_the_first(cache: EngineCache) -> None:
    cache.put(KEY, {"a": b"old"}, {})
    cache.put(KEY, {"b": b"new"}, {"n": 2})
    assert cache.get(KEY) == {"b": b"new"}
    assert len(cache.entries()) == 1


def test_other_processes_see_it(cache: EngineCache) -> None:
    cache.put(KEY, {"a": random_bytes(100)}, {})
    script = f"from accelkit.cache import EngineCache; print(len(EngineCache({str(cache.folder)!r}).get({KEY!r})['a']))"
    assert (
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment()).stdout
        == b"100\n"
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


def test_keys_cannot_leave_the_folder(cache: EngineCache) -> None:
    for key in ("../x", "a/b", "", ".", "x.engine"):
        with pytest.raises(CacheError, match="no cache key"):
            cache.get(key)


def test_facts_that_are_no_json_are_the_callers_mistake(cache: EngineCache) -> None:
    with pytest.raises(ArtifactError, match="no JSON"):
        cache.put(KEY, {}, {"x": object()})
    assert cache.entries() == []


# --- damage


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_entries_are_misses(cache: EngineCache, tenth: int) -> None:
    cache.put(KEY, {"a": random_bytes(3000), "b": random_bytes(500)}, {})
    path = path_of(cache)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * tenth // 10])
    with pytest.warns(AccelkitWarning, match="damaged engine"):
        assert cache.get(KEY) is None
    assert not path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get(KEY) is None
        cache.put(KEY, {"a": b"again"}, {})
    assert cache.get(KEY) == {"a": b"again"}


def test_a_flipped_bit_anywhere_is_a_miss(cache: EngineCache) -> None:
    cache.put(KEY, {"a": random_bytes(300), "b": random_bytes(20)}, {"x": "y"})
    path = path_of(cache)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.warns(AccelkitWarning, match="damaged engine"):
            assert cache.get(KEY) is None, f"bit flipped in byte {position}"


def test_something_else_under_an_entrys_name_is_a_miss(cache: EngineCache) -> None:
    cache.put(KEY, {"a": b"x"}, {})
    artifact.write(path_of(cache), {"some": "artifact"}, {"program": b"x"})
    with pytest.warns(AccelkitWarning, match="no entry of the engine cache"):
        assert cache.get(KEY) is None


KILLED = """
import os, sys, time
from accelkit.cache import EngineCache
import accelkit.artifact as artifact
real = artifact._structure
def slow(file, data):          # everything is written, nothing is renamed yet
    print("writing", flush=True)
    time.sleep(60)
artifact._structure = slow
EngineCache(sys.argv[1]).put(sys.argv[2], {"a": os.urandom(200_000)}, {})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("had_entry", [False, True])
def test_a_killed_writer_leaves_no_entry_and_its_rest_is_swept(cache: EngineCache, had_entry: bool) -> None:
    if had_entry:
        cache.put(KEY, {"a": b"old"}, {})
    command = [sys.executable, "-c", KILLED, str(cache.folder), KEY]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    (rest,) = path_of(cache).parent.glob(".*.tmp")
    assert rest.stat().st_size > 200_000
    assert cache.get(KEY) == ({"a": b"old"} if had_entry else None)
    cache.put("other", {"a": b"x"}, {})
    assert rest.exists()  # it might be a writer's that is alive
    os.utime(rest, (time.time() - 3601,) * 2)
    cache.put("other", {"a": b"x"}, {})
    assert not rest.exists()


# --- size


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, max_bytes=1)
    cache.max_bytes = 10**9
    for age, key in enumerate(["new", "middle", "old"]):
        cache.put(key, {"a": random_bytes(10_000)}, {})
        set_age(cache, key, 100 * (age + 1))
    one = path_of(cache, "old").stat().st_size
    assert [e.key for e in cache.entries()] == ["old", "middle", "new"]
    assert cache.get("old") is not None  # used: now it is the newest
    cache.max_bytes = 3 * one + 500  # names differ in length
    cache.put("fourth", {"a": random_bytes(10_000)}, {})
    assert {e.key for e in cache.entries()} == {"old", "new", "fourth"}
    assert cache.size_bytes() <= cache.max_bytes
    cache.max_bytes = 0
    cache.put("fifth", {"a": random_bytes(10_000)}, {})
    assert [e.key for e in cache.entries()] == ["fifth"]  # never the one just written


def test_bound_and_folder_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("ACCELKIT_CACHE_MAX_BYTES", "12345")
    assert (EngineCache().folder, EngineCache().max_bytes) == (tmp_path / "here", 12345)
    assert (EngineCache(tmp_path, 1).folder, EngineCache(tmp_path, 1).max_bytes) == (tmp_path, 1)
    monkeypatch.setenv("ACCELKIT_CACHE_MAX_BYTES", "10GB")
    with pytest.raises(InputError, match=r"ACCELKIT_CACHE_MAX_BYTES must be a whole number of bytes.*10GB"):
        EngineCache()
    monkeypatch.delenv("ACCELKIT_CACHE_MAX_BYTES")
    monkeypatch.delenv("ACCELKIT_CACHE_DIR")
    assert EngineCache(tmp_path).max_bytes == DEFAULT_MAX_BYTES
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert EngineCache().folder == tmp_path / "xdg" / "accelkit"


# --- several at once


def _build(folder: str, start: Any, built: Any) -> None:
    cache = EngineCache(folder)
    start.wait()
    with cache.building(KEY):
        if cache.get(KEY) is None:
            built.put(os.getpid())
            time.sleep(0.5)
            cache.put(KEY, {"a": b"x" * 100_000}, {})
    assert cache.get(KEY) == {"a": b"x" * 100_000}


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, built = context.Event(), context.Queue()
    processes = [context.Process(target=_build, args=(str(tmp_path), start, built)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0]
    built.get(timeout=5)
    assert built.empty()
    assert [p.name for p in (tmp_path / "engines").iterdir()] == [f"{KEY}.engine"]  # no lock is left behind


def _hammer(folder: str, seed: int, failed: Any) -> None:
    cache = EngineCache(folder, max_bytes=3 * 60_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(60):
            key = f"k{(seed + step) % 5}"
            blobs = cache.get(key)
            if blobs is not None and blobs != {"a": key.encode() * 20_000}:
                failed.put(key)
            cache.put(key, {"a": key.encode() * 20_000}, {})


def test_processes_that_write_read_and_evict_at_once_see_whole_entries(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failed = context.Queue()
    processes = [context.Process(target=_hammer, args=(str(tmp_path), seed, failed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert failed.empty()


def test_a_lock_that_is_never_given_back_is_waited_for_only_so_long(tmp_path: Path) -> None:
    holder, cache = EngineCache(tmp_path), EngineCache(tmp_path, lock_timeout_s=0.2)
    with holder.building(KEY):
        start = time.monotonic()
        with pytest.warns(AccelkitWarning, match="another process has been building"), cache.building(KEY):
            assert 0.1 < time.monotonic() - start < 10
        with cache.building("another"):  # other keys do not wait
            pass


def test_a_failed_build_gives_the_lock_back(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path, lock_timeout_s=0.2)
    with pytest.raises(ZeroDivisionError), cache.building(KEY):
        _ = 1 / 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cache.building(KEY):
            pass


# --- folders that cannot be used: a warning, and the build goes on


def unusable_folders(tmp_path: Path) -> list[Path]:
    (tmp_path / "file").write_text("not a folder")
    return [
        tmp_path / "file",
        tmp_path / "file" / "below",
        *([Path("/proc/accelkit")] if os.path.isdir("/proc/self") else []),
    ]


def test_unwritable_folders_only_warn(tmp_path: Path) -> None:
    for folder in unusable_folders(tmp_path):
        cache = EngineCache(folder)
        with cache.building(KEY):
            assert cache.get(KEY) is None
            with pytest.warns(AccelkitWarning, match="set ACCELKIT_CACHE_DIR to another folder"):
                cache.put(KEY, {"a": b"x"}, {})
        assert cache.get(KEY) is None
        assert cache.entries() == []
        assert cache.size_bytes() == 0
        assert cache.clear() == 0
        assert cache.remove(KEY) is False


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_only_warns_and_keeps_what_was_there(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, {"a": b"old"}, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _no_space)
        with pytest.warns(AccelkitWarning, match=r"No space left on device.*free or make writable"):
            cache.put(KEY, {"a": random_bytes(1000)}, {})
    assert cache.get(KEY) == {"a": b"old"}
    assert [p.name for p in path_of(cache).parent.iterdir()] == [f"{KEY}.engine"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 KiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    cache = EngineCache(small_disk)
    cache.put(KEY, {"a": random_bytes(50_000)}, {})
    before = cache.get(KEY)
    with pytest.warns(AccelkitWarning, match="No space left on device"):
        cache.put(KEY, {"a": random_bytes(400_000)}, {})
    assert cache.get(KEY) == before is not None
    assert len(list((small_disk / "engines").iterdir())) == 1


def test_no_home_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELKIT_CACHE_DIR", raising=False)
    monkeypatch.setattr(
        "platformdirs.user_cache_dir", lambda *a, **k: "~/.cache/accelkit"
    )  # what expanduser leaves without a home
    cache = EngineCache()
    assert cache.folder is None
    with cache.building(KEY), pytest.warns(AccelkitWarning, match="set ACCELKIT_CACHE_DIR"):
        cache.put(KEY, {"a": b"x"}, {})
    assert cache.get(KEY) is None
    assert cache.clear() == 0


def test_an_entry_that_cannot_be_read_is_kept_and_told(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEY, {"a": b"x"}, {})
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "_read", lambda file, path: _raise(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.warns(AccelkitWarning, match="cannot be read"):
            assert cache.get(KEY) is None
    assert cache.get(KEY) == {"a": b"x"}


def _raise(error: Exception) -> None:
    raise error


# --- commands


def test_clear_removes_ours_and_nothing_else(cache: EngineCache) -> None:
    for key in ("a", "b"):
        cache.put(key, {"x": b"x"}, {})
    folder = path_of(cache).parent
    (folder / f".a.engine.{os.getpid()}-0a1b2c3d.tmp").write_bytes(b"left behind")
    (folder / "notes.txt").write_text("the user's")
    assert cache.remove("a") is True
    assert cache.remove("a") is False
    assert cache.clear() == 1
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", [lambda c: c.clear(), lambda c: c.remove(KEY)])
def test_commands_say_when_they_cannot(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch, command: Callable[[EngineCache], object]
) -> None:
    cache.put(KEY, {"x": b"x"}, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *a, **k: _raise(OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(CacheError, match=r"cannot remove .*Read-only file system"):
            command(cache)
    assert cache.get(KEY) == {"x": b"x"}
