"""Make the listings beside this file: what TensorRT's Python bindings offer, version by version.

    the vendor's wheel on PyPI + empty libraries to link against --import--> every class, method, property, enum and function

usage: python3.10 tests/data/tensorrt_api/make.py [VERSION ...]

Needs pip, gcc and nm, but no GPU, no CUDA and no TensorRT library: of a wheel only the bindings are unpacked, and each function
that they want from TensorRT's libraries is an empty one, so nothing in them can be built or run. 8.6.0 has a wheel for
Python 3.10 alone; it is 800 MB of download, the others 1 MB each. The tests build their stand-in for TensorRT from
the listings (tests/backends/fake_tensorrt.py), so that code which uses what a version does not have fails there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

VERSIONS = {  # version -> the distribution and the import package of its bindings
    "8.6.0": ("tensorrt", "tensorrt"),
    "10.16.1.11": ("tensorrt-cu13-bindings", "tensorrt_bindings"),
    "11.4.0.106": ("tensorrt-cu13-bindings", "tensorrt_bindings"),
}
# what the wheels' own __init__.py leaves in the module: helpers, loop variables
NOT_OURS = {"attr", "value", "find_lib", "try_load", "common_enter", "common_exit", "lib", "CURDIR"}


def main(versions: list[str]) -> None:
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            package = unpacked(version, Path(folder))
            link(package, Path(folder))
            environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
            command = [sys.executable, __file__, "--list", package.name]
            text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        path = Path(__file__).with_name(f"{'.'.join(version.split('.')[:2])}.json")
        path.write_text(text)
        print(path, len(text) // 1024, "KiB")


def unpacked(version: str, folder: Path) -> Path:
    """The bindings' package, from the wheel on PyPI."""
    distribution, package = VERSIONS[version]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), f"{distribution}=={version}"]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(f"{package}/") and (name.endswith(".py") or name == f"{package}/tensorrt.so"):
                archive.extract(name, folder)
    return folder / package


def link(package: Path, folder: Path) -> None:
    """Empty libraries with all that the bindings want of TensorRT's."""
    bindings = package / "tensorrt.so"
    dynamic = subprocess.run(["readelf", "-d", bindings], check=True, capture_output=True, text=True).stdout
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", bindings], check=True, capture_output=True, text=True
    ).stdout
    # symbols of the C and C++ libraries carry a version (`@GLIBC_2.14`), Python's a prefix
    names = [name for name in re.findall(r" U (\w+)$", wanted, re.M) if not re.match(r"_?Py", name)]
    source = folder / "empty.c"
    source.write_text("".join(f"void* {name}(void) {{ return 0; }}\n" for name in names))
    for library in re.findall(r"\[(libnv\w+\.so\.\d+)\]", dynamic):
        command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(folder / library), f"-Wl,-soname,{library}", str(source)]
        subprocess.run(command, check=True)
        source.write_text("")  # the first holds them all


# --- in a process of its own, where the bindings are


def listing(module: ModuleType) -> dict[str, Any]:
    """Everything public: enums with their values, classes with bases and own members, functions, and names of values."""
    classes: dict[str, Any] = {}
    enums: dict[str, dict[str, int]] = {}
    functions: list[str] = []
    values: dict[str, str] = {}

    def add(name: str, cls: type) -> None:
        if hasattr(cls, "__members__"):
            enums[name] = {member: int(value) for member, value in cls.__members__.items()}
            return
        members = []
        for member, value in vars(cls).items():
            if member.startswith("_"):
                continue
            if isinstance(value, type):
                add(f"{name}.{member}", value)
            elif type(value).__name__ in known:
                values[f"{name}.{member}"] = f"{type(value).__name__}.{value.name}"
            else:
                members.append(shown(member, value))
        bases = [base.__name__ for base in cls.__bases__ if base.__name__ in vars(module)]
        classes[name] = {
            "bases": bases,
            "made": signatures("__init__", vars(cls).get("__init__")),
            "members": sorted(members),
        }

    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name not in NOT_OURS}
    known = {name for name, value in public.items() if hasattr(value, "__members__")} | {"Severity"}
    for name, value in sorted(public.items()):
        if isinstance(value, ModuleType):
            continue
        if isinstance(value, type):
            add(name, value)
        elif type(value).__name__ in known:
            values[name] = f"{type(value).__name__}.{value.name}"
        elif callable(value):
            functions += shown(name, value).split(" | ")
    version = module.__version__
    return {
        "version": version,
        "classes": classes,
        "enums": enums,
        "functions": functions,
        "values": dict(sorted(values.items())),
    }


def shown(name: str, value: Any) -> str:
    """`name` of a property, `name(argument, option=)` of a method; overloads divided by ` | `."""
    return " | ".join(signatures(name, value)) or (f"{name}(...)" if callable(value) else name)


def signatures(name: str, value: Any) -> list[str]:
    """As pybind11 writes them at the start of a docstring, without types and values: `name(argument, option=)`."""
    lines = [re.sub(r"^\d+\. ", "", line) for line in (getattr(value, "__doc__", None) or "").splitlines()]
    texts = [line for line in lines if line.startswith(f"{name}(") and "*args, **kwargs" not in line]
    return [f"{name}({', '.join(arguments(text))})" for text in texts]


def arguments(text: str) -> list[str]:
    """Names of the arguments in `name(self: t, first: Tuple[int, int], second: t = 3) -> t`."""
    start = text.index("(") + 1
    depth, parts = 1, [""]
    for character in text[start:]:
        depth += {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}.get(character, 0)
        if depth == 0:
            break
        if character == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += character
    found = [(part.partition(":")[0].partition("=")[0].strip(), "=" in part) for part in parts if part.strip()]
    return [f"{name}=" if optional else name for name, optional in found if name != "self"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--list"]:
        print(json.dumps(listing(__import__(sys.argv[2])), indent=1))
    else:
        main(sys.argv[1:] or list(VERSIONS))
