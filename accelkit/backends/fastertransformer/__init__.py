"""FasterTransformer: the fused graph with static buffers in one CUDA graph per bucket.

    graph of fused operators --prepare--> PyTorch's own execution --record, once a bucket--> CUDA graph, replayed at each call

The fused-transformer runtime of NVIDIA's FasterTransformer on today's parts: `torch.ops.accelkit.*` (Triton kernels, cuBLASLt)
and PyTorch's operators. A call is on the caller's stream and never synchronises. On a CPU the operators' plain definitions run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelkit.backend_api import Backend, CompileContext, Engine
from accelkit.errors import InputError
from accelkit.ops import OPERATORS


@dataclass(frozen=True)
class FasterTransformer(Backend):
    """Fused operators in a CUDA graph.

    Attributes:
        cuda_graph: record the whole forward in a CUDA graph, for the shapes that it is compiled with; other shapes run the
            same graph without.
        capture_sizes: batch sizes to record beside the example's, where the inputs' first dimension is dynamic.
        pad_batch: run a batch between two recorded sizes, or two buckets, in the next larger one where the model provably
            treats rows independently and that measured faster.
        fold_layer_norms: measure the form with layer norms folded into linear layers too. It subtracts a row's mean after the
            matrix product, which loses digits where means are large beside the deviations: where that shows on the example
            inputs, the form is passed over and the report says so. False where other inputs may be like that.
        warmup: runs before a recording: Triton compiles its kernels in the first one, and must not while recording.
        tune: whether to measure, while compiling, which kernel and configuration each fused operator runs with on this GPU:
            False uses what is known from earlier tuning and else rules, except for attention, whose kernels are few and are
            measured in any case; True takes 60 seconds at most for each engine, a number so many.
    """

    cuda_graph: bool = True
    capture_sizes: tuple[int, ...] = ()
    pad_batch: bool = True
    fold_layer_norms: bool = True
    warmup: int = 3
    tune: bool | float = False

    name: ClassVar[str] = "fastertransformer"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "bf16", "fp16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    embeds_weights: ClassVar[bool] = False
    fused_operators: ClassVar[frozenset[str]] = frozenset(OPERATORS)
    description: ClassVar[str] = "fused operators in a CUDA graph per bucket; on a CPU their plain definitions"

    def __post_init__(self) -> None:
        if not isinstance(self.warmup, int) or self.warmup < 1:
            raise InputError(f"warmup has to be a whole number of at least 1, not {self.warmup!r}")
        if any(not isinstance(size, int) or size < 1 for size in self.capture_sizes):
            raise InputError(f"capture_sizes has to be batch sizes of at least 1, not {self.capture_sizes!r}")
        if not isinstance(self.tune, bool) and not (
            isinstance(self.tune, (int, float)) and 0 < self.tune < float("inf")
        ):
            raise InputError(f"tune has to be False, True or a number of seconds above 0, not {self.tune!r}")

    def versions(self) -> dict[str, str]:
        found = super().versions()
        if torch.cuda.is_available():
            found["cuda"] = str(torch.version.cuda)
        return found | _triton_version()

    def pads_batches(self) -> bool:
        return self.pad_batch

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        from accelkit.backends.fastertransformer.engine import FasterTransformerEngine

        return FasterTransformerEngine(self, graph, inputs, context)


def _triton_version() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"triton": version("triton")}
    except PackageNotFoundError:
        return {}


__all__ = ["FasterTransformer"]
