"""A stand-in for TensorRT without a GPU: what a version's real bindings offer, and nothing else.

    listing of the real bindings (tests/data/tensorrt_api) --> a module `tensorrt` with those classes, enums and functions

A name that the version does not have is an AttributeError, a wrong number of arguments a TypeError, and a method that it has but
that nobody gave a behaviour here is a NotImplementedError. The behaviours (fake_tensorrt_builder, fake_tensorrt_engine) are on
ONNX: a "plan" holds the ONNX file, and an "engine" runs it with onnx's reference evaluator on the CPU's memory.

What goes wrong on request, by `faults` (a dict; in a process of its own, as JSON in FAKE_TENSORRT with "version" beside them):
    refuse: operator types that the parser refuses        no_device: Builder and Runtime find no GPU
    build_fails: words of the error                       build_seconds: how long a build takes
    build_exit: "SIGSEGV", "SIGKILL": the process ends so profile_refused: the config takes no profile
    stdout: text that the library prints                  plan_bytes: so much is added to the plan
    file_limit: bytes that this process may write to a file
    stays_fp32: the engine's layers run in fp32 whatever the flags (8.6)
    fp32_unless_told: its products run in fp32 where fp16 is only allowed (8.6); "nor then": always
    tells: the plan tells which process built it, and what its timing cache held before
    start_seconds: how long a Builder takes to load
    cache_refused: timing caches are not loaded from bytes, not even from those that it wrote
"""

from __future__ import annotations

import enum
import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from fake_tensorrt_builder import BUILDER, FUNCTIONS
from fake_tensorrt_engine import RUNTIME, new

__all__ = ["FAULTS", "LISTINGS", "VERSIONS", "install", "load", "new", "populate"]

BEHAVIOURS = {**BUILDER, **RUNTIME}
LISTINGS = Path(__file__).resolve().parent.parent / "data" / "tensorrt_api"
VERSIONS = ("8.6", "10.16", "11.4")
FAULTS = frozenset(
    ("refuse", "no_device", "build_fails", "build_seconds", "build_exit", "profile_refused", "stdout", "plan_bytes")
) | {"file_limit", "stays_fp32", "fp32_unless_told", "tells", "start_seconds", "cache_refused"}


def load(version: str = "8.6", **faults: Any) -> ModuleType:
    """The module `tensorrt` of this version; put it into sys.modules, or pass it where a module is asked for."""
    return populate(ModuleType("tensorrt"), version, faults)


def populate(module: ModuleType, version: str, faults: dict[str, Any]) -> ModuleType:
    if unknown := set(faults) - FAULTS:
        raise TypeError(f"the stand-in for TensorRT has no faults {unknown}")
    listing = json.loads((LISTINGS / f"{version}.json").read_text())
    module.__dict__.update(__version__=listing["version"], _faults=faults, _creators=["InstanceNormalization_TRT"])
    for name, members in listing["enums"].items():
        if "." not in name:
            setattr(module, name, _enum(name, members))
    for name in listing["classes"]:
        _add_class(module, name, listing)
    for full, value in listing["values"].items():
        owner, _, name = full.rpartition(".")
        kind, _, member = value.partition(".")
        where = getattr(module, owner) if owner else module
        members = where.Severity if kind == "Severity" else getattr(module, kind)
        setattr(where, name, members.__members__[member])
    for text in listing["functions"]:
        name = text.partition("(")[0]
        setattr(module, name, _method(name, [text], FUNCTIONS.get(name), module))
    return module


# --- from the listing to classes


class _Enum(enum.Enum):
    """As pybind11's: a number only where one is asked for."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


def _enum(name: str, members: dict[str, int]) -> Any:
    return _Enum(name, members)


def _add_class(module: ModuleType, name: str, listing: dict[str, Any]) -> None:
    if hasattr(module, name):
        return
    facts = listing["classes"][name]
    for base in facts["bases"]:
        _add_class(module, base, listing)
    bases = tuple(getattr(module, base) for base in facts["bases"]) or (_Object,)
    behaviour = vars(BEHAVIOURS[name]) if name in BEHAVIOURS else {}
    namespace: dict[str, Any] = {"_trt": module, "__module__": "tensorrt"}
    for member in facts["members"]:
        texts = member.split(" | ")
        own = texts[0].partition("(")[0]
        if "(" in member:
            namespace[own] = _method(f"{name}.{own}", texts, behaviour.get(own))
        else:
            namespace[own] = behaviour[own] if own in behaviour else _Property(own)
    for own, value in behaviour.items():  # private helpers, and how objects are made
        if own.startswith("_") and own not in ("__dict__", "__weakref__", "__doc__", "__module__"):
            namespace[own] = value
    for full, members in listing["enums"].items():
        if full.startswith(f"{name}."):
            namespace[full.partition(".")[2]] = _enum(full.partition(".")[2], members)
    setattr(module, name, type(name, bases, namespace))


class _Object:
    """No attributes but those listed, in objects of the class itself; subclasses in Python have their own, as pybind11's do."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self).__module__ == "tensorrt" and not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


class _Property:
    """A property without a behaviour: None until it is set."""

    def __init__(self, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, owner: Any, kind: type) -> Any:
        return self if owner is None else owner.__dict__.get(self.name)

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__[self.name] = value


def _method(name: str, texts: list[str], behaviour: Any, module: ModuleType | None = None) -> Any:
    """With the arguments that the bindings' own signatures take."""
    forms = [[a for a in text.partition("(")[2].rstrip(")").split(", ") if a] for text in texts]

    @functools.wraps(behaviour or _method)
    def method(*args: Any, **kwargs: Any) -> Any:
        given = args if module is not None else args[1:]
        if not any(_fits(form, len(given), set(kwargs)) for form in forms):
            raise TypeError(f"{name}(): incompatible function arguments; supported are {', '.join(texts)}")
        if behaviour is None:
            raise NotImplementedError(f"the stand-in for TensorRT has no behaviour for {name}")
        return behaviour(*args, **kwargs) if module is None else behaviour(module, *args, **kwargs)

    method.__name__ = name.rpartition(".")[2]
    return method


def _fits(form: list[str], count: int, named: set[str]) -> bool:
    if form == ["..."]:
        return True
    names = [argument.rstrip("=") for argument in form]
    needed = {argument for argument in form if not argument.endswith("=")}
    return count <= len(names) and named <= set(names[count:]) and needed <= set(names[:count]) | named


# --- in a process of its own: a folder that holds this as tensorrt.py, on PYTHONPATH

SHIM = f"""
import json, os, resource, sys
sys.path.append({str(Path(__file__).resolve().parent)!r})
import fake_tensorrt
faults = json.loads(os.environ["FAKE_TENSORRT"])
if "file_limit" in faults:
    resource.setrlimit(resource.RLIMIT_FSIZE, (faults["file_limit"], faults["file_limit"]))
fake_tensorrt.populate(sys.modules[__name__], faults.pop("version"), faults)
"""


def install(folder: Path, monkeypatch: Any, version: str = "8.6", **faults: Any) -> None:
    """Let child processes find this version as `tensorrt`, in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "tensorrt.py").write_text(SHIM)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("FAKE_TENSORRT", json.dumps({"version": version, **faults}))
