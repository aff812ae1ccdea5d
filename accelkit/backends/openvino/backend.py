"""The target `openvino`: its options, what it refuses, compile and load."""

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
from accelkit.backends.openvino.engine import BLOB, OpenVinoEngine, Result
from accelkit.backends.openvino.model import compile_model, core, ov_type, read_model
from accelkit.backends.openvino.proof import layers, prove
from accelkit.backends.openvino.quantised import leave_outside, with_quantised_weights
from accelkit.culprits import culprits
from accelkit.errors import BackendUnavailableError, InputError, LoweringError
from accelkit.onnx_export import export_onnx, external_weights
from accelkit.onnx_fused import STANDARD
from accelkit.pass_runner import run_onnx_passes

if TYPE_CHECKING:
    import onnx

PERFORMANCE = ("latency", "throughput", "cumulative_throughput")
INFERENCE_PRECISIONS = ("fp32", "bf16")
_PACKAGES = ("onnx", "onnxscript", "openvino")
_NAMESPACES = ("aten", "prims", "quantized_decomposed", "accelkit")
_LACKING = {
    torch.float64: "OpenVINO's CPU plugin computes float64 in float32",
    **dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), "OpenVINO has no complex kernels"),
}
_WRAPPING = frozenset({"add", "sub", "rsub", "mul", "neg", "sum", "cumsum", "pow", "square", "__lshift__"})
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class OpenVINO(Backend):
    """OpenVINO on a CPU.

    Attributes:
        threads: threads in all; None for torch.get_num_threads() at the time of compiling.
        streams: calls that run at the same time, sharing the threads; None for what `performance` makes of it.
        performance: what OpenVINO tunes for: latency, throughput or cumulative_throughput.
        inference_precision: what float32 operators run in: fp32, or bf16 where OpenVINO finds it faster. Other types run as
            the graph has them, so that optimize(precision="bf16") needs nothing here.
        opset: version of the ONNX operator set; None for the exporter's own.
        properties: further (name, value) properties of OpenVINO's CPU plugin, such as ("ENABLE_CPU_PINNING", False).
    """

    threads: int | None = None
    streams: int | None = 1
    performance: str = "latency"
    inference_precision: str = "fp32"
    opset: int | None = None
    properties: tuple[tuple[str, Any], ...] = ()

    name: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    embeds_weights: ClassVar[bool] = False
    fused_operators: ClassVar[frozenset[str]] = frozenset(STANDARD)
    description: ClassVar[str] = "OpenVINO's CPU runtime, by way of torch.onnx.export"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("performance", self.performance, PERFORMANCE),
            ("inference_precision", self.inference_precision, INFERENCE_PRECISIONS),
        ):
            if value not in known:
                raise InputError(f"OpenVINO({option}={value!r}): known are {', '.join(known)}")
        for option, number in (("threads", self.threads), ("streams", self.streams)):
            if number is not None and number < 1:
                raise InputError(f"OpenVINO({option}={number}): must be at least 1")

    def unavailable(self) -> str | None:
        missing = [p for p in _PACKAGES if importlib.util.find_spec(p) is None]
        if missing:
            return f'{", ".join(missing)} not installed; pip install "accelkit[openvino]"'
        try:
            devices = core().available_devices
        except (ImportError, RuntimeError) as error:  # a library that does not load, a plugin that does not start
            return f"openvino does not start here: {error}; pip install --force-reinstall openvino"
        if "CPU" not in devices:
            return f"this openvino has no CPU plugin (it has {', '.join(devices) or 'none'}); pip install --upgrade openvino"
        return None

    def versions(self) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        found = super().versions()
        for package in _PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # told by unavailable()
                found[package] = "missing"
        return found

    def unsupported(self, node: fx.Node) -> str | None:
        if node.op != "call_function":
            return f"{node.op} nodes are not tensor operators"
        target = node.target
        if target is operator.getitem or graphs.is_size(node):
            return None
        if isinstance(target, torch._ops.HigherOrderOperator):
            return "control flow stays in PyTorch"
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _NAMESPACES:
            return "no ONNX form is known"
        if graphs.is_mutating(node):
            return "writes into its argument; ONNX has values only"
        if graphs.is_random(node):
            return "random: OpenVINO would draw other numbers than PyTorch"
        for value in _tensors(node):
            if value.device.type != "cpu":
                return f"computes on {value.device.type}; the openvino target runs on CPUs"
            if (why := _LACKING.get(value.dtype)) is not None:
                return why
            if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
                return f"{value.dtype} is not supported"
            if value.is_sparse or value.layout != torch.strided:
                return f"{value.layout} tensors are not supported"
        return _integers(node, target)

    def pads_batches(self) -> bool:
        return True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        self._require_available(context)
        graph, quantised = with_quantised_weights(graph)
        context.progress("exporting to ONNX")
        try:
            model = export_onnx(graph, opset=self.opset)
            leave_outside(model, quantised)
        except LoweringError as error:
            raise self._naming_culprits(graph, error) from error
        if context.onnx_passes:
            model, records = run_onnx_passes(model, context.onnx_passes, lambda one: context.progress(str(one)))
            context.records.extend(records)
        context.progress("compiling with OpenVINO")
        try:
            engine = self._engine(model.SerializeToString(deterministic=True), model, graph)
            engine(*inputs)  # dynamic shapes: kernels are made, and weights packed, by the first run
        except LoweringError as error:
            raise self._naming_culprits(graph, error) from error
        return engine

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        self._require_available(context)
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
        engine = self._engine(blobs[BLOB], model, with_quantised_weights(graph)[0])
        engine(*inputs)
        return engine

    def _require_available(self, context: CompileContext) -> None:
        if (why := self.unavailable()) is not None:
            raise BackendUnavailableError(f"target {self.name}: {why}")
        has = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in has and "bf16" in (context.precision.name, self.inference_precision):
            raise BackendUnavailableError(
                f"target {self.name}: OpenVINO has no bf16 on this CPU (it has {', '.join(has)}), and would compute in float32 "
                "without saying so; leave precision out, or use target 'inductor' or 'eager'"
            )

    def _engine(self, data: bytes, model: onnx.ModelProto, graph: fx.GraphModule) -> OpenVinoEngine:
        weights = external_weights(model, graph)
        read, shared = read_model(model, weights)
        compiled, switched_off = compile_model(read, self)
        results = _results(compiled, graph)
        found = layers(compiled)
        notes = prove(found, graph, self.inference_precision)
        threads, streams, precision = (
            compiled.get_property(key) for key in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "INFERENCE_PRECISION_HINT")
        )
        shared_bytes = sum(t.nbytes for t in shared)
        facts = EngineFacts(
            backend=self.name,
            versions=self.versions(),
            precisions=dict(Counter(layer.precision for layer in found)),
            memory_bytes=sum(w.nbytes for w in weights.values())
            + sum(len(i.raw_data) for i in model.graph.initializer),
            notes=(
                f"{threads} thread(s), {streams} stream(s), float32 operators in {precision.get_type_name()}, {len(found)} layers "
                "that compute",
                *([switched_off] if switched_off else []),
                *notes,
                f"weights of products ({shared_bytes} bytes) are packed from the model's memory, the others copied",
            ),
        )
        inputs = graph.graph.find_nodes(op="placeholder")
        dynamic = any(isinstance(size, torch.SymInt) for node in inputs for size in graphs.val(node).shape)
        return OpenVinoEngine(compiled, data, [str(n.name) for n in inputs], shared, results, facts, dynamic)

    def _naming_culprits(self, graph: fx.GraphModule, error: LoweringError) -> LoweringError:
        """The same error with the operators that fail alone: they can run in PyTorch."""

        def attempt(part: fx.GraphModule) -> str | None:
            try:
                compile_model(read_model(export_onnx(part, opset=self.opset), {})[0], self)
            except LoweringError as failure:
                return str(failure)
            return None

        return LoweringError(str(error), culprits(graph, attempt))


