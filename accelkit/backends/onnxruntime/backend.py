"""The target `onnxruntime`: its options, what it refuses, compile and load."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import Backend, CompileContext, Engine, EngineFacts
from accelkit.backends.onnxruntime.engine import BLOB, OnnxRuntimeEngine
from accelkit.backends.onnxruntime.rounded import float_convolutions, quantised_products
from accelkit.backends.onnxruntime.session import LEVELS, PROVIDERS, Place, create_session
from accelkit.culprits import culprits
from accelkit.errors import BackendUnavailableError, InputError, LoweringError
from accelkit.onnx_export import export_onnx, external_weights
from accelkit.onnx_microsoft import MICROSOFT
from accelkit.onnx_peepholes import CPU_TYPES, CUDA_TYPES, for_onnxruntime
from accelkit.onnx_split import split_linears
from accelkit.onnx_translations import DIALECTS
from accelkit.pass_runner import run_onnx_passes

if TYPE_CHECKING:
    import onnx

_NAMESPACES = ("aten", "prims", "quantized_decomposed", "accelkit")
_COMPLEX = dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), "complex")
_NO_KERNELS = {  # dtypes that ONNX Runtime's providers compute nothing in
    "cpu": {torch.bfloat16: "bfloat16", **_COMPLEX},
    "cuda": _COMPLEX,
}


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """ONNX Runtime.

    Attributes:
        provider: where it runs: `cpu`, `cuda`, or `auto`: by the model's device.
        dialect: of the fused operators: `com.microsoft` (ONNX Runtime's own) or `standard` (ONNX operators only).
        threads: threads that share one operator; None for torch.get_num_threads() at the time of compiling.
        inter_op_threads: operators that run at the same time; above 1 switches to parallel execution.
        optimization: ONNX Runtime's own graph optimisations: none, basic, extended or all.
        opset: version of the ONNX operator set; None for the exporter's own.
        cuda_graph: on a GPU, capture the example's shapes in a CUDA graph; other shapes run without. Memory: the graph's
            activations stay allocated.
        session_config: (key, value) entries for SessionOptions.add_session_config_entry.
        provider_options: (key, value) options of the CUDA provider, such as ("sdpa_kernel", "8").
    """

    provider: str = "auto"
    dialect: str = "com.microsoft"
    threads: int | None = None
    inter_op_threads: int = 1
    optimization: str = "all"
    opset: int | None = None
    cuda_graph: bool = False
    session_config: tuple[tuple[str, str], ...] = ()
    provider_options: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "bf16", "fp16", "int8")
    int8_activations: ClassVar[str | None] = "u8"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    embeds_weights: ClassVar[bool] = False
    fused_operators: ClassVar[frozenset[str]] = frozenset(MICROSOFT)
    description: ClassVar[str] = "ONNX Runtime's CPU and CUDA providers, by way of torch.onnx.export"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("provider", self.provider, ("auto", *PROVIDERS)),
            ("dialect", self.dialect, DIALECTS),
            ("optimization", self.optimization, tuple(LEVELS)),
        ):
            if value not in known:
                raise InputError(f"OnnxRuntime({option}={value!r}): known are {', '.join(known)}")
        for option, number in (("threads", self.threads), ("inter_op_threads", self.inter_op_threads)):
            if number is not None and number < 1:
                raise InputError(f"OnnxRuntime({option}={number}): must be at least 1")

    @classmethod
    def precisions_on(cls, device: str) -> tuple[str, ...]:
        return ("fp32", "int8") if device == "cpu" else tuple(name for name in cls.precisions if name != "int8")

    def unavailable(self) -> str | None:
        missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
        if missing:
            return f'{", ".join(missing)} not installed; pip install "accelkit[cpu]"'
        import onnxruntime

        there = onnxruntime.get_available_providers()
        provider = PROVIDERS["cpu" if self.provider == "auto" else self.provider]
        if provider not in there:
            hint = '; pip install "accelkit[gpu]" in place of onnxruntime' if self.provider == "cuda" else ""
            return f"this onnxruntime has no {provider} (it has {', '.join(there)}){hint}"
        return None

    def versions(self) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        found = super().versions()
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # another distribution of it, such as onnxruntime-gpu
                found[package] = _module_version(package)
        return found

    def unsupported(self, node: fx.Node) -> str | None:
        if node.op != "call_function":
            return f"{node.op} nodes are not tensor operators"
        if node.target is operator.getitem or graphs.is_size(node):
            return None
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return "control flow stays in PyTorch"
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _NAMESPACES:
            return "no ONNX form is known"
        if graphs.is_mutating(node):
            return "writes into its argument; ONNX has values only"
        if graphs.is_random(node):
            return "random: ONNX Runtime would draw other numbers than PyTorch"
        for value in _tensors(node):
            lacking = _NO_KERNELS.get(value.device.type)
            if lacking is None or (self.provider == "cpu" and value.is_cuda):
                return f"computes on {value.device.type}; OnnxRuntime(provider={self.provider!r}) does not"
            if value.dtype in lacking:
                return f"ONNX Runtime's {value.device.type.upper()} provider has no {lacking[value.dtype]} kernels"
            if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
                return f"{value.dtype} is not supported"
            if value.is_sparse or value.layout != torch.strided:
                return f"{value.layout} tensors are not supported"
        return None

    def pads_batches(self) -> bool:
        return True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        provider, graph, floats = self._prepared(graph)
        context.progress("exporting to ONNX")
        try:
            model = export_onnx(graph, opset=self.opset, dialect=self.dialect)
        except LoweringError as error:
            raise self._naming_culprits(graph, error, provider) from error
        if context.onnx_passes:
            model, records = run_onnx_passes(model, context.onnx_passes, lambda one: context.progress(str(one)))
            context.records.extend(records)
        for_onnxruntime(model, _MULTIPLIED[provider], integers=provider == "cpu")
        self._require_integers(model, graph)
        context.progress("creating the ONNX Runtime session")
        try:
            data = model.SerializeToString(deterministic=True)
            engine = self._engine(data, model, graph, inputs, provider, context, floats)
            engine(*inputs)  # some kernels refuse their types or shapes at the first run only
        except LoweringError as error:
            raise self._naming_culprits(graph, error, provider) from error
        return engine

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        provider, graph, floats = self._prepared(graph)
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        if BLOB not in blobs:
            raise LoweringError(f"the stored engine has no {BLOB} (it has {', '.join(blobs) or 'nothing'})")
        try:
            model = onnx.ModelProto.FromString(blobs[BLOB])
        except DecodeError as error:
            raise LoweringError(f"the stored {BLOB} is damaged: {error}") from error
        expected = [str(n.name) for n in graph.graph.find_nodes(op="placeholder")]
        if [i.name for i in model.graph.input] != expected:
            raise LoweringError(f"the stored {BLOB} has inputs {[i.name for i in model.graph.input]}, not {expected}")
        return self._engine(blobs[BLOB], model, graph, inputs, provider, context, floats)

    def _prepared(self, graph: fx.GraphModule) -> tuple[str, fx.GraphModule, list[str]]:
        """The provider, the graph as it is exported, and the names of convolutions that are not quantised in it."""
        provider = self._provider(graph)
        graph, floats = float_convolutions(graph)
        return provider, split_linears(graph), floats

    def _require_integers(self, model: onnx.ModelProto, graph: fx.GraphModule) -> None:
        """Products that the graph quantises run on integers, or that is an error."""
        wanted = quantised_products(graph)
        if wanted and not (got := integer_operators(model)):
            raise LoweringError(
                f"ONNX Runtime would run none of the {len(wanted)} quantised products ({', '.join(wanted[:3])}, ...) on integers: "
                f"its CPU kernels multiply uint8 activations, precision=Int8(activations='u8'); {got} do"
            )

    def _provider(self, graph: fx.GraphModule) -> str:
        """`cpu` or `cuda`, by where the graph's inputs and weights are."""
        values = [graphs.val(n) for n in graph.graph.nodes if n.op in ("placeholder", "get_attr")]
        found = "cuda" if any(isinstance(v, torch.Tensor) and v.is_cuda for v in values) else "cpu"
        if self.provider == "cuda" and found == "cpu":
            raise LoweringError(
                "OnnxRuntime(provider='cuda') got a graph without a tensor on CUDA: move the model and its inputs there "
                "(model.cuda()), or leave provider out"
            )
        if (why := replace(self, provider=found).unavailable()) is not None:
            raise BackendUnavailableError(f"target {self.name}: {why}")
        return found

    def _engine(
        self, data: bytes, model: onnx.ModelProto, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], provider: str,
        context: CompileContext, floats: Sequence[str] = (),
    ) -> OnnxRuntimeEngine:  # fmt: skip
        weights = external_weights(model, graph)
        place = _place(provider, inputs, context)
        precisions = _operators_by_type(model)
        session, uncaptured = self._session(data, weights, place, "fp64" in precisions, graph, inputs)
        dynamic = any(
            isinstance(size, torch.SymInt)
            for node in graph.graph.find_nodes(op="placeholder")
            for size in graphs.val(node).shape
        )
        notes = [
            f"{session.get_providers()[0]}, {session.get_session_options().intra_op_num_threads} thread(s), "
            f"{len(model.graph.node)} ONNX operators before ONNX Runtime's own fusions",
            "weights are copied or prepacked when the session is created",
        ]
        if integers := integer_operators(model):
            precisions["int8"] = integers
            wanted = len(quantised_products(graph))
            notes.append(
                f"{integers} products of 8-bit integers; the graph quantises {wanted} and {len(floats)} convolution(s)"
            )
            if _saturates():
                notes.append(
                    "this CPU has no VNNI: sums of two 8-bit products may saturate at 16 bits, which costs accuracy"
                )
        if floats:
            notes.append(f"convolutions run in float32, with rounded weights: {', '.join(floats[:5])}")
        if self.cuda_graph and provider == "cuda":
            notes.append(f"no CUDA graph: {uncaptured}" if uncaptured else "the example's shapes run as one CUDA graph")
        facts = EngineFacts(
            backend=self.name,
            versions=self.versions(),
            precisions=precisions,
            memory_bytes=sum(w.nbytes for w in weights.values())
            + sum(len(i.raw_data) for i in model.graph.initializer),
            notes=tuple(notes),
        )
        if provider == "cpu":
            return OnnxRuntimeEngine(session, data, facts, dynamic)
        from accelkit.backends.onnxruntime.cuda import CudaEngine

        captured = inputs if self.cuda_graph and uncaptured is None else None
        return CudaEngine(session, data, facts, dynamic, graph, place.stream, captured)

    def _session(
        self, data: bytes, weights: Mapping[str, torch.Tensor], place: Place, float64: bool, graph: fx.GraphModule,
        inputs: Sequence[torch.Tensor],
    ) -> tuple[Any, str | None]:  # fmt: skip
        """The session, and why it cannot be captured in a CUDA graph (None where nobody asked, or it can)."""
        plain = replace(self, cuda_graph=False)
        if place.provider == "cpu" or not self.cuda_graph:
            return create_session(data, weights, plain, place, float64), None
        from accelkit.backends.onnxruntime.cuda import why_not_captured

        why = why_not_captured(graph, inputs)
        if why is None:
            try:
                return create_session(data, weights, self, place, float64), None
            except LoweringError as error:  # an operator without a CUDA kernel, for one
                why = str(error)
        return create_session(data, weights, plain, place, float64), why

    def _naming_culprits(self, graph: fx.GraphModule, error: LoweringError, provider: str) -> LoweringError:
        """The same error with the operators that fail alone: they can run in PyTorch."""

        def attempt(part: fx.GraphModule) -> str | None:
            try:
                model = export_onnx(part, opset=self.opset, dialect=self.dialect)
                for_onnxruntime(model, _MULTIPLIED[provider], integers=provider == "cpu")
                place = _place(provider, (), CompileContext())
                create_session(model.SerializeToString(), {}, replace(self, cuda_graph=False), place)
            except LoweringError as failure:
                return str(failure)
            return None

        return LoweringError(str(error), culprits(graph, attempt))


