"""TensorRT as its expert uses it by hand: torch.onnx.export, OnnxParser, builder flags, execute_async_v3 on bound buffers.

    tensorrt("torchscript")(case)    ->    call without arguments; call.facts: build seconds, engine size, memory

The usual way to fp16 is the float32 model's export, the builder's FP16 flag, and fp16 inputs and outputs (`trtexec --fp16
--inputIOFormats=fp16:chw`); `half=True` exports the fp16 model instead. float32 is without the TF32 flag, which TensorRT sets
by default. Shapes are fixed, as in the other candidates; no timing cache, so that build times are those of a first build.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from by_hand import quiet, tensors_of
from torch import nn

from accelkit.models import Inputs

OPSET = 17
"""The newest that TensorRT 8.6 is documented for."""
KEPT_BYTES = 4 * 2**30
OUTSIDE = {
    "CUBLAS": ("libcublas.so.12", "cublasGetCudartVersion"),
    "CUBLAS_LT": ("libcublasLt.so.12", "cublasLtGetCudartVersion"),
    "CUDNN": ("libcudnn.so.8", "cudnnGetVersion"),
}
"""Tactic sources of 8.6 that are libraries of their own: file, and a function that tells a version."""


class Flat(nn.Module):
    """A model that takes and gives tensors alone, as ONNX wants them; in eval mode."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.eval()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = (
            self.model(*tensors) if self.names is None else self.model(**dict(zip(self.names, tensors, strict=True)))
        )
        return tuple(tensors_of(given))


@dataclass(frozen=True)
class Plan:
    """A serialised engine.

    Attributes:
        data: what TensorRT gave. inputs, outputs: names in the model's order.
        seconds: of export, parse and build.
    """

    data: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def bytes(self) -> int:
        return int(getattr(self.data, "nbytes", 0) or len(self.data))


@dataclass
class BoundCall:
    """An execution context on buffers of its own; calling it runs on the current stream and gives the output buffers."""

    context: Any
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    kept: Any = None  # what the context needs

    def __call__(self) -> list[torch.Tensor]:
        if not self.context.execute_async_v3(_stream(self.outputs[0].device)):
            raise RuntimeError("TensorRT's execute_async_v3 failed")
        return self.outputs


def library() -> Any:
    """The module `tensorrt`.

    Raises:
        RuntimeError: it is not installed, does not load, or there is no GPU.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise RuntimeError(f"TensorRT is missing: {error}") from error
    if not torch.cuda.is_available():
        raise RuntimeError("TensorRT needs a GPU")
    return tensorrt


def names_of(inputs: Inputs) -> tuple[list[str], list[torch.Tensor], list[str] | None]:
    """ONNX input names, tensors, and the model's keywords (None: positional)."""
    if isinstance(inputs, dict):
        return list(inputs), list(inputs.values()), list(inputs)
    return [f"input_{i}" for i in range(len(inputs))], list(inputs), None


def export(model: nn.Module, inputs: Inputs, exporter: str, path: Path) -> tuple[list[str], list[str]]:
    """Write `path`, an ONNX file; its input and output names.

    Args:
        exporter: "torchscript" (`dynamo=False`) or "dynamo".
    """
    names, tensors, keywords = names_of(inputs)
    flat = Flat(model, keywords)
    with torch.no_grad(), quiet(), _without_fast_path():
        results = [f"output_{i}" for i in range(len(flat(*tensors)))]
        given: dict[str, Any] = {"input_names": names, "output_names": results, "verbose": False}
        if exporter == "torchscript":
            torch.onnx.export(flat, tuple(tensors), path, dynamo=False, opset_version=OPSET, **given)
        else:
            program = torch.onnx.export(flat, tuple(tensors), dynamo=True, **given)
            assert program is not None
            program.save(path, external_data=True)
    return names, results


def build(trt: Any, path: Path, precision: str, dtypes: dict[str, torch.dtype], cache: bytes | None = None) -> Any:
    """(serialised engine, seconds of parse and build, timing cache afterwards or None) of an ONNX file.

    Args:
        precision: "fp32", "tf32" or "fp16". dtypes: of floating-point inputs and outputs by name, where they are not the file's.
        cache: a timing cache to begin with, b"" for an empty one.

    Raises:
        RuntimeError: the parser refuses the file, or there is no engine; with what the library said.
    """
    builder = trt.Builder(_log(trt))
    flag = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, _log(trt))
    started = time.perf_counter()
    if not parser.parse_from_file(str(path)):
        said = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise RuntimeError(f"TensorRT's parser refuses the file: {'; '.join(said)}")
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if precision == "fp16" and hasattr(trt.BuilderFlag, "FP16"):  # TensorRT 11 has the network's own types alone
        config.set_flag(trt.BuilderFlag.FP16)
    config.set_tactic_sources(usable_sources(trt, config.get_tactic_sources()))
    kept = None
    if cache is not None:
        kept = config.create_timing_cache(cache)
        config.set_timing_cache(kept, False)
    tensors = [*map(network.get_input, range(network.num_inputs)), *map(network.get_output, range(network.num_outputs))]
    for tensor in tensors:
        if dtypes.get(tensor.name) == torch.float16 and tensor.dtype == trt.float32:
            tensor.dtype = trt.float16
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise RuntimeError(f"TensorRT built no engine: {_log(trt).last}")
    seconds = {"parse": parsed - started, "build": time.perf_counter() - parsed}
    after = None if kept is None else bytes(config.get_timing_cache().serialize())
    return data, seconds, after