def _integers(node: fx.Node, overload: torch._ops.OpOverload) -> str | None:
    """Why integers of this operator would come out other than PyTorch's: the CPU plugin has 32 bits for all of them."""
    value = graphs.val(node)
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype is torch.bool:
        return None
    if value.dtype.itemsize < 4 and overload._opname in _WRAPPING:
        return f"{value.dtype} wraps around; OpenVINO computes it in 32 bits"
    beyond = any(isinstance(a, int) and a not in _INT32 for a in node.args)
    if value.dtype is torch.int64 and overload._opname in _WRAPPING and beyond:
        return "int64 beyond 32 bits; OpenVINO's CPU plugin computes integers in 32"
    return None


def _results(compiled: Any, graph: fx.GraphModule) -> list[Result]:
    (returned,) = graph.graph.output_node().args
    found = []
    for port, node in zip(compiled.outputs, returned, strict=True):  # type: ignore[arg-type]
        dtype = graphs.val(node).dtype
        if port.element_type != ov_type(dtype):
            raise LoweringError(f"OpenVINO gives {node} as {port.element_type.get_type_name()}, the graph as {dtype}")
        shape = port.partial_shape
        if shape.rank.is_dynamic:
            raise LoweringError(f"OpenVINO does not know the number of dimensions of {node}")
        sizes = tuple(0 if size.is_dynamic else size.get_length() for size in shape)
        found.append(Result(dtype, sizes, shape.is_static))
    return found


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    found = []
    for value in [graphs.val(node), *map(graphs.val, node.all_input_nodes)]:
        found += [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]
    return found
