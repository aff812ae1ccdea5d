"""TensorRT's versions: every name that is used exists in the real bindings; what differs is asked for in its own way."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_tensorrt
import pytest

from accelkit.backends.tensorrt import versions

FOLDER = Path(versions.__file__).parent


@pytest.fixture(params=fake_tensorrt.VERSIONS)
def trt(request: pytest.FixtureRequest) -> ModuleType:
    return fake_tensorrt.load(request.param)


def by_version(trt: ModuleType, old: Any, new: Any) -> Any:
    return old if trt.__version__.startswith("8") else new


# --- the stand-in is what the bindings are


def test_the_stand_in_has_what_the_listing_has_and_nothing_else(trt: ModuleType) -> None:
    listing = json.loads((fake_tensorrt.LISTINGS / f"{'.'.join(trt.__version__.split('.')[:2])}.json").read_text())
    assert listing["version"] == trt.__version__
    for name, facts in listing["classes"].items():
        for member in facts["members"]:
            assert hasattr(getattr(trt, name), member.partition("(")[0]), (name, member)
    public = {name for name in vars(trt) if not name.startswith("_")}
    known = {
        *listing["classes"],
        *listing["enums"],
        *listing["values"],
        *(f.partition("(")[0] for f in listing["functions"]),
    }
    assert public <= known
    with pytest.raises(AttributeError):
        trt.no_such_thing  # noqa: B018


def test_the_stand_in_refuses_what_a_version_lacks() -> None:
    old, new = fake_tensorrt.load("8.6"), fake_tensorrt.load("11.4")
    assert not hasattr(old, "IProgressMonitor")
    assert not hasattr(old, "OnnxParserFlag")
    assert hasattr(old.BuilderFlag, "FP16")
    assert not hasattr(new.BuilderFlag, "FP16")
    config = new.Builder(new.Logger()).create_builder_config()
    with pytest.raises(AttributeError, match="int8_calibrator"):
        config.int8_calibrator = None
    with pytest.raises(TypeError, match=r"set_timing_cache\(cache, ignore_mismatch\)"):
        config.set_timing_cache(None)
    with pytest.raises(NotImplementedError, match="can_run_on_DLA"):
        config.can_run_on_DLA(None)


def test_every_version_is_listed_from_the_script_beside_the_listings() -> None:
    source = (fake_tensorrt.LISTINGS / "make.py").read_text()
    for path in fake_tensorrt.LISTINGS.glob("*.json"):
        assert f'"{json.loads(path.read_text())["version"]}"' in source
        assert path.stat().st_size < 300_000


# --- what the backend's code uses exists


def names_used(path: Path) -> set[tuple[str, ...]]:
    """Dotted names below `trt` or `tensorrt` in a file: `trt.BuilderFlag.TF32` is ("BuilderFlag", "TF32")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        owner = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if parts and owner in ("trt", "tensorrt"):
            found.add(tuple(parts))
    return found


def reached(module: ModuleType, name: tuple[str, ...]) -> bool:
    value: Any = module
    for part in name:
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_names_outside_the_versions_file_exist_in_every_version(file: Path) -> None:
    """What some version lacks is used in versions.py alone, where it is asked for first."""
    everywhere = [fake_tensorrt.load(version) for version in fake_tensorrt.VERSIONS]
    lacking = {name for name in names_used(file) if not all(reached(module, name) for module in everywhere)}
    if file.name == "versions.py":
        allowed = {
            ("IProgressMonitor",),
            ("ExecutionContextAllocationStrategy",),
            ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
            ("BuilderFlag", "PREFER_PRECISION_CONSTRAINTS"),
        }
        guarded = {name for name in lacking if name[:1] in allowed or name[:2] in allowed}
        assert lacking == guarded
        assert all(any(reached(module, name) for module in everywhere) for name in lacking)
        return
    assert lacking == set()


def test_the_names_test_sees_names() -> None:
    assert ("BuilderFlag", "REFIT") in names_used(FOLDER / "worker_build.py")
    assert ("ILogger", "Severity", "WARNING") in names_used(FOLDER / "worker_library.py")


# --- what differs


def test_opsets() -> None:
    assert [versions.newest_opset(v) for v in ("8.6.0", "8.6.1", "9.2.0", "10.0.1", "10.16.1.11", "11.4.0.106", "12.1")] == [
        17, 17, 19, 20, 20, 24, 24,
    ]  # fmt: skip


