"""The target `tensorrt`: its options, what it refuses, compile and load.

fx graph --network.py--> ONNX file + weights --building.py, a process of its own--> plan --engine.py--> TensorRTEngine
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelkit.backend_api import Backend, CompileContext, Engine
from accelkit.backends.tensorrt import library
from accelkit.backends.tensorrt.job import HARDWARE
from accelkit.backends.tensorrt.obstacles import obstacle
from accelkit.errors import InputError, LoweringError
from accelkit.onnx_fused import STANDARD

TACTIC_SOURCES = ("cublas", "cublas_lt", "cudnn", "edge_mask_convolutions", "jit_convolutions")


@dataclass(frozen=True)
class TensorRT(Backend):
    """TensorRT.

    Attributes:
        workspace_gib: scratch memory that one layer may use, in GiB; None for all that the GPU has.
        optimization_level: 0 (quickest build) to 5 (most kernels tried); None for TensorRT's default, 3.
        timing_cache: keep the kernels' times on disk, so that the next build of a like model is quick: True for a file in
            accelkit's cache folder, False for none, or a file's path.
        version_compatible: the engine also runs in later TensorRT versions of this major number.
        hardware_compatible: `none`, or `ampere_plus`: the engine also runs on other GPUs from Ampere on. Costs speed.
        tactic_sources: libraries that layers may come from (cublas, cublas_lt, cudnn, edge_mask_convolutions,
            jit_convolutions); None for TensorRT's default less those that do not load here, () for none.
        refittable: `refit()` gives the engine new weights without a rebuild. Costs speed: weights are no constants then.
        sparse_weights: use sparse tensor cores where weights have 2 zeros in each 4.
        time_limit_s: end a build that takes longer, in seconds; None for no limit.
        max_aux_streams: streams beside the caller's that layers may run on at the same time; None for TensorRT's choice.
        cuda_graph: replay the example's shapes as a CUDA graph; other shapes run without. Memory: static copies of the
            inputs and outputs.
        contexts: largest number of calls that run at the same time, from several threads; each has its own activations'
            memory, made when first needed.
        plugin_libraries: shared libraries (`.so`) with TensorRT plugins that the model's operators need.
    """

    workspace_gib: float | None = None
    optimization_level: int | None = None
    timing_cache: bool | str = True
    version_compatible: bool = False
    hardware_compatible: str = "none"
    tactic_sources: tuple[str, ...] | None = None
    refittable: bool = False
    sparse_weights: bool = False
    time_limit_s: float | None = None
    max_aux_streams: int | None = None
    cuda_graph: bool = True
    contexts: int = 4
    plugin_libraries: tuple[str, ...] = ()

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "bf16", "fp16")
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    embeds_weights: ClassVar[bool] = True
    fused_operators: ClassVar[frozenset[str]] = frozenset(STANDARD)
    description: ClassVar[str] = "NVIDIA TensorRT engines, 8.6 and later, by way of ONNX"

    def __post_init__(self) -> None:
        _check_number("workspace_gib", self.workspace_gib, "a number of GiB above 0")
        _check_number("time_limit_s", self.time_limit_s, "a number of seconds above 0")
        level = self.optimization_level
        if level is not None and (not _whole(level) or not 0 <= level <= 5):
            raise InputError(f"TensorRT(optimization_level={level!r}): has to be a whole number from 0 to 5, or None")
        if self.hardware_compatible not in HARDWARE:
            raise InputError(
                f"TensorRT(hardware_compatible={self.hardware_compatible!r}): known are {', '.join(HARDWARE)}"
            )
        for option in ("tactic_sources", "plugin_libraries"):
            given = getattr(self, option)
            if isinstance(given, str) or (given is not None and not all(isinstance(name, str) for name in given)):
                raise InputError(f"TensorRT({option}={given!r}): has to be a tuple of names")
            if given is not None:
                object.__setattr__(self, option, tuple(given))
        if unknown := [name for name in self.tactic_sources or () if name not in TACTIC_SOURCES]:
            raise InputError(f"TensorRT(tactic_sources={unknown}): known are {', '.join(TACTIC_SOURCES)}")
        if self.max_aux_streams is not None and (not _whole(self.max_aux_streams) or self.max_aux_streams < 0):
            raise InputError(
                f"TensorRT(max_aux_streams={self.max_aux_streams!r}): has to be a whole number from 0, or None"
            )
        if not _whole(self.contexts) or self.contexts < 1:
            raise InputError(f"TensorRT(contexts={self.contexts!r}): has to be a whole number of at least 1")
        if not isinstance(self.timing_cache, (bool, str)) or self.timing_cache == "":
            raise InputError(f"TensorRT(timing_cache={self.timing_cache!r}): has to be True, False or a file's path")
        if self.refittable and self.sparse_weights:
            raise InputError(
                "TensorRT(refittable=True, sparse_weights=True): new weights need not be sparse; choose one"
            )

    @classmethod
    def precisions_on(cls, device: str) -> tuple[str, ...]:
        """Without bf16 where the installed TensorRT has none."""
        found = library.installed_version()
        if found is None or library.numbers(found) >= library.BFLOAT16_SINCE:
            return cls.precisions
        return tuple(name for name in cls.precisions if name != "bf16")

    def unavailable(self) -> str | None:
        return library.missing()

    def versions(self) -> dict[str, str]:
        found = super().versions()
        if (own := library.installed_version()) is not None:
            found["tensorrt"] = own
        return found | library.device_facts()

    def unsupported(self, node: fx.Node) -> str | None:
        found = library.installed_version()
        return obstacle(node, library.numbers(found) if found is not None else None)

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        raise LoweringError("not yet")

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        raise LoweringError("not yet")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(option: str, value: object, wanted: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"TensorRT({option}={value!r}): has to be {wanted}, or None")
