"""What every test gets: its own seed, its own engine cache, no way to a model hub, and the exporter's table of operators."""

from __future__ import annotations

import copy
import functools
import os
import sys
import zlib
from pathlib import Path
from typing import Any

# Before torch is imported: under xdist the processes would otherwise fight over the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Before Triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_wider_fixtures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Never the user's own cache, not even from a module's or the session's fixture."""
    os.environ["ACCELKIT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty engine cache for each test, so that none passes because another built the engine."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ACCELKIT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh numbers for each test, the same at each run of it, in whatever order and process it runs."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _one_table_of_operators() -> None:
    """torch.onnx.export reads the source of 500 functions at each call, most of a small export's time: here once a process.

    Each export gets a copy, in which it puts its own translations. Nothing is imported for it: the first export of a
    process is as it always is.
    """
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry = getattr(exporter, "ONNXRegistry", None)
    build = getattr(registry, "from_torchlib", None)
    if build is None or hasattr(build, "cache_info"):
        return
    kept = functools.cache(build)

    def from_torchlib(*given: Any, **named: Any) -> Any:
        made = copy.copy(kept(*given, **named))
        made.functions = {target: list(forms) for target, forms in made.functions.items()}
        return made

    from_torchlib.cache_info = kept.cache_info  # type: ignore[attr-defined]
    registry.from_torchlib = staticmethod(from_torchlib)
