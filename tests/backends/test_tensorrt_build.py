"""Building in a process of its own: the worker's path under every version, what can go wrong, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import numpy as np
import pytest

from accelkit.backends.tensorrt import building, timing_cache, worker
from accelkit.backends.tensorrt.building import build_plan, start_failure, timing_cache_path
from accelkit.backends.tensorrt.job import BuildJob, BuildResult, Failure, NodeFailure
from accelkit.errors import LoweringError

onnx = pytest.importorskip("onnx")

Install = Callable[..., None]


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    """A small network in a file with its weights beside it: x [batch, 4] -> relu(x w) [batch, 5]."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng().standard_normal((4, 5), dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="node_matmul"),
        helper.make_node("Relu", ["m"], ["y"], name="node_relu"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 4), ("y", 5))
    )
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weights]), opset_imports=[helper.make_opsetid("", 17)]
    )
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return BuildJob(str(path), profile={"x": ((1, 4), (2, 4), (8, 4))})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("8.6", refuse=["Relu"]): what child processes import as tensorrt."""

    def installed(version: str = "8.6", **faults: Any) -> None:
        fake_tensorrt.install(tmp_path / "site", monkeypatch, version, **faults)

    return installed


@pytest.fixture(autouse=True)
def _nothing_is_left(job: BuildJob, tmp_path: Path) -> Iterator[None]:
    """After each test: no temporary file anywhere, and no process of ours."""
    yield
    assert sorted(path.name for path in Path(job.onnx).parent.iterdir()) == ["model.data", "model.onnx"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def facts_of(plan: bytes) -> dict[str, Any]:
    """What the stand-in's plan tells of the build."""
    assert plan.startswith(b"fake plan ")
    facts: dict[str, Any] = json.loads(plan[10:].partition(b"\n")[0])
    return facts


