"""Everything that differs between TensorRT 8.6, 10 and 11, and nothing else.

    | | 8.6 | 10 | 11 |
    |---|---|---|---|
    | precision | the builder's flags, and `ILayer.precision` beside | in the network's types: strongly typed | the same |
    | batch dimension | explicit by a flag | explicit by a flag, deprecated | always explicit |
    | bfloat16, int64 tensors | no | yes | yes |
    | outside libraries for tactics | cuBLAS, cuBLASLt, cuDNN | the same, off by default | none |
    | progress while building | no | IProgressMonitor | IProgressMonitor |
    | what the parser refuses | the node's number | its number, name, operator | the same |
    | refitting | from the CPU's memory, waiting | from the GPU's too, on a stream | the same |

Functions take the module `tensorrt` and ask for what is there; each is run against the listings of the real bindings of the
three versions (tests/data/tensorrt_api). Standard library only: the worker imports this file by itself.
Sources: the bindings themselves, and onnx-tensorrt's docs/operators.md for the operator sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Newest ONNX operator set by major version: of 8.6, of 10.0 (10.15 has 24) and of 11.2.
OPSETS = {8: 17, 9: 19, 10: 20, 11: 24}

# Network types by the names that PyTorch has for them.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}

TORCH_NAMES = {"fp32": "float32", "tf32": "float32", "fp16": "float16", "bf16": "bfloat16"}

TACTIC_SOURCES = {
    "cublas": "CUBLAS",
    "cublas_lt": "CUBLAS_LT",
    "cudnn": "CUDNN",
    "edge_mask_convolutions": "EDGE_MASK_CONVOLUTIONS",
    "jit_convolutions": "JIT_CONVOLUTIONS",
}


class NotInThisVersionError(Exception):
    """An option that this TensorRT does not have."""


def newest_opset(version: str) -> int:
    """The newest ONNX operator set that the parser of this TensorRT is documented for.

    >>> newest_opset("8.6.0"), newest_opset("10.16.1.11"), newest_opset("12.0")
    (17, 20, 24)
    """
    major = int(version.partition(".")[0])
    return OPSETS[min(max(major, min(OPSETS)), max(OPSETS))]


# --- network


def strongly_typed(trt: Any) -> bool:
    """Whether layers run in the types that the network gives them, instead of those that flags allow."""
    return "STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__


def network_flags(trt: Any) -> int:
    """For `Builder.create_network`."""
    flags = trt.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if strongly_typed(trt) else "EXPLICIT_BATCH"
    return 1 << int(flags.__members__[name])


def dtype_name(dtype: Any) -> str:
    """A network type by PyTorch's name: `float16` for `DataType.HALF`; its own name, in small letters, where PyTorch has none."""
    return DTYPES.get(str(dtype.name), str(dtype.name).lower())


def has_dtype(trt: Any, name: str) -> bool:
    """Whether networks have tensors of this type, by PyTorch's name; 8.6 has neither `int64` nor `bfloat16`."""
    return any(DTYPES.get(member) == name for member in trt.DataType.__members__)


def refused_node(error: Any) -> dict[str, Any]:
    """What a parser's error says: `index`, `message`, and `name` and `operator` where it knows them."""
    found = {"index": error.node(), "message": " ".join(str(error.desc()).split())}
    if hasattr(error, "node_name"):
        found |= {"name": error.node_name(), "operator": error.node_operator()}
    return found


# --- builder


def precisions(trt: Any) -> tuple[str, ...]:
    """Those that can be asked for."""
    return ("fp32", "tf32", "fp16", *(("bf16",) if has_dtype(trt, "bfloat16") else ()))


def set_precision(trt: Any, config: Any, precision: str, tf32: bool = False) -> None:
    """Flags for a precision. TF32 is on by default in all versions; here it is on for `tf32` and where it is allowed.

    Raises:
        NotInThisVersionError: it has no such precision.
    """
    if precision not in precisions(trt):
        raise NotInThisVersionError(f"it has no {precision}, only {', '.join(precisions(trt))}")
    change = config.set_flag if precision == "tf32" or tf32 else config.clear_flag
    change(trt.BuilderFlag.TF32)
    if not strongly_typed(trt) and precision in ("fp16", "bf16"):
        config.set_flag(trt.BuilderFlag.__members__[precision.upper()])