def integer_operators(model: onnx.ModelProto) -> int:
    """Operators of the model that multiply 8-bit integers."""
    return sum(node.op_type in _INTEGER_PRODUCTS for node in model.graph.node)


def _saturates() -> bool:
    """Whether the kernels for uint8 times int8 add pairs of products in 16 bits (AVX2 and AVX-512 without VNNI)."""
    try:
        return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported()
    except AttributeError:  # a PyTorch that cannot tell
        return False


_INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_MULTIPLIED = {"cpu": CPU_TYPES, "cuda": CUDA_TYPES}


def _place(provider: str, inputs: Sequence[torch.Tensor], context: CompileContext) -> Place:
    if provider == "cpu":
        return Place("cpu")
    device = next((t.device.index for t in inputs if t.is_cuda), None)
    index = torch.cuda.current_device() if device is None else device
    return Place("cuda", index, context.precision.name == "tf32", torch.cuda.Stream(index))  # type: ignore[no-untyped-call]


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    found = []
    for value in [graphs.val(node), *map(graphs.val, node.all_input_nodes)]:
        found += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]
    return found


def _operators_by_type(model: onnx.ModelProto) -> dict[str, int]:
    """Operators by the floating-point type of their (first) result, in accelkit's words."""
    names = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    kinds = (names.get(types.get(node.output[0], 0)) for node in model.graph.node)
    return dict(Counter(kind for kind in kinds if kind is not None))


def _module_version(name: str) -> str:
    try:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))
    except ImportError:
        return "missing"