def in_this_process(job: BuildJob, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **faults: Any) -> Any:
    """The worker's `run`, for what needs no process: its result, the plan's facts, and what it said."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.load(version, **faults))
    said: list[dict[str, Any]] = []
    plan = tmp_path / "engine.plan"
    result = worker.run(replace(job, plan=str(plan)), said.append)
    return result, facts_of(plan.read_bytes()) if plan.exists() else {}, said


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
        workspace_bytes=2**30,
        optimization_level=2,
        tactic_sources=("jit_convolutions",),
        version_compatible=True,
        hardware_compatible="ampere_plus",
        refittable=True,
        sparse_weights=True,
        max_aux_streams=0,
    )
    result, facts, said = in_this_process(job, version, tmp_path, monkeypatch)
    assert result.failure is None
    flags = {"REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE"}
    old = version == "8.6"
    assert set(facts["flags"]) == flags | ({"FP16", "OBEY_PRECISION_CONSTRAINTS"} if old else set())
    assert facts["fp32"] == (["node_relu"] if old else [])
    notes = ("of the nodes to keep in fp32 the network has no layer for node_gone",) if old else ()
    assert result.notes == notes
    assert facts["workspace"] == 2**30
    assert facts["tactic_sources"] == 1 << {"8.6": 4, "10.16": 4, "11.4": 1}[version]
    assert [message["stage"] for message in said if "stage" in message] == [
        "starting",
        "parsing",
        "building",
        "writing",
    ]
    assert any("of" in message for message in said) == (not old)
    assert result.timing_cache_bytes is not None
    assert result.timing_cache_bytes[0] == 0


def test_jobs_and_results_survive_json(job: BuildJob) -> None:
    full = replace(job, keep_fp32=("a",), tactic_sources=("cudnn",), plugin_library=("b.so",), timing_cache="c")
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
    monkeypatch.setattr(building, "SAY_EVERY_S", 0.05)
    for version, pattern in (("8.6", "TensorRT building, "), ("11.4", "TensorRT building 50 %, ")):
        install(version, build_seconds=0.4)
        words: list[str] = []
        build_plan(job, say=words.append)
        assert any(line.startswith(pattern) for line in words), words


def test_the_worker_sees_one_gpu_and_our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/first")
    monkeypatch.setattr(sys, "path", ["", "/second"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert building._environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert building._environment(0)["PYTHONPATH"] == os.pathsep.join(["/first", "/second"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert building._environment(1)["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_the_worker_imports_neither_torch_nor_accelkit(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install()
    (tmp_path / "job.json").write_text(replace(job, plan=str(tmp_path / "engine.plan")).to_json())
    command = [sys.executable, "-X", "importtime", str(building.WORKER), str(tmp_path / "job.json")]
    run = subprocess.run(command, stdin=subprocess.PIPE, capture_output=True, text=True, timeout=60)
    # closing standard input ends a worker; subprocess.run closes it at once, and so the build may have been cut short
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert {"job", "versions"} <= imported
    assert not imported & {"torch", "accelkit", "filelock"}


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
    result, _, _ = in_this_process(job, "8.6", tmp_path, monkeypatch, **faults)
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SIGSEGV", r"TensorRT crashed while building \(SIGSEGV\); this process is unharmed.*last it said: a warning"),
        ("SIGKILL", "machine running out of memory"),
    ],
)
def test_a_crash_leaves_this_process_unharmed(job: BuildJob, install: Install, name: str, message: str) -> None:
    install(build_exit=name)
    with pytest.raises(LoweringError, match=message):
        build_plan(job)


def test_an_error_in_the_worker_is_no_silence(job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    result = worker.run(replace(job, plan=str(tmp_path / "plan")), lambda message: None)
    assert result.failure is not None
    assert result.failure.kind == "worker"
    assert "AttributeError" in result.failure.message
    assert "worker.py" in result.failure.message


def test_a_worker_that_cannot_start_tells_its_last_words(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr(building, "WORKER", script)
    with pytest.raises(LoweringError, match=r"status 1 and without a result; the last it said: no such luck"):
        build_plan(job)


def test_a_full_disk(job: BuildJob, install: Install, tmp_path: Path) -> None:
    cache = tmp_path / "timing" / "cache"
    install(plan_bytes=200_000, file_limit=100_000)
    with pytest.raises(LoweringError, match=r"engine\.plan: File too large; free room beside the ONNX file"):
        build_plan(replace(job, timing_cache=str(cache)))
    assert not cache.exists()


def test_a_time_limit(job: BuildJob, install: Install) -> None:
    install(build_seconds=60)
    started = time.monotonic()
    with pytest.raises(LoweringError, match=r"still building after the 1\.5 s .* raise time_limit_s"):
        build_plan(job, time_limit_s=1.5)
    assert time.monotonic() - started < 10


def test_ctrl_c_ends_the_worker_and_is_passed_on(job: BuildJob, install: Install) -> None:
    install(build_seconds=60)

    def interrupt(words: str) -> None:
        if "building" in words:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(job, say=interrupt)


def test_the_terminals_ctrl_c_does_not_reach_the_worker(job: BuildJob, install: Install) -> None:
    """It goes to the terminal's process group: the worker is in a session of its own, and ends when the parent says so."""
    install(build_seconds=60)
    sessions: list[int] = []

    def look(words: str) -> None:
        if "building" in words:
            sessions.extend(os.getsid(pid) for pid in children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(job, say=look)
    assert len(sessions) == 1
    assert os.getsid(0) not in sessions


def test_the_worker_ends_with_its_parent(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install(build_seconds=60)
    (tmp_path / "job.json").write_text(replace(job, plan=str(tmp_path / "engine.plan")).to_json())
    process = subprocess.Popen(
        [sys.executable, str(building.WORKER), str(tmp_path / "job.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    while b"building" not in process.stdout.readline():
        pass
    process.stdin.close()  # as the operating system does it when the parent is gone
    assert process.wait(10) == 1
    process.stdout.close()


def test_builds_from_several_threads(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install(build_seconds=0.2)
    shared = replace(job, timing_cache=str(tmp_path / "timing" / "cache"))
    plans: list[bytes] = []
    threads = [threading.Thread(target=lambda: plans.append(build_plan(shared)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 2
    assert plans[0] == plans[1]
    assert timing_cache.read(str(shared.timing_cache)) == (b"8.6.0:MatMul Relu", "")


# --- the timing cache


def test_the_second_build_starts_from_the_first_ones_timings(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, timing_cache=str(tmp_path / "timing" / "cache"))
    first, _, _ = in_this_process(job, "8.6", tmp_path, monkeypatch)
    second, _, _ = in_this_process(job, "8.6", tmp_path, monkeypatch)
    size = len(b"8.6.0:MatMul Relu")
    assert first.timing_cache_bytes == (0, size)
    assert second.timing_cache_bytes == (size, size)


def test_what_others_measured_meanwhile_stays(job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cache"
    timing_cache.write(str(path), b"8.6.0:Conv")
    job = replace(job, timing_cache=str(path))

    def say(message: dict[str, Any]) -> None:
        if message.get("stage") == "writing":  # another process, while this one was building
            timing_cache.write(str(path), b"8.6.0:Conv Gemm")

    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.load("8.6"))
    result = worker.run(replace(job, plan=str(tmp_path / "plan")), say)
    assert result.failure is None
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
    result, _, _ = in_this_process(replace(job, timing_cache=str(path)), "8.6", tmp_path, monkeypatch)
    expected = "is of another TensorRT or GPU" if damage == "older TensorRT" else "was damaged and is replaced"
    assert any(expected in note for note in result.notes), result.notes
    assert timing_cache.read(str(path)) == (b"8.6.0:MatMul Relu", "")


@pytest.mark.parametrize("why", ["a folder in its place", "no such folder can be made", "locked by another"])
def test_a_timing_cache_that_cannot_be_kept_is_a_note(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path = tmp_path / "cache"
    held: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if why == "a folder in its place":
        path.mkdir()
    elif why == "locked by another":
        monkeypatch.setattr(timing_cache, "LOCK_TIMEOUT_S", 0.05)
        held = timing_cache.locked(str(path))
    else:
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "cache"
    with held:
        result, facts, _ = in_this_process(replace(job, timing_cache=str(path)), "8.6", tmp_path, monkeypatch)
    assert result.failure is None
    assert facts
    assert any(f"the timing cache {path}" in note for note in result.notes), result.notes


def test_a_timing_cache_that_was_being_written_leaves_nothing(job: BuildJob, install: Install, tmp_path: Path) -> None:
    """Of a worker that is killed between writing and renaming, the parent removes what it wrote."""
    install(build_seconds=60)
    cache = tmp_path / "timing" / "cache"
    cache.parent.mkdir()

    def half_written(words: str) -> None:
        if "building" in words:
            (pid,) = children()
            timing_cache.temporary_path(str(cache), pid).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(replace(job, timing_cache=str(cache)), say=half_written)
    assert list(cache.parent.iterdir()) == []


def children() -> list[int]:
    """Processes that this one has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


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


def compiled(folder: Path, name: str) -> str:
    """A shared library that registers nothing by itself: one of Python's own extension modules, under another name."""
    import _ctypes_test

    path = folder / name
    path.write_bytes(Path(_ctypes_test.__file__).read_bytes())
    return str(path)
