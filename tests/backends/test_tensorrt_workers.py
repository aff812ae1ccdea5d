"""The build processes: one that serves several jobs, what ends it, what it shares and with whom, and that nothing is left."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
import tensorrt_jobs
from tensorrt_jobs import children, compiled, facts_of

from accelkit.backends.tensorrt import building, timing_cache, worker_build, workers
from accelkit.backends.tensorrt.building import build_plan, stop_workers, warm
from accelkit.backends.tensorrt.job import BuildJob
from accelkit.backends.tensorrt.worker_library import Library
from accelkit.errors import LoweringError

pytest.importorskip("onnx")

Install = Callable[..., None]


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    return tensorrt_jobs.small_job(tmp_path / "model")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("8.6", build_seconds=1): what child processes import as tensorrt."""
    return functools.partial(fake_tensorrt.install, tmp_path / "site", monkeypatch, tells=True)


@pytest.fixture(autouse=True)
def _nothing_is_left(job: BuildJob, tmp_path: Path) -> Iterator[None]:
    yield
    tensorrt_jobs.nothing_is_left(job, tmp_path)


def pid_of(job: BuildJob, **how: Any) -> int:
    """Build it; the process that did."""
    plan, _ = build_plan(job, **how)
    return int(facts_of(plan)["pid"])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- it stays


def test_the_second_job_finds_the_process_of_the_first(job: BuildJob, install: Install) -> None:
    install(start_seconds=0.3)
    words: list[str] = []
    first, cold = build_plan(job)
    second, warmed = build_plan(job, say=words.append)
    assert facts_of(first)["pid"] == facts_of(second)["pid"]
    assert children() == [facts_of(first)["pid"]]
    assert cold.seconds["start"] >= 0.3
    assert warmed.seconds["start"] == 0.0
    assert warmed.seconds["total"] < cold.seconds["total"]
    assert words[0] == "TensorRT parsing, 0 s"
    assert cold.warnings == warmed.warnings
    assert os.getsid(children()[0]) != os.getsid(0)  # the terminal's Ctrl-C goes to its process group


def test_it_starts_while_the_caller_does_something_else(job: BuildJob, install: Install) -> None:
    install(start_seconds=0.3)
    started = time.monotonic()
    warm()
    warm()
    assert time.monotonic() - started < 0.25
    (pid,) = children()
    until(lambda: workers._gpus["0"]._process._is_ready)
    plan, result = build_plan(job)
    assert facts_of(plan)["pid"] == pid
    assert result.seconds["start"] == 0.0


