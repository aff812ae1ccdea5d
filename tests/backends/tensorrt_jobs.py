"""A small network to build, where the stand-in's plan came from, and what a build must not leave behind."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accelkit.backends.tensorrt.building import stop_workers
from accelkit.backends.tensorrt.job import BuildJob

VERSIONS = ("8.6", pytest.param("10.16", marks=pytest.mark.exhaustive), "11.4")
"""Where 10 takes the same way as 11, every run goes it once; test_tensorrt_versions and _build always have all three."""


def small_job(folder: Path) -> BuildJob:
    """A small network in a file with its weights beside it: x [batch, 4] -> relu(x w) [batch, 5]."""
    import onnx
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
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return BuildJob(str(path), profile={"x": ((1, 4), (2, 4), (8, 4))})


def facts_of(plan: bytes) -> dict[str, Any]:
    """What the stand-in's plan tells of the build."""
    assert plan.startswith(b"fake plan ")
    facts: dict[str, Any] = json.loads(plan[10:].partition(b"\n")[0])
    return facts


def children() -> list[int]:
    """Processes that this one has started, zombies as well."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def compiled(folder: Path, name: str) -> str:
    """A shared library that registers nothing by itself: one of numpy's, under another name (not every Python has its own)."""
    from numpy.random import _common

    path = folder / name
    path.write_bytes(Path(_common.__file__).read_bytes())
    return str(path)


def nothing_is_left(job: BuildJob, folder: Path) -> None:
    """No temporary file anywhere, and, once it is told to end, no process of ours."""
    assert sorted(path.name for path in Path(job.onnx).parent.iterdir()) == ["model.data", "model.onnx"]
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
    stop_workers()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
