"""ONNX Runtime: fx graph -> ONNX without weights -> session that gets the live weights.

    graph --export_onnx, OnnxPass values--> small ModelProto --+ weights from torch's memory--> InferenceSession

The session copies or prepacks every weight as it is created (nothing is shared with the model afterwards: changing a
parameter in place does not change the engine; a refit makes a new session from the same bytes). Inputs and outputs
are not copied. How this form was chosen, with numbers: docs/decisions/0002-onnx-runtime-weights.md.
"""

from __future__ import annotations

import importlib.util
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import Backend, CompileContext, Engine, EngineFacts
from accelkit.culprits import culprits
from accelkit.errors import BackendUnavailableError, InputError, LoweringError
from accelkit.onnx_export import export_onnx, external_weights
from accelkit.pass_runner import run_onnx_passes

if TYPE_CHECKING:
    import onnx

_BLOB = "model.onnx"
_NAMESPACES = ("aten", "prims", "quantized_decomposed", "accelkit")
_PROVIDERS = {"cpu": "CPUExecutionProvider"}
_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_NO_KERNELS = {  # dtypes that ONNX Runtime's CPU provider computes nothing in
    torch.bfloat16: "bfloat16", torch.complex32: "complex", torch.complex64: "complex", torch.complex128: "complex",
}  # fmt: skip


_WRONG_FUSIONS = ("Pad_Fusion",)
"""ONNX Runtime's own rewrites that change results: Pad_Fusion puts a Pad with zeros into a MaxPool, whose padding is minus
infinity (seen with 1.30 and 1.31)."""


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """ONNX Runtime.

    Attributes:
        provider: where it runs: `cpu`.
        threads: threads that share one operator; None for torch.get_num_threads() at the time of compiling.
        inter_op_threads: operators that run at the same time; above 1 switches to parallel execution.
        optimization: ONNX Runtime's own graph optimisations: none, basic, extended or all.
        opset: version of the ONNX operator set; None for the exporter's own.
        session_config: (key, value) entries for SessionOptions.add_session_config_entry.
    """

    provider: str = "cpu"
    threads: int | None = None
    inter_op_threads: int = 1
    optimization: str = "all"
    opset: int | None = None
    session_config: tuple[tuple[str, str], ...] = ()

    name: ClassVar[str] = "onnxruntime"
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    embeds_weights: ClassVar[bool] = False
    description: ClassVar[str] = "ONNX Runtime's CPU provider, by way of torch.onnx.export"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("provider", self.provider, _PROVIDERS),
            ("optimization", self.optimization, _LEVELS),
        ):
            if value not in known:
                raise InputError(f"OnnxRuntime({option}={value!r}): known are {', '.join(known)}")
        for option, number in (("threads", self.threads), ("inter_op_threads", self.inter_op_threads)):
            if number is not None and number < 1:
                raise InputError(f"OnnxRuntime({option}={number}): must be at least 1")

    def unavailable(self) -> str | None:
        missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]
        if missing:
            return f'{", ".join(missing)} not installed; pip install "accelkit[cpu]"'
        import onnxruntime

        provider = _PROVIDERS[self.provider]
        if provider not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no {provider} (it has {', '.join(onnxruntime.get_available_providers())})"
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
            if value.dtype in _NO_KERNELS:
                return f"ONNX Runtime's CPU provider has no {_NO_KERNELS[value.dtype]} kernels"
            if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
                return f"{value.dtype} is not supported"
            if value.is_sparse or value.layout != torch.strided:
                return f"{value.layout} tensors are not supported"
        return None

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        self._require_available()
        context.progress("exporting to ONNX")
        try:
            model = export_onnx(graph, opset=self.opset)
        except LoweringError as error:
            raise self._naming_culprits(graph, error) from error
        if context.onnx_passes:
            model, records = run_onnx_passes(model, context.onnx_passes, lambda one: context.progress(str(one)))
            context.records.extend(records)
        multiply_transposed(model)
        context.progress("creating the ONNX Runtime session")
        try:
            engine = self._engine(model.SerializeToString(deterministic=True), model, graph)
            engine(*inputs)  # some kernels refuse their types or shapes at the first run only
        except LoweringError as error:
            raise self._naming_culprits(graph, error) from error
        return engine

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        self._require_available()
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        if _BLOB not in blobs:
            raise LoweringError(f"the stored engine has no {_BLOB} (it has {', '.join(blobs) or 'nothing'})")
        try:
            model = onnx.ModelProto.FromString(blobs[_BLOB])
        except DecodeError as error:
            raise LoweringError(f"the stored {_BLOB} is damaged: {error}") from error
        expected = [str(n.name) for n in graph.graph.find_nodes(op="placeholder")]
        if [i.name for i in model.graph.input] != expected:
            raise LoweringError(f"the stored {_BLOB} has inputs {[i.name for i in model.graph.input]}, not {expected}")
        return self._engine(blobs[_BLOB], model, graph)

    def _require_available(self) -> None:
        if (why := self.unavailable()) is not None:
            raise BackendUnavailableError(f"target {self.name}: {why}")

    def _engine(self, data: bytes, model: onnx.ModelProto, graph: fx.GraphModule) -> OnnxRuntimeEngine:
        weights = external_weights(model, graph)
        session = self._session(data, weights)
        dynamic = any(
            isinstance(size, torch.SymInt)
            for node in graph.graph.find_nodes(op="placeholder")
            for size in graphs.val(node).shape
        )
        facts = EngineFacts(
            backend=self.name,
            versions=self.versions(),
            precisions=_operators_by_type(model),
            memory_bytes=sum(w.nbytes for w in weights.values())
            + sum(len(i.raw_data) for i in model.graph.initializer),
            notes=(
                f"{session.get_providers()[0]}, {session.get_session_options().intra_op_num_threads} thread(s), "
                f"{len(model.graph.node)} ONNX operators before ONNX Runtime's own fusions",
                "weights are copied or prepacked when the session is created",
            ),
        )
        return OnnxRuntimeEngine(session, data, facts, dynamic)

    def _session(self, data: bytes, weights: Mapping[str, torch.Tensor]) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings are about the model, not for the user to act on; errors are raised
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        options.inter_op_num_threads = self.inter_op_threads
        if self.inter_op_threads > 1:
            options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[self.optimization])
        for key, value in self.session_config:
            options.add_session_config_entry(key, value)
        # Views of torch's memory; the session has its own copies once it exists.
        views = [_ort_value(tensor) for tensor in weights.values()]
        if views:
            options.add_external_initializers(list(weights), views)
        try:
            onnxruntime.set_default_logger_severity(3)  # fusions report on the default logger, not on the session's
            return onnxruntime.InferenceSession(
                data, options, providers=[_PROVIDERS[self.provider]], disabled_optimizers=list(_WRONG_FUSIONS)
            )
        except Exception as error:
            raise LoweringError(f"ONNX Runtime refuses the model: {_first_line(error)}") from error
        finally:
            onnxruntime.set_default_logger_severity(2)  # its own default; there is no way to ask what it was

    def _naming_culprits(self, graph: fx.GraphModule, error: LoweringError) -> LoweringError:
        """The same error with the operators that fail alone: they can run in PyTorch."""

        def attempt(part: fx.GraphModule) -> str | None:
            try:
                model = export_onnx(part, opset=self.opset)
                multiply_transposed(model)
                self._session(model.SerializeToString(), {})
            except LoweringError as failure:
                return str(failure)
            return None

        return LoweringError(str(error), culprits(graph, attempt))


