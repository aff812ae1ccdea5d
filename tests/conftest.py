"""What every test gets: its own seed, its own cache folder, and no way to a model hub."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

# Before torch is imported: under xdist the processes would otherwise fight over the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh numbers for each test, the same at each run of it, in whatever order and process it runs."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return ROOT
