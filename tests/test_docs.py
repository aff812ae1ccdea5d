"""The documents' code runs: every block marked `python`, top to bottom as a reader would, one namespace a document."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENTS = [path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Classes that a document defines look their module up, as dataclasses do."""
    made = ModuleType(f"docs_{request.node.callspec.id.removesuffix('.md').replace('-', '_')}")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]
    torch._dynamo.reset()


def test_getting_started_has_code() -> None:
    assert "getting-started.md" in {path.name for path in DOCUMENTS}


@pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_code_runs(document: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = document.read_text()
    for match in BLOCK.finditer(text):
        # Blank lines before it, so that a failure points to the line of the document.
        source = "\n" * (text[: match.start(1)].count("\n")) + match[1]
        name = f"{document}#{match.start()}"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), module.__dict__)