class OnnxRuntimeEngine(Engine):
    """A session on torch tensors: inputs are read from, and outputs are, the memory that they lie in."""

    def __init__(self, session: Any, data: bytes, facts: EngineFacts, dynamic: bool) -> None:
        self._session, self._data, self._facts, self._dynamic = session, data, facts, dynamic
        self._inputs = tuple(i.name for i in session.get_inputs())
        self._outputs = [o.name for o in session.get_outputs()]

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Raises InputError for an empty tensor in a dynamic graph (ONNX operators read a size of 0 in several
        ways)."""
        feed = {}
        for name, tensor in zip(self._inputs, inputs, strict=True):
            if self._dynamic and not tensor.numel():
                raise InputError(f"input {name} is empty ({list(tensor.shape)}); ONNX Runtime takes sizes from 1")
            if tensor.requires_grad:
                tensor = tensor.detach()
            feed[name] = tensor.numpy() if tensor.is_contiguous() else tensor.contiguous().numpy()
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:
            raise LoweringError(f"ONNX Runtime failed at run time: {_first_line(error)}") from error
        return [torch.from_numpy(result) for result in results]

    def serialize(self) -> dict[str, bytes]:
        return {_BLOB: self._data}

    def describe(self) -> EngineFacts:
        return self._facts


def multiply_transposed(model: onnx.ModelProto) -> int:
    """MatMul(x, Transpose(weight)) -> FusedMatMul(x, weight, transB=1); returns how many.

    ONNX Runtime folds Transpose(weight) when it creates the session: a copy of every weight at once, which is then
    packed (a second one). Its own fused operator packs the weight as it is. Float only: there is no other kernel.
    """
    float_weights = {i.name for i in model.graph.initializer if i.data_type == 1 and len(i.dims) == 2}
    transposed = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in float_weights
    }  # fmt: skip
    fused = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and not node.domain and node.input[1] in transposed:
            node.op_type, node.domain = "FusedMatMul", "com.microsoft"
            node.input[1] = transposed[node.input[1]].input[0]
            node.attribute.add(name="transB", type=2, i=1)  # AttributeProto.INT
            fused += 1
    if fused:
        needed = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        for output, node in transposed.items():
            if output not in needed:
                model.graph.node.remove(node)
        if all(entry.domain != "com.microsoft" for entry in model.opset_import):
            model.opset_import.add(domain="com.microsoft", version=1)
    return fused


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    found = []
    for value in [graphs.val(node), *map(graphs.val, node.all_input_nodes)]:
        found += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]
    return found


def _ort_value(tensor: torch.Tensor) -> Any:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _operators_by_type(model: onnx.ModelProto) -> dict[str, int]:
    """Operators by the floating-point type of their (first) result, in accelkit's words."""
    names = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    kinds = (names.get(types.get(node.output[0], 0)) for node in model.graph.node)
    return dict(Counter(kind for kind in kinds if kind is not None))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:500] if lines else '(no message)'}"


def _module_version(name: str) -> str:
    try:
        return str(getattr(importlib.import_module(name), "__version__", "unknown"))
    except ImportError:
        return "missing"
