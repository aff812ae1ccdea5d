"""For tests of benchmarks/ and docs/: scripts imported as from their own folders, and what they wrote."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def scripts_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import each other as from their own folder; TF32 settings are the process's and go back."""
    before = set(sys.modules)
    settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for folder in ("benchmarks", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = settings
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent in (ROOT / "benchmarks", ROOT / "docs"):
            del sys.modules[name]


def load(name: str) -> Any:
    return importlib.import_module(name)


def results(folder: Path, name: str) -> dict[str, Any]:
    (path,) = folder.glob(f"*/{name}.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found