def usable_sources(trt: Any, default: int) -> int:
    """The default tactic sources less the libraries that are not there."""
    for name, (file, symbol) in OUTSIDE.items():
        if name in trt.TacticSource.__members__ and not _works(file, symbol):
            default &= ~(1 << int(trt.TacticSource.__members__[name]))
    return default


def load(trt: Any, data: Any) -> tuple[Any, Any]:
    """The engine of a plan, and the runtime, which has to live as long.

    Raises:
        RuntimeError: it does not load; with what the library said.
    """
    runtime = trt.Runtime(_log(trt))
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise RuntimeError(f"TensorRT does not load its engine: {_log(trt).last}")
    return engine, runtime


def bind(engine: Any, inputs: dict[str, torch.Tensor], outputs: Sequence[str]) -> BoundCall:
    """A context on copies of the inputs in the engine's dtypes, and on new outputs."""
    context = engine.create_execution_context()
    given, results = [], []
    device = next(iter(inputs.values())).device
    for name, tensor in inputs.items():
        copy = tensor.to(torch_dtype(engine, name)).contiguous()
        context.set_input_shape(name, tuple(copy.shape))
        context.set_tensor_address(name, copy.data_ptr())
        given.append(copy)
    for name in outputs:
        shape = tuple(context.get_tensor_shape(name))
        results.append(torch.empty(shape, dtype=torch_dtype(engine, name), device=device))
        context.set_tensor_address(name, results[-1].data_ptr())
    newer = hasattr(engine, "device_memory_size_v2")
    size = engine.device_memory_size_v2 if newer else engine.device_memory_size
    return BoundCall(context, given, results, {"device_memory_bytes": int(size)})


def _stream(device: torch.device) -> int:
    """The caller's stream by its number; off the GPU (tests) there is none."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def torch_dtype(engine: Any, name: str) -> torch.dtype:
    return _DTYPES[engine.get_tensor_dtype(name).name]


_DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PLANS: dict[Any, Plan] = {}


def plan_of(case: Any, exporter: str, half: bool) -> Plan:
    """Export, parse and build; plans are kept for the candidate that only runs them otherwise, at the end of a run."""
    shapes = tuple((name, tuple(t.shape), t.dtype) for name, t in zip(*names_of(case.inputs)[:2], strict=True))
    key = (id(case.model), case.precision, shapes)
    while sum(plan.bytes for plan in _PLANS.values()) > KEPT_BYTES:
        del _PLANS[next(iter(_PLANS))]
    if (key, exporter, half) not in _PLANS:
        trt = library()
        typed = half or not hasattr(trt.BuilderFlag, "FP16")
        model, inputs = (case.model, case.inputs) if typed else (case.wide_model, case.wide_inputs)
        with tempfile.TemporaryDirectory(prefix="accelkit-tensorrt-by-hand-") as folder:
            path, started = Path(folder) / "model.onnx", time.perf_counter()
            names, results = export(model, inputs, exporter, path)
            exported = time.perf_counter() - started
            data, seconds, _ = build(trt, path, case.precision, dict.fromkeys([*names, *results], case.dtype))
        _PLANS[key, exporter, half] = Plan(data, tuple(names), tuple(results), {"export": exported, **seconds})
    return _PLANS[key, exporter, half]


def tensorrt(exporter: str, *, half: bool = False) -> Callable[[Any], BoundCall]:
    """case -> call on an engine from this exporter's ONNX, of the float32 model or (half) of the fp16 one."""

    def make(case: Any) -> BoundCall:
        trt = library()
        if half and case.precision != "fp16":
            raise RuntimeError("the fp16 model's export is measured in fp16 alone")
        plan = plan_of(case, exporter, half)
        started = time.perf_counter()
        engine, runtime = load(trt, plan.data)
        call = bind(engine, dict(zip(plan.inputs, names_of(case.inputs)[1], strict=True)), plan.outputs)
        call.kept = (engine, runtime)
        seconds = {**plan.seconds, "load": time.perf_counter() - started}
        call.facts |= {"engine_bytes": plan.bytes, "seconds": {k: round(v, 3) for k, v in seconds.items()}}
        return call

    return make


@functools.cache
def _log(trt: Any) -> Any:
    """The process's logger, of which TensorRT has one alone; its errors are kept."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "it did not say why"

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.last = msg

    return Log()


def _works(file: str, symbol: str) -> bool:
    """Whether a library loads and tells a version; a stub that only satisfies the linker does not."""
    try:
        return int(getattr(ctypes.CDLL(file), symbol)()) >= 1000
    except (OSError, AttributeError):
        return False


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder's and nn.MultiheadAttention's fast path is an operator that no exporter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
