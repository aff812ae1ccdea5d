"""Is TensorRT here, does it load, does it reach the GPU? Each question once a process, each "no" with what to do.

    package -> shared libraries -> version -> GPU and driver, by PyTorch -> TensorRT's own start, where the driver is in doubt

Nothing here is imported with accelkit: loading the library takes a second and some hundred megabytes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from accelkit.errors import BackendUnavailableError

OLDEST = (8, 6)
"""8.6 is the first with the timing cache options, version compatibility and LayerNormalization in its parser."""
BFLOAT16_SINCE = (10, 0)
_BUILT_WITH_CUDA = {8: 12, 9: 12, 10: 13, 11: 13}
"""TensorRT's major version -> newest major CUDA version that its packages are built with. A driver for that one runs them all;
where it is older, TensorRT is started once, in a process of its own, to see."""
INSTALL = 'pip install "accelkit[tensorrt]"'
_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
_EXPORT = ("onnx", "onnxscript")


def missing() -> str | None:
    """What keeps TensorRT from running here and what to do about it, or None."""
    if absent := [name for name in _EXPORT if importlib.util.find_spec(name) is None]:
        return f"{', '.join(absent)} not installed; {INSTALL}"
    if "tensorrt" not in sys.modules and importlib.util.find_spec("tensorrt") is None:
        return f"tensorrt not installed; {INSTALL}"
    return _load_failure() or too_old(loaded().__version__) or _no_gpu() or _no_start()


def loaded() -> Any:
    """The module `tensorrt`.

    Raises:
        BackendUnavailableError: it is not installed, or its libraries do not load.
    """
    if "tensorrt" in sys.modules:
        return sys.modules["tensorrt"]
    if importlib.util.find_spec("tensorrt") is None:
        raise BackendUnavailableError(f"tensorrt not installed; {INSTALL}")
    if (why := _load_failure()) is not None:
        raise BackendUnavailableError(why)
    return sys.modules["tensorrt"]


def installed_version() -> str | None:
    """The version of the package, without loading the library; None where it is not installed."""
    module = sys.modules.get("tensorrt")
    if module is not None:
        return str(module.__version__)
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def numbers(text: str) -> tuple[int, int]:
    """Major and minor of `10.16.1.11`.

    >>> numbers("8.6.0")
    (8, 6)
    """
    major, minor, *_ = [*text.split("."), "0"]
    return int(major), int(minor)


def too_old(found: str) -> str | None:
    if numbers(found) >= OLDEST:
        return None
    return f"TensorRT {found} is too old: {'.'.join(map(str, OLDEST))} is the oldest that accelkit builds for; {INSTALL} --upgrade"


def device_facts(index: int = 0) -> dict[str, str]:
    """GPU, compute capability and driver: what an engine is bound to beside TensorRT's version; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    from accelkit.tuning.files import environment_of

    found = environment_of(torch.device("cuda", index))
    return {"gpu": found.gpu, "compute_capability": found.capability, "driver": found.driver}


def _load_failure() -> str | None:
    if "tensorrt" in sys.modules:
        return None
    spec = importlib.util.find_spec("tensorrt")
    return _load_failure_of(str(spec.origin if spec is not None else ""))


@functools.cache  # a library that did not load will not load in this process: its dependencies are looked up once
def _load_failure_of(origin: str) -> str | None:
    try:
        importlib.import_module("tensorrt")
    except (
        ImportError,
        OSError,
        AttributeError,
    ) as error:  # AttributeError: bindings of another version than the library
        return f"tensorrt is installed ({Path(origin).parent}), but does not load: {_first_line(error)}; {_load_fix(error)}"
    return None


def _load_fix(error: BaseException) -> str:
    text = str(error)
    if "cannot open shared object file" in text:
        library = text.partition(":")[0].strip()
        return f"put the folder of {library} on LD_LIBRARY_PATH, or {INSTALL} --force-reinstall"
    return f"{INSTALL} --force-reinstall brings the package and its libraries in one version"


def _no_gpu() -> str | None:
    """Why PyTorch reaches no GPU: TensorRT shares its memory and streams."""
    if torch.version.cuda is None:
        return (
            "this PyTorch is a CPU build, and TensorRT works on PyTorch's CUDA tensors; install a CUDA build of PyTorch"
        )
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        text = _first_line(error)
        if "too old" in text:
            return f"{text}; update the NVIDIA driver"
        return f"no usable GPU: {text}"
    return "PyTorch sees no CUDA device; is CUDA_VISIBLE_DEVICES empty?"


def _no_start() -> str | None:
    """Why TensorRT does not start: a driver that is older than the CUDA that it was built with."""
    found = str(loaded().__version__)
    newest = _BUILT_WITH_CUDA.get(numbers(found)[0])
    if newest is not None and _driver_cuda() >= newest:
        return None
    return _start_failure(found, torch.cuda.current_device())


@functools.cache
def _start_failure(version: str, device: int) -> str | None:
    from accelkit.backends.tensorrt.building import start_failure

    return start_failure(device)


def _driver_cuda() -> int:
    """The major CUDA version that the driver is for; 0 where it does not tell."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0
    except (OSError, AttributeError):
        return 0


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