def test_networks_are_strongly_typed_from_ten_on(trt: ModuleType) -> None:
    assert versions.strongly_typed(trt) == by_version(trt, False, True)
    network = trt.Builder(trt.Logger()).create_network(versions.network_flags(trt))
    assert network._typed == by_version(trt, False, True)


def test_types(trt: ModuleType) -> None:
    assert versions.has_dtype(trt, "float16")
    assert versions.has_dtype(trt, "int64") == by_version(trt, False, True)
    assert versions.has_dtype(trt, "bfloat16") == by_version(trt, False, True)
    assert versions.dtype_name(trt.DataType.HALF) == "float16"
    assert versions.dtype_name(trt.bool) == "bool"
    assert versions.dtype_name(fake_tensorrt.load("11.4").DataType.E8M0) == "e8m0"


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_precision_is_a_flag_in_eight_alone(trt: ModuleType, precision: str) -> None:
    config = trt.Builder(trt.Logger()).create_builder_config()
    if precision == "bf16" and not versions.has_dtype(trt, "bfloat16"):
        with pytest.raises(versions.NotInThisVersionError, match="no bf16, only fp32, tf32, fp16"):
            versions.set_precision(trt, config, precision)
        return
    versions.set_precision(trt, config, precision)
    flags = {name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)}
    expected = {"tf32": {"TF32"}, "fp16": by_version(trt, {"FP16"}, set())}
    assert flags == expected.get(precision, set())


def test_tactic_sources(trt: ModuleType) -> None:
    assert versions.tactic_source_mask(trt, ()) == 0
    config = trt.Builder(trt.Logger()).create_builder_config()
    mask = versions.tactic_source_mask(trt, ("jit_convolutions", "edge_mask_convolutions", "jit_convolutions"))
    config.set_tactic_sources(mask)
    assert config.get_tactic_sources() == mask
    if "CUBLAS" in trt.TacticSource.__members__:
        assert versions.outside_sources(trt) == {"cublas": 1, "cublas_lt": 2, "cudnn": 4}
        return
    assert versions.outside_sources(trt) == {}
    with pytest.raises(versions.NotInThisVersionError, match="no tactic sources cublas, only edge_mask_conv"):
        versions.tactic_source_mask(trt, ("cublas",))


def test_progress_is_that_of_the_outermost_phase(trt: ModuleType) -> None:
    config = trt.Builder(trt.Logger()).create_builder_config()
    seen: list[tuple[str, int, int]] = []
    monitor = versions.set_progress_monitor(trt, config, lambda *what: seen.append(what))
    if monitor is None:
        assert trt.__version__.startswith("8")
        return
    assert config.progress_monitor is monitor
    monitor.phase_start("outer", None, 2)
    monitor.phase_start("inner", "outer", 7)
    assert monitor.step_complete("inner", 0) is True
    assert monitor.step_complete("outer", 0) is True
    monitor.phase_finish("inner")
    monitor.phase_finish("outer")
    assert seen == [("outer", 0, 2), ("outer", 1, 2), ("outer", 2, 2)]


def test_memory_of_contexts(trt: ModuleType) -> None:
    class Engine:
        strategy: Any = "none"

        def create_execution_context(self, strategy: Any) -> str:
            self.strategy = strategy
            return "by strategy"

        def create_execution_context_without_device_memory(self) -> str:
            return "without"

    engine = Engine()
    assert versions.context_without_memory(trt, engine) == by_version(trt, "without", "by strategy")
    if engine.strategy != "none":
        assert engine.strategy is trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = fake_tensorrt.new(trt.IExecutionContext)
    versions.set_context_memory(context, 4096, 64)
    assert context._device_memory == 4096
    assert versions.device_memory_bytes(fake_tensorrt.new(trt.ICudaEngine)) == 4096


def test_plugins_are_counted(trt: ModuleType) -> None:
    assert versions.plugin_count(trt.get_plugin_registry()) == 1


def test_refitting(trt: ModuleType) -> None:
    calls = []
    refitter = fake_tensorrt.new(type("Refitter", (trt.Refitter,), {}))
    refitter.refit_cuda_engine = lambda: calls.append("waits") or True
    if hasattr(trt.Refitter, "refit_cuda_engine_async"):
        refitter.refit_cuda_engine_async = lambda stream: calls.append(stream) or True
    assert versions.refits_from_device(trt) == by_version(trt, False, True)
    assert versions.refit(refitter, 7) is True
    assert calls == by_version(trt, ["waits"], [7])
