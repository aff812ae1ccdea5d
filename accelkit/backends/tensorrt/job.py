"""What the build process is told, and what it answers: plain data, JSON both ways.

    parent: BuildJob --job.json--> worker.py: ONNX file -> plan file --a line on its standard output--> parent: BuildResult

Standard library only: the worker imports this file by itself, without accelkit or torch (accelkit.backends.tensorrt.building).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
HARDWARE = ("none", "ampere_plus")

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class BuildJob:
    """One engine to build.

    Attributes:
        onnx: the ONNX file; tensors outside it lie beside it.
        plan: where the worker writes the plan; `build_plan` fills it in.
        timing_cache: the timing cache's file, read where it exists, merged and replaced after the build; None for none.
        precision: `fp32`, `tf32`, `fp16` or `bf16`. A strongly typed network (TensorRT 10 and later) has it in its own types;
            only `tf32` is then a flag of the builder.
        keep_fp32: names of ONNX nodes that stay fp32 where precision is a flag (8.6); a strongly typed network says it by casts.
        demanded: names of ONNX products that shall run in `precision`, where that is a flag, which by itself only allows it.
        tf32: float32 layers may multiply in tf32 where the precision is another; `tf32` as precision says it too.
        profile: network input -> its smallest, tuned and largest shape; inputs whose shape is fixed may be left out.
        workspace_bytes: scratch memory that a layer may use; None for all of the device's.
        optimization_level: 0 (fastest build) to 5 (fastest engine); None for the version's default, 3.
        tactic_sources: libraries that layers may come from (`cublas`, `cublas_lt`, `cudnn`, `edge_mask_convolutions`,
            `jit_convolutions`); None for the version's default less those that do not load, () for none.
        version_compatible: later versions of TensorRT can run the plan.
        hardware_compatible: `none`, or `ampere_plus`: any GPU from Ampere on can run the plan.
        refittable: the engine's weights can be replaced.
        sparse_weights: layers may use 2:4 sparse weights.
        max_aux_streams: streams beside the caller's that the engine may use; None for TensorRT's own choice.
        plugin_library: shared libraries with plugins, loaded before the network is parsed.
        start_only: stop before the ONNX file is looked at: does TensorRT start on this GPU?
        parse_only: stop after parsing; the result tells which nodes are refused, and there is no plan.
        device: number of the GPU, as torch counts; `build_plan` shows the worker no other.
        gpu_lock: file that is locked while the builder times kernels, so that builds of several processes do not time each
            other's; None for no lock.
    """

    onnx: str
    plan: str = ""
    timing_cache: str | None = None
    precision: str = "fp32"
    keep_fp32: tuple[str, ...] = ()
    demanded: tuple[str, ...] = ()
    tf32: bool = False
    profile: dict[str, Shapes] = field(default_factory=dict)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    version_compatible: bool = False
    hardware_compatible: str = "none"
    refittable: bool = False
    sparse_weights: bool = False
    max_aux_streams: int | None = None
    plugin_library: tuple[str, ...] = ()
    start_only: bool = False
    parse_only: bool = False
    device: int = 0
    gpu_lock: str | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        data = json.loads(text)
        for name in ("keep_fp32", "demanded", "tactic_sources", "plugin_library"):
            if data[name] is not None:
                data[name] = tuple(data[name])
        data["profile"] = {name: tuple(tuple(s) for s in shapes) for name, shapes in data["profile"].items()}
        return cls(**data)


@dataclass(frozen=True)
class NodeFailure:
    """An ONNX node that the parser refuses. `name` and `operator` are empty where this version does not tell them."""

    index: int
    message: str
    name: str = ""
    operator: str = ""


@dataclass(frozen=True)
class Failure:
    """Why there is no plan.

    Attributes:
        kind: `parse`, `build`, `memory` (the GPU's or the machine's), `disk`, `device`, `plugin`, `option` (this version has
            no such thing) or `worker` (an error in the worker itself).
        message: what the library said, or a sentence.
        nodes: the refused nodes, for `parse`.
    """

    kind: str
    message: str
    nodes: tuple[NodeFailure, ...] = ()


@dataclass(frozen=True)
class BuildResult:
    """What the worker found.

    Attributes:
        seconds: of each stage: `start` (until the process had loaded the library and reached the GPU; 0 where it was there from
            an earlier build or `warm`), `wait` (only where another build on this GPU came first), `parse`, `build`, `write`;
            `total` by the parent's clock.
        versions: `tensorrt`.
        warnings: the library's warnings and errors, each once, in order.
        failure: None where the plan was written (or parsing alone succeeded).
        timing_cache_bytes: size of the timing cache before and after the build; None without one. A note says where it is
            in the build process alone, and not on disk.
        notes: sentences for the report (a timing cache that was not usable, tactic sources left out).
    """

    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    failure: Failure | None = None
    timing_cache_bytes: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> BuildResult:
        data: dict[str, Any] = json.loads(text)
        failure = data["failure"]
        if failure is not None:
            nodes = tuple(NodeFailure(**node) for node in failure["nodes"])
            failure = Failure(failure["kind"], failure["message"], nodes)
        sizes = data["timing_cache_bytes"]
        return cls(
            data["seconds"],
            data["versions"],
            tuple(data["warnings"]),
            failure,
            None if sizes is None else (sizes[0], sizes[1]),
            tuple(data["notes"]),
        )
