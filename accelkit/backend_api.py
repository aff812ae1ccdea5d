"""What a backend is: the public interface for backend authors.

    graph + example inputs -> Engine, a callable on tensors that says what it really is

A backend is an immutable value: a frozen dataclass whose fields are its options (`OnnxRuntime(threads=2)`), registered by one
entry-point line in the group `accelkit.backends`. The graph it gets follows the rules of `accelkit.graph`: flat tensors in, a
flat tuple of tensors out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from accelkit.pass_api import OnnxPass, _Pass
from accelkit.pass_runner import PassRecord
from accelkit.precision import FP32, Precision

if TYPE_CHECKING:
    from accelkit.accuracy import OutputError

EMBEDS_BELOW_BYTES = 1024
"""Passes and compilers look at the values of small constants: scales, epsilons, tables."""


@dataclass(frozen=True)
class EngineFacts:
    """What an engine really is, read back from it and not from what was asked.

    Attributes:
        backend: the backend's name.
        versions: name -> version of everything that made it and that it runs on.
        precisions: precision name -> number of operators that really run in it; empty where the runtime cannot tell.
        memory_bytes: bytes of weights that the engine holds itself, beside the model's own; None where unknown.
        notes: sentences for the report.
    """

    backend: str
    versions: Mapping[str, str] = field(default_factory=dict)
    precisions: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    notes: tuple[str, ...] = ()


class Engine(ABC):
    """A compiled graph. Calls may come from several threads at once; results never share memory between calls."""

    @abstractmethod
    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run. Inputs as the graph's placeholders, in order; outputs as the graph's, in order.

        Runs on the caller's CUDA stream without synchronising. Inputs may be non-contiguous.
        """

    def serialize(self) -> dict[str, bytes]:
        """What `Backend.load` needs to give the engine back without compiling; empty where it must be rebuilt."""
        return {}

    def counters(self) -> dict[str, int]:
        """How calls ran so far, for `CompiledModel.stats()`: words (`replayed [8, 128]`) -> calls; empty where all are alike."""
        return {}

    @abstractmethod
    def describe(self) -> EngineFacts:
        """What the engine really is."""


@dataclass
class CompileContext:
    """What a compilation may use beside the graph.

    Attributes:
        precision: the precision asked for; the graph's dtypes already follow it.
        onnx_passes: the pipeline's OnnxPass values, for backends that go through ONNX.
        records: the ledger; a backend that runs passes appends their records.
        progress: called with a few words when a new stage starts.
        judge: for a backend that has to choose between engines: how far results of the whole graph on the example are from
            float64, beside plain PyTorch, and what `optimize` will allow. Computed when first called, and not again for the final
            check. It may raise RuntimeError, NotImplementedError or TypeError: there is no float64 form, or no memory. None where
            a piece is compiled, or where results are not compared with the original's.
    """

    precision: Precision = FP32
    onnx_passes: tuple[OnnxPass, ...] = ()
    records: list[PassRecord] = field(default_factory=list)
    progress: Callable[[str], None] = lambda stage: None
    judge: Callable[[Sequence[Any]], list[OutputError]] | None = None


class Backend(_Pass):
    """A target. Subclasses are frozen dataclasses; `name` is the entry point's name.

    Attributes:
        precisions: names of the precisions it has.
        devices: device types it runs on.
        embeds_weights: whether an engine's serialised form contains the weights. False means `load` takes them from the graph,
            so that one cache entry serves every set of weights, an artifact holds them once, and a refit compiles nothing. A
            ClassVar, or a property where an option decides.
        embeds_below_bytes: floating-point tensors smaller than this are in the serialised form all the same: tables and
            constants that a compiler looks into. 0 where `load` replaces those too.
        fused_operators: short names (`attention`) of the fused operators (`torch.ops.accelkit.*`, accelkit.ops) that `compile`
            takes; lowering gives it the others as their meanings, in ATen operators.
        int8_activations: what its INT8 kernels multiply with int8 weights: "u8" (unsigned, with a zero point; most CPU kernels),
            "s8" (signed), or None: what the scheme says.
        measures_pieces: whether a piece of a graph that runs in part in PyTorch is timed beside PyTorch, and given back to it
            where its engine is slower (accelkit.give_back).
        description: one sentence for tables.
    """

    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    fused_operators: ClassVar[frozenset[str]] = frozenset()
    int8_activations: ClassVar[str | None] = None
    measures_pieces: ClassVar[bool] = False
    description: ClassVar[str] = ""

    @property
    def embeds_weights(self) -> bool:
        return True

    @property
    def embeds_below_bytes(self) -> int:
        return EMBEDS_BELOW_BYTES

    @classmethod
    def precisions_on(cls, device: str) -> tuple[str, ...]:
        """Names of the precisions that it has for models on this kind of device."""
        return cls.precisions

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to do about it (`pip install ...`), or None."""
        return None

    def versions(self) -> dict[str, str]:
        """Versions (of packages, drivers, devices) that an engine depends on: part of the cache's key."""
        return {"torch": torch.__version__}

    def unsupported(self, node: fx.Node) -> str | None:
        """Why this node must stay in PyTorch, or None. Pure: called many times, in any order."""
        return None

    def pads_batches(self) -> bool:
        """Whether a call whose batch lies between two buckets may run in the larger one, its last row repeated.

        True says that an engine computes each row from that row alone wherever the graph does: nothing is measured over a whole
        batch at run time, as dynamic quantisation does. Rows of the graph are proved independent all the same, and the
        larger bucket has to have measured faster than the original model.
        """
        return False

    @abstractmethod
    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        """Compile `graph`. `inputs` are examples of real values; dynamic dimensions are symbolic in the graph's metadata.

        Must not change `graph`, nor keep it alive beyond what the engine needs.

        Raises:
            LoweringError: with `nodes` naming the culprits where they are known; lowering then retries without them.
        """

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        """The engine that `serialize` gave `blobs`; `graph` is the same graph that it was compiled from.

        Raises:
            LoweringError: the blobs do not fit this runtime; the caller compiles anew and says so.
        """
        return self.compile(graph, inputs, context)


def options_of(backend: Backend) -> dict[str, Any]:
    """A backend's options as plain data, for keys and reports."""
    import dataclasses

    return {f.name: repr(getattr(backend, f.name)) for f in dataclasses.fields(backend)}  # type: ignore[arg-type]
