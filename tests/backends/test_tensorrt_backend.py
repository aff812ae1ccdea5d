"""The target tensorrt from graph to results on the stand-in for TensorRT: what compile, lowering, cache and file make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
import test_tensorrt_engine as engine_tests
import torch
from tensorrt_jobs import VERSIONS
from torch import nn

import accelkit
from accelkit import Dim
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT, backend, library, obstacles
from accelkit.backends.tensorrt import engine as engines
from accelkit.backends.tensorrt.building import stop_workers
from accelkit.backends.tensorrt.manifest import MANIFEST, PLAN
from accelkit.capture import capture
from accelkit.errors import LoweringError
from accelkit.lowering import lower
from accelkit.precision import as_precision
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")


class Machine:
    """A machine with a GPU and TensorRT, as far as the target can tell."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.setattr(library, "missing", lambda: None)
        monkeypatch.setattr(library, "device_facts", lambda index=0: dict(engine_tests.GPU))
        monkeypatch.setattr(engines, "Streams", engine_tests.CpuStreams)
        monkeypatch.setattr(engines, "_device", lambda inputs: torch.device("cpu"))
        monkeypatch.setattr(backend, "_device", lambda inputs: 0)
        monkeypatch.setattr(backend, "timing_cache_path", lambda version, device: folder / "timing.cache")
        monkeypatch.setattr(obstacles, "DEVICE", "cpu")
        monkeypatch.setattr(TensorRT, "devices", ("cpu", "cuda"))
        monkeypatch.setattr(TensorRT, "measures_pieces", False)

    def has(self, version: str, **faults: Any) -> None:
        """TensorRT of this version, in this process and in the worker's."""
        module = fake_tensorrt.load(version, **faults)
        self.monkeypatch.setattr(library, "loaded", lambda: module)
        self.monkeypatch.setattr(library, "installed_version", lambda: module.__version__)
        fake_tensorrt.install(self.folder / "library", self.monkeypatch, version, **faults)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(tmp_path, monkeypatch)
    stop_workers()


