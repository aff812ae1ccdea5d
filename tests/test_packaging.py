"""What a user installs: the wheel's contents, the entry points, the boundary of the core, a third party's plug-in."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from accelkit import plugins
from accelkit.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRIES = [
    (group, name, value)
    for group in (plugins.BACKENDS, plugins.PASSES)
    for name, value in PROJECT["entry-points"][group].items()
]
# What a pass, ours or anyone's, may import. Everything else in accelkit may change without notice.
PUBLIC = {
    "__init__",
    "attention_patterns",
    "backend_api",
    "errors",
    "graph",
    "onnx_weights",
    "ops",
    "pass_api",
    "precision",
    "quantization",
    "testing",
}


def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def other_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, to put an installed distribution's metadata in; what was found there is forgotten after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    monkeypatch.undo()
    plugins.refresh()


def install(folder: Path, name: str, group: str, line: str) -> None:
    """The part of an installation that entry points are read from."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    plugins.refresh()


@pytest.mark.parametrize(("group", "name", "value"), ENTRIES, ids=[f"{g}-{n}" for g, n, _ in ENTRIES])
def test_entry_point_resolves(group: str, name: str, value: str) -> None:
    installed = {entry.value for entry in entry_points(group=group, name=name)}
    assert value in installed, "installed entry points are older than pyproject.toml: repeat `pip install -e .`"
    cls = plugins.find(group, name)
    assert f"{cls.__module__}:{cls.__qualname__}" == value
    assert cls.name == name, f"registered as {name!r}, calls itself {cls.name!r}"


def test_every_pass_and_backend_file_is_registered() -> None:
    """A file that nobody registered can be asked for by nobody, and no test here would miss it."""
    files = {f"accelkit_passes.{path.stem}" for path in (ROOT / "passes" / "accelkit_passes").glob("[!_]*.py")}
    files |= {f"accelkit.backends.{path.stem}" for path in (ROOT / "accelkit" / "backends").glob("[!_]*.py")}
    registered = {value.partition(":")[0] for _, _, value in ENTRIES}
    assert files - registered == set()


def test_torch_compile_knows_accelkit() -> None:
    import torch

    assert "accelkit" in torch.compiler.list_backends()


def test_two_owners_of_a_name_are_an_error_that_names_both(other_distribution: Path) -> None:
    install(other_distribution, "rival", plugins.BACKENDS, "eager = rival.module:Eager")
    with pytest.raises(InputError) as caught:
        plugins.find(plugins.BACKENDS, "eager")
    assert "accelkit (accelkit.backends.eager:Eager)" in str(caught.value)
    assert "rival (rival.module:Eager)" in str(caught.value)


def test_two_owners_of_one_name_leave_the_other_names_alone(other_distribution: Path) -> None:
    install(other_distribution, "rival", plugins.BACKENDS, "eager = rival.module:Eager")
    assert plugins.find(plugins.BACKENDS, "inductor").name == "inductor"


def test_broken_plugin_is_an_error_that_names_it_only_when_asked_for(other_distribution: Path) -> None:
    install(other_distribution, "broken", plugins.PASSES, "broken_pass = broken.nowhere:Pass")
    assert "broken_pass" in plugins.names(plugins.PASSES)
    assert plugins.find(plugins.PASSES, "canonicalise").name == "canonicalise"
    with pytest.raises(Exception, match=r"broken\.nowhere:Pass of broken") as caught:
        plugins.find(plugins.PASSES, "broken_pass")
    assert isinstance(caught.value.__cause__, ImportError)


def test_unknown_name_lists_the_known_and_says_to_repeat_an_editable_install() -> None:
    with pytest.raises(
        InputError, match=r"did you mean 'onnxruntime'.*eager, fastertransformer, inductor.*pip install -e"
    ):
        plugins.find(plugins.BACKENDS, "onxruntime")


def test_plugin_distribution_is_found_and_used(tmp_path: Path) -> None:
    """Built and installed by pip; .ci/run does it again with accelkit's wheel instead of this checkout."""
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site))
    run("-m", "pip", "install", *options, str(ROOT / "tests" / "plugin_dist"), cwd=tmp_path)
    done = run(str(ROOT / "tests" / "installed" / "with_plugin.py"), cwd=tmp_path, path=site)
    assert "interpreter" in done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # the sdist first, and the wheel from it: an sdist that lacks a file cannot make this wheel
    run("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    return folder


def test_wheel_holds_both_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {ROOT: ROOT / "accelkit", ROOT / "passes": ROOT / "passes" / "accelkit_passes"}
    for above, package in packages.items():
        files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {str(path.relative_to(above)) for path in files} <= names  # data files too
    assert {"accelkit/py.typed", "accelkit_passes/py.typed"} <= names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {
        "accelkit",
        "accelkit_passes",
        f"accelkit-{PROJECT['version']}.dist-info",
    }


def test_import_accelkit_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys, torch; before = set(sys.modules); import accelkit; print(*set(sys.modules) - before)"
    added = set(run("-c", script, cwd=tmp_path).stdout.split())
    assert "accelkit" in added
    heavy = {"onnx", "onnxruntime", "onnxscript", "onnxoptimizer", "onnx_graphsurgeon", "transformers", "triton"}
    heavy |= {"rich", "platformdirs", "matplotlib", "torch._dynamo", "torch._inductor", "torch.onnx"}
    assert added & heavy == set()


def accelkit_modules_imported_by(source: str) -> set[str]:
    """Names of the modules right under accelkit that a file imports; `__init__` for accelkit itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "accelkit":
            files = {path.stem for path in (ROOT / "accelkit").iterdir()}
            names = [f"accelkit.{alias.name}" if alias.name in files else "accelkit" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {[*part, "__init__"][1] for part in parts if part[0] == "accelkit"}
    return found


def test_imports_are_read_as_python_reads_them() -> None:
    source = "import accelkit.store, accelkits\nfrom accelkit import twin, optimize\nfrom accelkit.graph import val"
    assert accelkit_modules_imported_by(source) == {"store", "twin", "__init__", "graph"}


@pytest.mark.parametrize(
    "file",
    [*sorted((ROOT / "passes").rglob("*.py")), *sorted((ROOT / "tests" / "plugin_dist").rglob("*.py"))],
    ids=lambda path: path.name,
)
def test_passes_import_public_modules_only(file: Path) -> None:
    """What ours may use, anyone's may: the other direction, that the core names no pass, is ruff's (pyproject.toml)."""
    assert accelkit_modules_imported_by(file.read_text()) - PUBLIC == set()


def test_version_is_the_distributions() -> None:
    import accelkit

    assert accelkit.__version__ == PROJECT["version"]