def test_what_the_library_measured_stays_in_memory(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install(cache_refused=True)
    job = replace(job, timing_cache=str(tmp_path / "cache"))
    assert facts_of(build_plan(job)[0])["timed"] == []
    assert facts_of(build_plan(job)[0])["timed"] == ["MatMul", "Relu"]


def test_a_process_that_was_started_in_another_folder(
    job: BuildJob, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    pid = pid_of(job)
    monkeypatch.chdir(Path(job.onnx).parent)
    assert pid_of(replace(job, onnx="model.onnx")) == pid


def test_a_refused_network_is_no_reason_to_end_it(job: BuildJob, install: Install) -> None:
    install(refuse=["Relu"])
    for _ in range(2):
        with pytest.raises(LoweringError, match="parser refuses Relu"):
            build_plan(job)
    assert len(children()) == 1


def test_another_environment_takes_another_process(
    job: BuildJob, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    pid = pid_of(job)
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    assert pid_of(job) == pid
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    assert pid_of(job) != pid
    assert pid not in children()


def test_each_gpu_has_its_own(job: BuildJob, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    pids = [pid_of(replace(job, device=device)) for device in (0, 1, 0)]
    assert pids[0] == pids[2] != pids[1]
    assert sorted(children()) == sorted(pids[:2])


def test_plugins_of_earlier_jobs_are_no_others(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install()
    library = compiled(tmp_path, "plugins.so")
    plain = pid_of(job)
    with_plugins = replace(job, plugin_library=(library,))
    assert pid_of(with_plugins) == plain
    warm()
    assert pid_of(with_plugins) == plain
    without = pid_of(job)
    assert without != plain
    assert pid_of(with_plugins) == without
    os.utime(library, ns=(1, 1))  # compiled anew
    assert pid_of(with_plugins) != without


# --- what ends it


def test_idle_time_ends_it(job: BuildJob, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_S", 0.3)
    install(build_seconds=0.4)
    warm()
    pids = [pid_of(job), pid_of(job)]
    assert pids[0] == pids[1]
    until(lambda: not children())
    assert pid_of(job) != pids[0]


def test_one_that_dies_between_jobs_is_replaced(job: BuildJob, install: Install) -> None:
    install()
    pid = pid_of(job)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not children())  # waited for at once
    assert pid_of(job) != pid
    os.kill(children()[0], signal.SIGKILL)  # perhaps not seen before the job is sent
    assert pid_of(job) != pid


@pytest.mark.parametrize("words", ["Error Code 2: OutOfMemory", "Cuda Runtime (an illegal memory access)"])
def test_what_may_have_left_disorder_ends_it(job: BuildJob, install: Install, words: str) -> None:
    install(build_fails=words)
    with pytest.raises(LoweringError):
        build_plan(job)
    assert children() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SIGSEGV", r"TensorRT crashed while building \(SIGSEGV\); this process is unharmed.*last it said: a warning"),
        ("SIGKILL", "machine running out of memory"),
    ],
)
def test_a_crash_leaves_this_process_unharmed(job: BuildJob, install: Install, name: str, message: str) -> None:
    install(build_exit=name)
    for _ in range(2):
        with pytest.raises(LoweringError, match=message):
            build_plan(job)
        assert children() == []


@pytest.mark.parametrize("earlier", [False, True])
def test_one_that_cannot_start_tells_its_last_words(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr(workers, "WORKER", script)
    if earlier:
        warm()
    with pytest.raises(LoweringError, match=r"status 1 and without a result; the last it said: no such luck"):
        build_plan(job)


def test_no_process_can_be_started(job: BuildJob, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    warm()
    with pytest.raises(LoweringError, match=r"starting its process: .*/no/such/python"):
        build_plan(job)
    monkeypatch.setattr(sys, "executable", "")
    warm()
    with pytest.raises(LoweringError, match="no executable to start"):
        build_plan(job)


@pytest.mark.parametrize("jobs_before", [0, 1])
def test_a_time_limit(job: BuildJob, install: Install, jobs_before: int) -> None:
    install(build_seconds=0.6)
    before = [pid_of(job) for _ in range(jobs_before)]
    with pytest.raises(LoweringError, match=r"still \w+ after the 0\.4 s .* raise time_limit_s"):
        build_plan(job, time_limit_s=0.4)
    assert children() == []
    assert before != [pid_of(job)]


@pytest.mark.parametrize("jobs_before", [0, 1])
def test_ctrl_c_ends_it_and_is_passed_on(job: BuildJob, install: Install, tmp_path: Path, jobs_before: int) -> None:
    """Of a timing cache that it was writing nothing stays either."""
    install(build_seconds=0.4)
    cache = tmp_path / "timing" / "cache"
    job = replace(job, timing_cache=str(cache))
    before = [pid_of(job) for _ in range(jobs_before)]

    def interrupt(words: str) -> None:
        if "building" in words:
            cache.parent.mkdir(exist_ok=True)
            timing_cache.temporary_path(str(cache), children()[0]).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(job, say=interrupt)
    assert children() == []
    assert not list(cache.parent.glob("*.tmp"))
    assert before != [pid_of(job)]


def test_it_ends_with_its_parent(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install(build_seconds=60)
    (tmp_path / "job.json").write_text(replace(job, plan=str(tmp_path / "engine.plan")).to_json())
    command = [sys.executable, "-X", "importtime", str(workers.WORKER)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(json.dumps(str(tmp_path / "job.json")).encode() + b"\n")
    process.stdin.flush()
    while b"building" not in process.stdout.readline():
        pass
    process.stdin.close()  # as the operating system does it when the parent is gone
    assert process.wait(10) == 1
    imported = {line.rpartition(b"|")[2].strip().partition(b".")[0].decode() for line in process.stderr}
    assert {"job", "versions"} <= imported
    assert not imported & {"torch", "accelkit", "filelock"}
    process.stdout.close()
    process.stderr.close()


def test_it_is_told_to_stop(job: BuildJob, install: Install) -> None:
    install()
    stop_workers()
    pid_of(job)
    assert len(children()) == 1
    stop_workers()
    assert children() == []
    pid_of(job, say=lambda words: stop_workers())  # after the build
    assert children() == []


# --- others who want to build


def test_threads_take_turns(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install(build_seconds=0.3)
    shared = replace(job, timing_cache=str(tmp_path / "timing" / "cache"))
    built: list[tuple[bytes, Any]] = []
    words: list[str] = []
    threads = [threading.Thread(target=lambda: built.append(build_plan(shared, say=words.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({facts_of(plan)["pid"] for plan, _ in built}) == 1
    assert [facts_of(plan)["timed"] for plan, _ in built] == [[], ["MatMul", "Relu"], ["MatMul", "Relu"]]
    waits = [result.seconds.get("wait", 0.0) for _, result in built]
    assert waits[0] == 0.0
    assert waits[2] > waits[1] > 0.3
    assert timing_cache.read(str(shared.timing_cache)) == (b"8.6.0:MatMul Relu", "")


def test_other_processes_are_waited_for_outside_the_time_limit(job: BuildJob, install: Install, tmp_path: Path) -> None:
    install()
    job = replace(job, tactic_sources=())
    pid_of(job)
    lock = str(tmp_path / "gpu")
    words: list[str] = []
    done = threading.Event()

    def other() -> None:
        with timing_cache.locked(lock, 0.0) as why:
            assert not why
            held.set()
            done.wait(10)

    def say(text: str) -> None:
        words.append(text)
        if "waiting" in text:
            threading.Timer(1.0, done.set).start()

    held = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    _, result = build_plan(replace(job, gpu_lock=lock), say=say, time_limit_s=0.8)
    thread.join()
    assert result.seconds["wait"] >= 0.9
    assert result.seconds["build"] < 0.8
    assert any("waiting for another build on this GPU" in text for text in words)
    assert result.notes == ()


def test_a_process_that_never_builds_to_its_end_is_not_waited_for(
    job: BuildJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_build, "GPU_LOCK_TIMEOUT_S", 0.1)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.load("8.6"))
    lock = str(tmp_path / "gpu")
    library = Library()
    library.start()
    with timing_cache.locked(lock, 0.0):
        job = replace(job, plan=str(tmp_path / "plan"), gpu_lock=lock, tactic_sources=())
        result = worker_build.run(job, library, {}, lambda message: None)
    assert result.failure is None
    (note,) = result.notes
    assert "may have disturbed what TensorRT measured" in note
    assert "another process has held its lock for 0.1 s" in note


def test_the_lock_is_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert torch.cuda.is_available() or building.gpu_lock_path(0) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"uuid": "1a2b"}))
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(tmp_path))
    assert building.gpu_lock_path(0) == str(tmp_path / "timing" / "gpu-1a2b")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_a_forked_child_has_none(job: BuildJob, install: Install) -> None:
    """It builds in a process of its own, and does not keep the parent's alive."""
    install()
    pid = pid_of(job)
    wake, woken = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(woken)
            os.read(wake, 1)
            status = 0 if pid_of(job) != pid else 2
            stop_workers()
        finally:
            os._exit(status)
    os.close(wake)
    assert pid_of(job) == pid
    process = workers._gpus["0"]._process
    process._process.stdin.close()  # as if this process were gone
    until(lambda: children() == [child])
    os.close(woken)
    assert os.waitpid(child, 0)[1] == 0


def test_the_process_sees_one_gpu_and_our_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/first")
    monkeypatch.setattr(sys, "path", ["", "/second", "/first"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.environment_of(1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert workers.environment_of(0)["PYTHONPATH"] == os.pathsep.join(["/first", "/second"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert workers.environment_of(1)["CUDA_VISIBLE_DEVICES"] == "GPU-b"
