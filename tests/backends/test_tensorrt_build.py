"""One build: the worker's path under every version, what can go wrong, the timing cache, plugins; no file is left."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import pytest
import tensorrt_jobs
from tensorrt_jobs import compiled, facts_of

from accelkit.backends.tensorrt import building, timing_cache, worker_build, worker_process, worker_timings
from accelkit.backends.tensorrt.building import build_plan, start_failure, timing_cache_path
from accelkit.backends.tensorrt.job import BuildJob, BuildResult, Failure, NodeFailure
from accelkit.backends.tensorrt.worker_library import Library
from accelkit.backends.tensorrt.worker_timings import Timings
from accelkit.errors import LoweringError

onnx = pytest.importorskip("onnx")

Install = Callable[..., None]


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    return tensorrt_jobs.small_job(tmp_path / "model")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("8.6", refuse=["Relu"]): what child processes import as tensorrt."""
    return functools.partial(fake_tensorrt.install, tmp_path / "site", monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_is_left(job: BuildJob, tmp_path: Path) -> Iterator[None]:
    yield
    tensorrt_jobs.nothing_is_left(job, tmp_path)


class Process:
    """What a build process does, in this one: for what needs no process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "8.6", **faults: Any) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.load(version, **faults))
        self.plan = folder / "engine.plan"
        self.said: list[dict[str, Any]] = []
        self.library, self.timings = Library(), dict[str, Timings]()
        self.library.start()

    def run(self, job: BuildJob) -> BuildResult:
        return worker_build.run(replace(job, plan=str(self.plan)), self.library, self.timings, self.said.append)

    def facts(self) -> dict[str, Any]:
        """What the plan tells; nothing where there is none."""
        return facts_of(self.plan.read_bytes()) if self.plan.exists() else {}


# --- the path


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_a_build(job: BuildJob, install: Install, version: str) -> None:
    install(version, stdout="the library prints\nwhat it likes")
    words: list[str] = []
    plan, result = build_plan(job, say=words.append)
    facts = facts_of(plan)
    assert facts["profiles"] == [{"x": [[1, 4], [2, 4], [8, 4]]}]
    assert facts["verbosity"] == "DETAILED"
    assert facts["typed"] == (version != "8.6")
    assert result.versions["tensorrt"].startswith(version)
    assert set(result.seconds) == {"start", "parse", "build", "write", "total"}
    assert result.seconds["total"] >= result.seconds["build"]
    assert result.warnings == ("a warning of two lines",)
    assert words[0] == "TensorRT starting, 0 s"
    assert result.failure is None


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_every_option(job: BuildJob, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = replace(
        job,
        timing_cache=str(tmp_path / "timing" / "cache"),
        precision="fp16",
        keep_fp32=("node_relu", "node_gone"),
        demanded=("node_matmul", "node_relu"),
        workspace_bytes=2**30,
        optimization_level=2,
        tactic_sources=("jit_convolutions",),
        version_compatible=True,
        hardware_compatible="ampere_plus",
        refittable=True,
        sparse_weights=True,
        max_aux_streams=0,
    )
    process = Process(tmp_path, monkeypatch, version)
    result = process.run(job)
    assert result.failure is None
    facts = process.facts()
    flags = {"REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE"}
    old = version == "8.6"
    assert set(facts["flags"]) == flags | ({"FP16", "OBEY_PRECISION_CONSTRAINTS"} if old else set())
    assert facts["fp32"] == (["node_relu"] if old else [])
    assert facts["fp16"] == (["node_matmul"] if old else []), "products alone"
    notes = ("of the nodes to keep in fp32 the network has no layer for node_gone",) if old else ()
    assert result.notes == notes
    assert facts["workspace"] == 2**30
    assert facts["tactic_sources"] == 1 << {"8.6": 4, "10.16": 4, "11.4": 1}[version]
    assert [message["stage"] for message in process.said if "stage" in message] == ["parsing", "building", "writing"]
    assert any("of" in message for message in process.said) == (not old)
    assert result.timing_cache_bytes is not None
    assert result.timing_cache_bytes[0] == 0


def test_jobs_and_results_survive_json(job: BuildJob) -> None:
    full = replace(
        job, keep_fp32=("a",), demanded=("c",), tactic_sources=("cudnn",), plugin_library=("b.so",), timing_cache="c"
    )
    assert BuildJob.from_json(full.to_json()) == full
    assert BuildJob.from_json(job.to_json()) == job
    failure = Failure("parse", "no", (NodeFailure(3, "m", "n", "o"),))
    result = BuildResult({"build": 1.5}, {"tensorrt": "8.6.0"}, ("w",), failure, (0, 5), ("note",))
    assert BuildResult.from_json(result.to_json()) == result


def test_parsing_alone_makes_no_plan(job: BuildJob, install: Install) -> None:
    install("10.16", build_fails="must not be built")
    plan, result = build_plan(replace(job, parse_only=True))
    assert plan == b""
    assert set(result.seconds) == {"start", "parse", "total"}


def test_progress_has_a_share_where_the_version_tells(
    job: BuildJob, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "SAY_EVERY_S", 0.05)
    for version, pattern in (("8.6", "TensorRT building, "), ("11.4", "TensorRT building 50 %, ")):
        install(version, build_seconds=0.4)
        words: list[str] = []
        build_plan(job, say=words.append)
        assert any(line.startswith(pattern) for line in words), words


# --- what goes wrong


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_refused_nodes_are_named(job: BuildJob, install: Install, version: str) -> None:
    install(version, refuse=["Relu"])
    with pytest.raises(
        LoweringError, match=rf"TensorRT {version}\S* parser refuses Relu 'node_relu': No importer"
    ) as caught:
        build_plan(job)
    assert list(caught.value.nodes) == ["node_relu"]
    assert "No importer registered for op: Relu" in caught.value.nodes["node_relu"]


@pytest.mark.parametrize(
    ("faults", "changes", "message"),
    [
        ({"build_fails": "2: [ltWrapper.cpp::plainGemm::441] Error Code 2: OutOfMemory"}, {"workspace_bytes": 2**30},
         r"TensorRT 8\.6\.0 ran out of memory while building .*OutOfMemory.*lower workspace_gib \(now 1\.0 GiB\)"),
        ({"build_fails": "10: Could not find any implementation for node x"}, {},
         "built no engine: 10: Could not find any implementation for node x; .*optimization_level"),
        ({"no_device": True}, {"device": 0}, "does not start on GPU 0: CUDA initialization failure.*update the driver"),
        ({}, {"plugin_library": ("/no/such.so",)}, r"there is no plugin library /no/such\.so; check plugin_libraries"),
        ({}, {"precision": "bf16"}, "it has no bf16, only fp32, tf32, fp16; leave the option out"),
        ({}, {"profile": {"z": ((1,), (1,), (1,))}}, "the profile has shapes for 'z'; the network's inputs are x"),
        ({"profile_refused": True}, {}, "it does not take the profile"),
        ({}, {"profile": {}}, "no optimization profile has been defined"),
        ({}, {"onnx": "elsewhere"}, "Could not open file"),
    ],
    ids=["memory", "build", "device", "plugin", "precision", "input", "profile", "no profile", "no file"],
)  # fmt: skip
def test_failures_say_what_and_what_to_do(
    job: BuildJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    job = replace(job, **changes)
    result = Process(tmp_path, monkeypatch, **faults).run(job)
    assert result.failure is not None
    error = building._error(job, result, result.failure)
    with pytest.raises(LoweringError, match=message):
        raise error


def test_a_failure_reaches_the_caller(job: BuildJob, install: Install) -> None:
    install("10.16", build_fails="Error Code 2: OutOfMemory")
    with pytest.raises(LoweringError, match="ran out of memory"):
        build_plan(job)


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_whether_it_starts(install: Install, version: str) -> None:
    install(version)
    assert start_failure() is None
    install(version, no_device=True)
    assert "does not start on GPU 0: CUDA initialization failure with error: 35" in str(start_failure())


def test_a_package_that_does_not_load(job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.8: cannot open shared object file')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(LoweringError, match="does not load in the build process: libnvinfer"):
        build_plan(job)


def test_an_error_in_the_worker_is_no_silence(job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    library = Library()
    library.start()
    result = worker_build.run(job, library, {}, lambda message: None)
    assert result.failure is not None
    assert result.failure.kind == "worker"
    assert "AttributeError" in result.failure.message
    assert "worker_library.py" in result.failure.message


def test_a_full_disk(job: BuildJob, install: Install, tmp_path: Path) -> None:
    cache = tmp_path / "timing" / "cache"
    install(plan_bytes=200_000, file_limit=100_000)
    with pytest.raises(LoweringError, match=r"engine\.plan: File too large; free room beside the ONNX file"):
        build_plan(replace(job, timing_cache=str(cache)))
    assert not cache.exists()


# --- the timing cache


def test_the_second_build_starts_from_the_first_ones_timings(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, timing_cache=str(tmp_path / "timing" / "cache"))
    first = Process(tmp_path, monkeypatch).run(job)
    second = Process(tmp_path, monkeypatch).run(job)
    size = len(b"8.6.0:MatMul Relu")
    assert first.timing_cache_bytes == (0, size)
    assert second.timing_cache_bytes == (size, size)


def test_what_others_measured_meanwhile_stays(job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    timing_cache.write(str(path), b"8.6.0:Conv")
    job = replace(job, timing_cache=str(path))

    class Said(list[Any]):
        def append(self, message: dict[str, Any]) -> None:
            if message.get("stage") == "writing":  # another process, while this one was building
                timing_cache.write(str(path), b"8.6.0:Conv Gemm")

    process = Process(tmp_path, monkeypatch)
    process.said = Said()
    assert process.run(job).failure is None
    assert timing_cache.read(str(path)) == (b"8.6.0:Conv Gemm MatMul Relu", "")


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "empty", "older TensorRT"])
def test_a_damaged_or_foreign_timing_cache_is_replaced_with_a_note(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "cache"
    timing_cache.write(str(path), b"8.6.0:Conv" if damage != "older TensorRT" else b"8.5.1:Conv")
    whole = path.read_bytes()
    ends = {"cut": whole[:-1], "flipped": whole[:-1] + b"w", "garbage": b"\x93NUMPY", "empty": b""}
    path.write_bytes(ends.get(damage, whole))
    result = Process(tmp_path, monkeypatch).run(replace(job, timing_cache=str(path)))
    expected = "it is of another TensorRT or GPU" if damage == "older TensorRT" else "was damaged and is replaced"
    assert any(expected in note for note in result.notes), result.notes
    assert timing_cache.read(str(path)) == (b"8.6.0:MatMul Relu", "")


@pytest.mark.parametrize("why", ["a folder in its place", "no such folder can be made", "locked by another"])
def test_a_timing_cache_that_cannot_be_kept_is_a_note(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path, process = tmp_path / "cache", Process(tmp_path, monkeypatch)
    held: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if why == "a folder in its place":
        path.mkdir()
    elif why == "locked by another":
        monkeypatch.setattr(worker_timings, "LOCK_TIMEOUT_S", 0.05)
        held = timing_cache.locked(str(path), 1.0)
    else:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "cache"
    with held:
        result = process.run(replace(job, timing_cache=str(path)))
    assert result.failure is None
    assert process.facts()
    assert any(f"the timing cache {path}" in note for note in result.notes), result.notes


def test_the_timing_cache_stays_in_memory(job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing can be written; but not when its file is removed, and not from one file to another."""
    path = tmp_path / "timing" / "cache"
    job = replace(job, timing_cache=str(path))
    process = Process(tmp_path, monkeypatch, tells=True)

    def timed(job: BuildJob) -> list[str]:
        assert process.run(job).failure is None
        found: list[str] = process.facts()["timed"]
        return found

    assert timed(job) == []
    assert timed(job) == ["MatMul", "Relu"]
    assert timed(replace(job, timing_cache=None)) == []
    assert timed(replace(job, timing_cache=str(path.with_name("other")))) == []
    path.unlink()
    assert timed(job) == []
    timing_cache.write(str(path), b"8.6.0:Conv")
    assert timed(job) == ["Conv", "MatMul", "Relu"]
    assert timing_cache.read(str(path)) == (b"8.6.0:Conv MatMul Relu", "")
    nowhere = replace(job, timing_cache=str(path / "below a file"))
    assert timed(nowhere) == []
    assert timed(nowhere) == ["MatMul", "Relu"]


@pytest.mark.parametrize("was_there", [False, True])
def test_a_timing_cache_that_the_library_does_not_load(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_there: bool
) -> None:
    """As 8.6 on Hopper: it stays in memory, is told once, is no warning of the build, and is not on disk."""
    path = tmp_path / "cache"
    if was_there:
        timing_cache.write(str(path), b"8.6.0:Conv")
    job = replace(job, timing_cache=str(path), tactic_sources=())
    process = Process(tmp_path, monkeypatch, tells=True, cache_refused=True)
    result = process.run(job)
    assert result.failure is None
    assert result.warnings == ("a warning of two lines",)
    assert result.timing_cache_bytes == (0, len(b"8.6.0:MatMul Relu"))
    notes = list(result.notes)
    if was_there:
        assert "TensorRT does not load the timing cache" in notes[0]
        assert "The timing cache will not be used!" in notes.pop(0)
    assert len(notes) == 1
    assert "stays in the build process" in notes[0]
    assert "Myelin" in notes[0]
    assert not path.exists()
    assert process.run(job).notes == ()
    assert process.facts()["timed"] == ["MatMul", "Relu"]


def test_one_timing_cache_a_version_gpu_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.tuning import files

    gpu = files.Environment("NVIDIA H200", "9.0", "580.65.06", "2.11", "13.0", "3.6", "abc")
    monkeypatch.setattr(files, "environment_of", lambda device: gpu)
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(tmp_path))
    path = timing_cache_path("8.6.0", 0)
    assert path == tmp_path / "timing" / "tensorrt-8.6.0-nvidia-h200-9.0-driver-580.65.06.cache"


# --- plugins


@pytest.mark.parametrize("version", fake_tensorrt.VERSIONS)
def test_plugin_libraries_are_loaded_once(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.tensorrt import plugin_libraries

    monkeypatch.setattr(plugin_libraries, "_loaded", set())
    trt = fake_tensorrt.load(version)
    library = compiled(tmp_path, "plugins.so")
    assert plugin_libraries.load_plugins(trt, trt.Logger(), [library]) is None
    assert trt._creators[1:] == [library]
    assert plugin_libraries.load_plugins(trt, trt.Logger(), [library]) is None
    assert trt._creators[1:] == [library]


def test_plugin_libraries_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.tensorrt import plugin_libraries

    monkeypatch.setattr(plugin_libraries, "_loaded", set())
    trt = fake_tensorrt.load("8.6")
    (tmp_path / "text.so").write_text("no library")
    why = plugin_libraries.load_plugins(trt, trt.Logger(), [str(tmp_path / "text.so")])
    assert why is not None
    assert "does not load" in why
    why = plugin_libraries.load_plugins(trt, trt.Logger(), [compiled(tmp_path, "without_plugins.so")])
    assert why is not None
    assert "holds no plugins for this TensorRT" in why