class Model(nn.Module):
    """Token ids in, a mask and numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 16), nn.Linear(16, 24)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        x = self.layer(self.table(ids)) * mask[..., None]
        return {"features": nn.functional.gelu(x), "largest": x.argmax(-1)}


def example(batch: int = 2, length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 50, (batch, length)), torch.rand(batch, length) > 0.3


QUIET = TensorRT(cuda_graph=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model_with_a_dynamic_batch(machine: Machine, version: str) -> None:
    machine.has(version)
    model = Model().eval()
    batch = {0: Dim("batch", max=8)}
    fast = accelkit.optimize(model, example(), target=QUIET, dynamic_shapes={"ids": batch, "mask": batch}, cache=False)
    for size in (1, 2, 8):
        inputs = example(size)
        expected, result = model(*inputs), fast(*inputs)
        torch.testing.assert_close(result["features"], expected["features"])
        assert torch.equal(result["largest"], expected["largest"])
        assert result["largest"].dtype is torch.int64
    inputs = example(9)
    assert torch.equal(fast(*inputs)["largest"], model(*inputs)["largest"])
    assert fast.stats()["fallback"] == 1
    text = str(fast.report())
    assert "tensorrt" in text
    assert "fp32: 100 %" in text
    assert "timing cache" in text
    assert (machine.folder / "timing.cache").exists()


def test_what_the_builder_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has("8.6")
    jobs = []
    build = backend.build_plan
    monkeypatch.setattr(backend, "build_plan", lambda job, **how: jobs.append((job, how)) or build(job, **how))
    target = TensorRT(
        cuda_graph=False, workspace_gib=0.5, optimization_level=2, timing_cache=str(machine.folder / "own.cache"),
        tactic_sources=(), sparse_weights=True, time_limit_s=90, max_aux_streams=0,
    )  # fmt: skip
    graph = trace(nn.Linear(8, 4).half(), torch.randn(2, 8).half())
    target.compile(graph, [torch.randn(2, 8).half()], CompileContext(as_precision("fp16")))
    (job, how), = jobs  # fmt: skip
    assert how["time_limit_s"] == 90
    assert (job.workspace_bytes, job.optimization_level, job.tactic_sources) == (2**29, 2, ())
    assert (job.sparse_weights, job.max_aux_streams, job.precision) == (True, 0, "fp16")
    assert job.profile == {"input_1": ((2, 8),) * 3}
    assert Path(job.timing_cache) == machine.folder / "own.cache"
    assert not Path(job.onnx).exists(), "temporary files stay behind"


def test_what_the_parser_refuses_runs_in_pytorch(machine: Machine) -> None:
    for version in ("8.6", "10.16"):
        machine.has(version, refuse=["Erf"])
        model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
        program = capture(model, (torch.randn(2, 8),), {})
        lowered = lower(program.graph, QUIET, program.inputs, CompileContext())
        x = torch.randn(2, 8)
        torch.testing.assert_close(lowered.call(x)[0], model(x))
        (refusal,) = lowered.refusals
        assert refusal.node == "gelu"
        assert "parser refuses it" in refusal.reason
        assert [p.operators for p in lowered.pieces] == [1, 1]


def test_integers_beyond_int32_run_in_pytorch_where_there_are_no_others(machine: Machine) -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 8)

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return self.layer((i % 7).float())

    i = torch.tensor([[2**40 + 3]])
    for version, pieces in (("8.6", [2]), ("10.16", [3])):
        machine.has(version)
        program = capture(Far(), (i,), {})
        found = lower(program.graph, QUIET, program.inputs, CompileContext())
        torch.testing.assert_close(found.call(i)[0], program.graph(i)[0])
        assert [p.operators for p in found.pieces] == pieces


def test_engines_are_kept_and_loaded(machine: Machine, tmp_path: Path) -> None:
    machine.has("8.6")
    model, inputs = Model().eval(), example()
    fast = accelkit.optimize(model, inputs, target=QUIET, cache=False)
    fast.save(tmp_path / "model.accel")
    machine.monkeypatch.setattr(backend, "build_plan", None)
    loaded = accelkit.load(tmp_path / "model.accel", cache=False)
    assert torch.equal(loaded(*inputs)["features"], fast(*inputs)["features"])


def test_an_engine_for_another_version_is_built_anew_and_told(machine: Machine, tmp_path: Path) -> None:
    machine.has("8.6")
    graph, x = trace(nn.Linear(8, 4), torch.randn(2, 8)), torch.randn(2, 8)
    blobs = QUIET.compile(graph, [x], CompileContext()).serialize()
    assert set(blobs) == {PLAN, MANIFEST}
    assert json.loads(blobs[MANIFEST])["tensorrt"].startswith("8.6")
    machine.has("10.16")
    with pytest.raises(LoweringError, match=r"built for TensorRT 8\.6.*; here is TensorRT 10\.16"):
        QUIET.load(blobs, graph, [x], CompileContext())
    blobs[PLAN] = blobs[PLAN][:-1]
    with pytest.raises(LoweringError, match="is damaged"):
        QUIET.load(blobs, graph, [x], CompileContext())


def test_a_refit_builds_nothing(machine: Machine) -> None:
    machine.has("8.6")
    first, second, x = nn.Linear(8, 4), nn.Linear(8, 4), torch.randn(2, 8)
    fast = accelkit.optimize(first, x, target=TensorRT(refittable=True, cuda_graph=False), cache=False)
    machine.monkeypatch.setattr(backend, "build_plan", None)
    fast.refit(second.state_dict())
    torch.testing.assert_close(fast(x), second(x))


def test_no_room_for_the_files(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.tensorrt.network import Network

    machine.has("8.6")

    def full(self: Network, folder: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Network, "write", full)
    with pytest.raises(LoweringError, match=r"cannot be written to .*No space left on device; set TMPDIR"):
        QUIET.compile(trace(nn.Linear(8, 4), torch.randn(2, 8)), [torch.randn(2, 8)], CompileContext())


def test_a_plugin_library_that_is_not_there(machine: Machine) -> None:
    machine.has("8.6")
    target = TensorRT(plugin_libraries=("/nowhere/plugins.so",))
    with pytest.raises(LoweringError, match=r"there is no plugin library /nowhere/plugins\.so"):
        target.compile(trace(nn.ReLU(), torch.randn(2)), [torch.randn(2)], CompileContext())


def test_an_interrupted_build_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.has("8.6")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "build_plan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        QUIET.compile(trace(nn.Linear(8, 4), torch.randn(2, 8)), [torch.randn(2, 8)], CompileContext())
    assert list(folder.iterdir()) == []
