"""What a built engine is, beside its plan: engine.json, read before the library sees a byte of the plan.

    plan + manifest --require_fit--> runs here, or a LoweringError: built for X, here is Y

A plan is code for one TensorRT version and one GPU, and the library does not survive every damaged one: so its hash is
checked first, then what it was built for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from accelkit.errors import LoweringError

PLAN, MANIFEST = "engine.plan", "engine.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What `engine.json` says.

    Attributes:
        sha256: of the plan.
        tensorrt: the version that built it.
        device: `gpu`, `compute_capability` and `driver` of the GPU that it was built on (library.device_facts).
        precision: what was asked of the builder: `fp32`, `tf32`, `fp16` or `bf16`.
        inputs, outputs: the network's names, in the order of the graph's placeholders and results.
        keep_fp32: names of ONNX nodes that stay fp32 because the graph says so.
        wide: names of the ONNX products that are summed in float32 for accuracy (accumulation.py).
        version_compatible: later TensorRT versions of the same major number run it too.
        hardware_compatible: `none`, or `ampere_plus`.
        weights: initializer's name -> dtype (`float16`), of those that can be replaced; empty where the engine is not refittable.
        weights_sha256: of the weights' values that the plan holds; empty where it is not refittable.
        seconds: of the build, by stage.
        notes: sentences of the build, for the report.
        proof: what the layers run in (proof.Proof as plain data); None before it was made.
    """

    sha256: str
    tensorrt: str
    device: Mapping[str, str]
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keep_fp32: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatible: str = "none"
    weights: Mapping[str, str] = field(default_factory=dict)
    weights_sha256: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    proof: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_blobs(cls, blobs: Mapping[str, bytes]) -> tuple[bytes, Manifest]:
        """The plan and its manifest.

        Raises:
            LoweringError: one is missing, or they do not belong together; both are bytes from a file that may be damaged.
        """
        if absent := [name for name in (PLAN, MANIFEST) if name not in blobs]:
            raise LoweringError(
                f"the stored engine has no {' and no '.join(absent)} (it has {', '.join(blobs) or 'nothing'})"
            )
        plan = bytes(blobs[PLAN])
        try:
            data = json.loads(bytes(blobs[MANIFEST]))
            known = data.pop("format")
            for name in ("inputs", "outputs", "keep_fp32", "wide", "notes"):
                data[name] = tuple(data[name])
            manifest = cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoweringError(f"the stored {MANIFEST} is damaged: {type(error).__name__}: {error}") from error
        if known != FORMAT:
            raise LoweringError(f"the stored {MANIFEST} has format {known!r}; this accelkit reads {FORMAT}")
        if sha256(plan) != manifest.sha256:
            raise LoweringError(f"the stored {PLAN} is damaged: its SHA-256 is not the one in {MANIFEST}")
        return plan, manifest


def sha256(plan: bytes) -> str:
    return hashlib.sha256(plan).hexdigest()


def require_fit(manifest: Manifest, tensorrt: str, device: Mapping[str, str]) -> None:
    """Refuse a plan for another TensorRT or another GPU than there is here.

    Args:
        tensorrt: the version here.
        device: library.device_facts of the GPU here.

    Raises:
        LoweringError: the message names both.
    """
    if not _version_fits(manifest, tensorrt):
        compatible = " or later" if manifest.version_compatible else ""
        raise LoweringError(
            f"the engine was built for TensorRT {manifest.tensorrt}{compatible}; here is TensorRT {tensorrt}"
        )
    if not _device_fits(manifest, device):
        raise LoweringError(f"the engine was built for {_shown(manifest.device)}; here is {_shown(device)}")


def _version_fits(manifest: Manifest, here: str) -> bool:
    if manifest.tensorrt == here:
        return True
    try:
        built, found = _numbers(manifest.tensorrt), _numbers(here)
    except ValueError:
        return False
    return manifest.version_compatible and built[0] == found[0] and built <= found


def _device_fits(manifest: Manifest, device: Mapping[str, str]) -> bool:
    if manifest.hardware_compatible == "ampere_plus":
        return _numbers(device.get("compute_capability", "0")) >= (8,)
    return all(manifest.device.get(key) == device.get(key) for key in ("gpu", "compute_capability"))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _shown(device: Mapping[str, str]) -> str:
    if "gpu" not in device:
        return "no GPU"
    return f"{device['gpu']} (compute capability {device.get('compute_capability', 'unknown')})"
