"""What this machine gives at most, measured once and kept: one large matrix product in a precision, and one large copy.

    rates_of(torch.device("cuda"), "fp16")  ->  Rates({"fp16": 736.0}, copy_tb_s=4.25, size=8192)

A product of 8192 x 8192 takes 1.5 ms in fp16 on an H200, 22 ms in fp32; on a processor a smaller one stands for it. What is
found is kept in the cache folder for this machine and this PyTorch, so that a build measures once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from accelkit.cache import EngineCache
from accelkit.measure import interleaved, machine, write_json
from accelkit.tf32 import tensor_core_products

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"cuda": 8192, "cpu": 1024}
"""Rows, columns and inner size of the matrix product."""
COPY_BYTES = {"cuda": 2**28, "cpu": 2**27}
"""What the copy reads; it writes as much. Beyond what caches hold."""
_FORMAT = 2
_LOCK = threading.Lock()
_KNOWN: dict[tuple[str, str], Rates | None] = {}


@dataclass(frozen=True)
class Rates:
    """What the machine gives at most.

    Attributes:
        tflops: operations by precision, in 1e12 a second, in products of square matrices of `size`.
        copy_tb_s: bytes read and written, in 1e12 a second.
    """

    tflops: dict[str, float]
    copy_tb_s: float
    size: int = SIZES["cuda"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_rates(
    device: torch.device | str, precisions: Sequence[str], size: int, copy_bytes: int, **options: Any
) -> Rates:
    """One square matrix product in each precision and one copy, interleaved; medians.

    Args:
        options: of `accelkit.measure.interleaved`: how long.

    Raises:
        RuntimeError: no memory, or a product that the device does not have.
    """
    candidates: dict[str, Any] = {}
    own = torch.Generator(device)  # the caller's random numbers stay as they are
    for precision in precisions:
        a, b = (torch.randn(size, size, device=device, generator=own).to(DTYPES[precision]) for _ in range(2))
        candidates[precision] = _product(a, b, precision)
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    candidates["copy"] = lambda: target.copy_(source)
    with torch.no_grad():
        timings = interleaved(candidates, device=device, **options)
    tflops = {p: 2 * size**3 / timings[p].median_ms / 1e9 for p in precisions}
    return Rates(tflops, 2 * copy_bytes / timings["copy"].median_ms / 1e9, size)


def rates_of(device: torch.device, precision: str) -> Rates | None:
    """The rates for one precision: known to this process, kept on disk, or measured now and kept; None where they cannot be."""
    if precision not in DTYPES or device.type not in SIZES:
        return None
    if precision == "fp32" and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        precision_measured = "tf32"  # what float32 means in this process
    else:
        precision_measured = precision
    where = _machine(device)
    key = (json.dumps(where, sort_keys=True), precision_measured)
    with _LOCK:
        if key not in _KNOWN:
            _KNOWN[key] = _read(where, precision_measured) or _measured(device, precision_measured, where)
        found = _KNOWN[key]
    return None if found is None else Rates({precision: found.tflops[precision_measured]}, found.copy_tb_s, found.size)


def _product(a: torch.Tensor, b: torch.Tensor, precision: str) -> Any:
    if precision != "tf32":
        return lambda: a @ b

    def inside() -> torch.Tensor:
        with tensor_core_products():
            return a @ b

    return inside


def _measured(device: torch.device, precision: str, where: dict[str, str]) -> Rates | None:
    size = SIZES[device.type]
    try:
        if device.type == "cpu" and precision != "fp32" and not _quick(precision):  # every processor multiplies float32
            size //= 4
        found = measure_rates(
            device, [precision], size, COPY_BYTES[device.type], seconds=0.1, min_rounds=2, max_rounds=5,
        )  # fmt: skip
    except RuntimeError:  # no memory for it beside the model, or no such product here: there is no floor to tell
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    path = _path(where)
    if path is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written: the next process measures again
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(path, {"format": _FORMAT, "machine": where, "rates": _kept(path) | {precision: found.to_json()}})
    return found


def _quick(precision: str) -> bool:
    """Whether the processor multiplies numbers of this dtype itself, so that the product takes milliseconds."""
    a = torch.ones(256, 256, dtype=DTYPES[precision])
    timing = interleaved({"product": lambda: a @ a}, seconds=0.0, min_rounds=1)["product"]
    return timing.median_ms < 2.0


def _machine(device: torch.device) -> dict[str, str]:
    """What rates depend on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"device": properties.name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    processor = str(machine()["processor"])
    return {"device": processor, "torch": torch.__version__, "threads": str(torch.get_num_threads())}


def _path(where: dict[str, str]) -> Path | None:
    folder = EngineCache(max_bytes=0).folder
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
    return None if folder is None else folder / "rates" / f"{digest}.json"


def _kept(path: Path) -> dict[str, Any]:
    """The file's rates by precision; none where there is no file, or it is damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["rates"]) if content["format"] == _FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(where: dict[str, str], precision: str) -> Rates | None:
    path = _path(where)
    entry = {} if path is None else _kept(path).get(precision, {})
    try:
        found = Rates({precision: float(entry["tflops"][precision])}, float(entry["copy_tb_s"]), int(entry["size"]))
    except (KeyError, TypeError, ValueError):
        return None
    return found if found.tflops[precision] > 0 and found.copy_tb_s > 0 else None
