"""The target `tensorrt`: its options, what it refuses, compile and load.

fx graph --network.py--> ONNX file + weights --building.py, a process of its own--> plan --engine.py--> TensorRTEngine
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelkit.backend_api import EMBEDS_BELOW_BYTES, Backend, CompileContext, Engine
from accelkit.backends.tensorrt import library, refitting, versions
from accelkit.backends.tensorrt.accumulation import (
    ACCUMULATE,
    AS_IT_LIKES,
    Level,
    Part,
    Whole,
    everything,
    levels,
    most_accurate,
)
from accelkit.backends.tensorrt.attention_place import PLACES, attentions
from accelkit.backends.tensorrt.building import build_plan, timing_cache_path, warm
from accelkit.backends.tensorrt.engine import TensorRTEngine
from accelkit.backends.tensorrt.forms import rewritten
from accelkit.backends.tensorrt.job import HARDWARE, BuildJob, BuildResult
from accelkit.backends.tensorrt.judging import WiderPrecisionError
from accelkit.backends.tensorrt.manifest import Manifest, sha256
from accelkit.backends.tensorrt.network import Network, network_of
from accelkit.backends.tensorrt.obstacles import beyond_int32, obstacle
from accelkit.backends.tensorrt.plugin_libraries import load_plugins
from accelkit.backends.tensorrt.products import linear_products, structure
from accelkit.backends.tensorrt.runtime import log_of
from accelkit.backends.tensorrt.versions import TACTIC_SOURCES
from accelkit.errors import BackendUnavailableError, InputError, LoweringError
from accelkit.onnx_fused import STANDARD
from accelkit.precision import as_precision

_NEEDED: dict[tuple[str, str], int] = {}
"""By TensorRT's version and a part's structure: the level that such a part needed in this process (accumulation.levels)."""


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
        accumulate: what fp16 products are summed in: `fp16`, as TensorRT likes; `fp32` for all linear layers; `auto`, as TensorRT
            likes where that is accurate enough on the example, else the longest sums in float32, each way built and measured.
        attention: where it runs: `engine`, or `pytorch`, which cuts the graph there; see docs/tensorrt.md for when to try that.
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
    accumulate: str = "auto"
    attention: str = "engine"
    sparse_weights: bool = False
    time_limit_s: float | None = None
    max_aux_streams: int | None = None
    cuda_graph: bool = True
    contexts: int = 4
    plugin_libraries: tuple[str, ...] = ()

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "bf16", "fp16")
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    measures_pieces: ClassVar[bool] = True
    fused_operators: ClassVar[frozenset[str]] = frozenset((*STANDARD, "patch_embedding"))
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
        for option, known in (("accumulate", ACCUMULATE), ("attention", PLACES)):
            if (given := getattr(self, option)) not in known:
                raise InputError(f"TensorRT({option}={given!r}): known are {', '.join(known)}")
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

    @property
    def embeds_weights(self) -> bool:
        return not self.refittable

    @property
    def embeds_below_bytes(self) -> int:
        """A refit replaces all floating-point tensors, small ones too."""
        return 0 if self.refittable else EMBEDS_BELOW_BYTES

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

    def pads_batches(self) -> bool:
        return True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        tensorrt = self._require()
        if not versions.has_dtype(tensorrt, "int64") and (beyond := beyond_int32(graph, inputs)):
            raise LoweringError(
                f"TensorRT {tensorrt.__version__} has int32 only, and {'; '.join(beyond.values())}", beyond
            )
        warm(_device(inputs))  # the build process loads the library meanwhile
        if self.attention == "pytorch" and (left := attentions(graph)):
            raise LoweringError(f"{len(left)} attentions run in PyTorch: asked for", left)
        context.progress("exporting to ONNX")
        written = rewritten(graph)
        network = network_of(written, inputs, context, external_bytes=self.embeds_below_bytes)
        typed = versions.strongly_typed(tensorrt)

        told = False

        def build(level: Level) -> TensorRTEngine:
            nonlocal told
            made = network.with_wide(level.nodes, typed)
            if not told:
                try:
                    return self._compiled(made, tensorrt, written, inputs, context)
                except WiderPrecisionError:
                    if typed:
                        raise
                    told = True  # for later levels too: the flag allows a precision, and wider kernels were taken
                context.progress(f"building again, with products told to run in {made.precision}")
            try:
                return self._compiled(made.demanding(), tensorrt, written, inputs, context)
            except WiderPrecisionError as error:
                raise LoweringError(f"{error} (told to run them in {made.precision}, it did not)") from None

        if network.precision != "fp16" or self.accumulate == "fp16":
            return build(AS_IT_LIKES)
        products = linear_products(network.model)
        if self.accumulate == "fp32":
            return build(everything(products))
        whole = context.judge
        judge = functools.partial(Part, graph, inputs, as_precision("fp16")) if whole is None else lambda: Whole(whole)
        part, tries = (str(tensorrt.__version__), structure(network.model)), list(levels(products))
        first = _NEEDED.get(part, 0) if whole is None else 0  # the layers of a model repeat, whole models do not
        engine, needed = most_accurate(
            tries, build, judge, inputs, lambda e: e.manifest.seconds.get("total", 0.0), first
        )
        if whole is None:
            _NEEDED[part] = needed
        return engine

    def _compiled(
        self,
        network: Network,
        tensorrt: Any,
        graph: fx.GraphModule,
        inputs: Sequence[torch.Tensor],
        context: CompileContext,
    ) -> TensorRTEngine:
        device = _device(inputs)
        plan, result = self._built(network, device, str(tensorrt.__version__), context)
        weights = network.weights if self.refittable else {}
        manifest = Manifest(
            sha256=sha256(plan),
            tensorrt=str(tensorrt.__version__),
            device=library.device_facts(device),
            precision=network.precision,
            inputs=tuple(network.profile),
            outputs=tuple(o.name for o in network.model.graph.output),
            keep_fp32=network.keep_fp32,
            wide=network.wide,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            weights=refitting.dtypes_of(weights),
            weights_sha256=refitting.fingerprint(weights) if weights else "",
            seconds=result.seconds,
            notes=(*_sentences(result), *result.notes, *_demand(network)),
        )
        return self._engine(plan, manifest, graph, inputs)

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        self._require()
        plan, manifest = Manifest.from_blobs(blobs)
        return self._engine(plan, manifest, rewritten(graph), inputs)

    def _engine(
        self, plan: bytes, manifest: Manifest, graph: fx.GraphModule, inputs: Sequence[torch.Tensor]
    ) -> TensorRTEngine:
        return TensorRTEngine(plan, manifest, graph, inputs, contexts=self.contexts, cuda_graph=self.cuda_graph)

    def _require(self) -> Any:
        """The module `tensorrt`, with its plugins and the user's."""
        if (why := self.unavailable()) is not None:
            raise BackendUnavailableError(f"target {self.name}: {why}")
        tensorrt = library.loaded()
        if (why := load_plugins(tensorrt, log_of(tensorrt), self.plugin_libraries)) is not None:
            raise LoweringError(f"TensorRT(plugin_libraries={self.plugin_libraries}): {why}")
        return tensorrt

    def _built(self, network: Network, device: int, version: str, context: CompileContext) -> tuple[bytes, BuildResult]:
        try:
            with tempfile.TemporaryDirectory(prefix="accelkit-tensorrt-") as folder:
                job = self._job(str(network.write(folder)), network, device, version)
                return build_plan(job, say=context.progress, time_limit_s=self.time_limit_s)
        except LoweringError as error:
            raise LoweringError(str(error), network.in_graph(error.nodes)) from error
        except OSError as error:
            raise LoweringError(
                f"the ONNX model and its weights ({network.weight_bytes / 2**20:.0f} MiB) cannot be written to "
                f"{tempfile.gettempdir()}: {error}; set TMPDIR to a folder with room"
            ) from error

    def _job(self, onnx: str, network: Network, device: int, version: str) -> BuildJob:
        timing: str | None = self.timing_cache if isinstance(self.timing_cache, str) else None
        if self.timing_cache is True and (path := timing_cache_path(version, device)) is not None:
            timing = str(path)
        return BuildJob(
            onnx=onnx,
            timing_cache=timing,
            precision=network.precision,
            keep_fp32=(*network.keep_fp32, *network.wide),
            demanded=network.demanded,
            tf32=network.tf32,
            profile=network.profile,
            workspace_bytes=None if self.workspace_gib is None else round(self.workspace_gib * 2**30),
            optimization_level=self.optimization_level,
            tactic_sources=self.tactic_sources,
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            refittable=self.refittable,
            sparse_weights=self.sparse_weights,
            max_aux_streams=self.max_aux_streams,
            plugin_library=self.plugin_libraries,
            device=device,
        )


def _device(inputs: Sequence[torch.Tensor]) -> int:
    found = next((t.device.index for t in inputs if t.is_cuda), None)
    return torch.cuda.current_device() if found is None else found


def _sentences(result: BuildResult) -> list[str]:
    """The build in words: how long its stages took, and what the timing cache grew by."""
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items() if name != "total")
    said = [f"built in {result.seconds.get('total', 0.0):.1f} s ({stages})"]
    if result.timing_cache_bytes is not None:
        before, after = result.timing_cache_bytes
        said.append(f"timing cache: {before / 1024:.0f} KiB before the build, {after / 1024:.0f} KiB after it")
    return said


def _demand(network: Network) -> list[str]:
    if not network.demanded:
        return []
    return [
        f"{len(network.demanded)} matrix products were told to run in {network.precision}: left free, TensorRT took wider kernels"
    ]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(option: str, value: object, wanted: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"TensorRT({option}={value!r}): has to be {wanted}, or None")
