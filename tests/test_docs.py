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
import torch._dynamo  # here: it asks for the current folder, which is gone when a test is over

from accelkit.onnx_fused import STANDARD
from accelkit.onnx_microsoft import MICROSOFT
from accelkit.ops import OPERATORS

DOCS = Path(__file__).resolve().parent.parent / "docs"
DOCUMENTS = [path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Classes that a document defines look their module up, as dataclasses do."""
    made = ModuleType(f"docs_{request.node.callspec.id.removesuffix('.md').replace('-', '_')}")
    sys.modules[made.__name__] = made
    registries = (OPERATORS, STANDARD, MICROSOFT)
    before = [dict(registry) for registry in registries]
    yield made
    del sys.modules[made.__name__]
    torch._dynamo.reset()
    for registry, known in zip(registries, before, strict=True):  # an operator that a document adds is no other test's
        for name in registry.keys() - known.keys():
            del registry[name]


def test_getting_started_has_code() -> None:
    assert "getting-started.md" in {path.name for path in DOCUMENTS}


def test_every_document_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    for path in DOCS.glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in index, f"docs/index.md does not link {path.name}"


def test_every_operator_and_pass_of_fused_operators_is_in_its_document() -> None:
    text = (DOCS / "fused-operators.md").read_text()
    generated = text.partition("<!-- table: operators -->")[2].partition("<!-- end -->")[0]
    assert set(re.findall(r"^\| `(\w+)`", generated, re.MULTILINE)) == set(OPERATORS), "run `make tables`"
    by_hand = text.replace(generated, "")
    for name in OPERATORS:
        assert f"`{name}`" in by_hand, f"docs/fused-operators.md does not say what puts {name} into graphs"


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