def keep_fp32(trt: Any, config: Any, network: Any, nodes: set[str]) -> set[str]:
    """Hold the layers of these ONNX nodes in fp32, where precision is a flag; returns the nodes that have no layer."""
    if not nodes or strongly_typed(trt):
        return set()
    left = set(nodes)
    floating = (trt.float32, trt.float16)
    as_they_are = (trt.LayerType.CONSTANT, trt.LayerType.CAST, trt.LayerType.SHAPE)
    for layer in map(network.get_layer, range(network.num_layers)):
        node = _onnx_node(layer)
        if node not in nodes:
            continue
        left.discard(node)
        outputs = [i for i in range(layer.num_outputs) if layer.get_output(i).dtype in floating]
        if outputs and layer.type not in as_they_are:
            layer.precision = trt.float32
            for i in outputs:
                layer.set_output_type(i, trt.float32)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return left


def demand(trt: Any, config: Any, network: Any, nodes: set[str], precision: str) -> None:
    """Ask for `precision` in the products of these ONNX nodes, where it is a flag, which by itself only allows it.

    A preference, unless layers are held in fp32: then those constraints bind, and so do these.
    """
    if not nodes or strongly_typed(trt):
        return
    names = ("MATRIX_MULTIPLY", "FULLY_CONNECTED", "CONVOLUTION", "DECONVOLUTION")
    products = [trt.LayerType.__members__[name] for name in names if name in trt.LayerType.__members__]
    wanted = next(trt.DataType.__members__[name] for name, known in DTYPES.items() if known == TORCH_NAMES[precision])
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type in products and _onnx_node(layer) in nodes:
            layer.precision = wanted
    if not config.get_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS):
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)


def _onnx_node(layer: Any) -> str:
    """The ONNX node that the parser made this layer from: in its metadata, `[ONNX Layer: name]`, else its own name."""
    start, _, rest = str(layer.metadata).partition("[ONNX Layer: ")
    return rest.partition("]")[0] if rest and not start else str(layer.name)


def tactic_source_mask(trt: Any, names: tuple[str, ...]) -> int:
    """For `IBuilderConfig.set_tactic_sources`.

    Raises:
        NotInThisVersionError: it has no such source.
    """
    known = trt.TacticSource.__members__
    if unknown := [name for name in names if TACTIC_SOURCES.get(name) not in known]:
        there = [name for name, member in TACTIC_SOURCES.items() if member in known]
        raise NotInThisVersionError(f"it has no tactic sources {', '.join(unknown)}, only {', '.join(there)}")
    return sum(1 << int(known[TACTIC_SOURCES[name]]) for name in set(names))


def outside_sources(trt: Any) -> dict[str, int]:
    """Tactic sources that are libraries of their own, which may not be installed: name -> bit in the mask."""
    known = trt.TacticSource.__members__
    outside = ("cublas", "cublas_lt", "cudnn")
    return {name: 1 << int(known[TACTIC_SOURCES[name]]) for name in outside if TACTIC_SOURCES[name] in known}


def set_progress_monitor(trt: Any, config: Any, report: Callable[[str, int, int], None]) -> Any:
    """Have `report(phase, done, of)` called for outermost phases, from any thread; returns what must live as long as the build."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.outermost[phase_name] = num_steps
                report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if (steps := self.outermost.get(phase_name)) is not None:
                report(phase_name, min(step + 1, steps), steps)
            return True

        def phase_finish(self, phase_name: str) -> None:
            if (steps := self.outermost.pop(phase_name, None)) is not None:
                report(phase_name, steps, steps)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


# --- engine


def plugin_count(registry: Any) -> int:
    """Kinds of plugins that are known."""
    return len(registry.all_creators if hasattr(registry, "all_creators") else registry.plugin_creator_list)


def device_memory_bytes(engine: Any) -> int:
    """Scratch memory of one execution context."""
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)


def context_without_memory(trt: Any, engine: Any) -> Any:
    """An execution context that is given its scratch memory by `set_context_memory`."""
    if not hasattr(trt, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context_without_device_memory()
    return engine.create_execution_context(strategy=trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def set_context_memory(context: Any, address: int, size_bytes: int) -> None:
    """The memory must stay as it is for as long as the context runs."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, size_bytes)
    else:
        context.device_memory = address


def refits_from_device(trt: Any) -> bool:
    """Whether new weights may lie in the GPU's memory: `trt.Weights(dtype, address, count)` with a location; else NumPy arrays."""
    return hasattr(trt.Refitter, "refit_cuda_engine_async")


def refit(refitter: Any, stream: int) -> bool:
    """Put the new weights in, on the stream where this version can; where it cannot, it waits for the GPU."""
    if hasattr(refitter, "refit_cuda_engine_async"):
        return bool(refitter.refit_cuda_engine_async(stream))
    return bool(refitter.refit_cuda_engine())
