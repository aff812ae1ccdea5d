"""Fingerprints: what makes two graphs, sets of weights, or builds the same.

    graph --graph_fingerprint--> SHA-256 of its meaning        weights --weights_fingerprint--> SHA-256 of their values
    graph + backend + options + versions + machine + inputs --engine_key--> name of one cache entry

The same in every process (no addresses, no hash randomisation, no order of sets), different whenever a difference could
change the engine. What cannot be told apart safely (a closure as a target, an object as an option) gets a fresh mark,
so that its engine is built each time and never mistaken for another.

    >>> from accelkit.capture import capture
    >>> one, other = (capture(torch.nn.Linear(3, 300), (torch.ones(1, 3),), {}).graph for _ in range(2))
    >>> graph_fingerprint(one, False) == graph_fingerprint(other, False)  # the same but for the weights' values
    True
    >>> graph_fingerprint(one, True) == graph_fingerprint(other, True)
    False
    >>> weights_fingerprint(one) == weights_fingerprint(other)
    False
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import platform
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import EMBEDS_BELOW_BYTES, Backend, options_of
from accelkit.pass_api import OnnxPass
from accelkit.precision import Precision
from accelkit.tensor_hash import contents, opaque, strides, unique

# --- graphs


def graph_fingerprint(graph: fx.GraphModule, embeds_weights: bool, embeds_below_bytes: int = EMBEDS_BELOW_BYTES) -> str:
    """SHA-256, in hex, of what an engine built from `graph` may depend on.

    Operators with their schemas, all arguments, dtypes, shapes and strides (symbols by their order of appearance, with
    their ranges), names, dtypes and shapes of attributes and which of them share memory; the values of all integer and
    boolean tensors and of floating-point and int8 ones under `embeds_below_bytes`; with `embeds_weights`, those of all tensors.
    Names of nodes do not count.
    """
    writer = _Writer(sys.maxsize if embeds_weights else embeds_below_bytes)
    writer.graph(graph)
    return writer.hexdigest()


def weights_fingerprint(graph: fx.GraphModule) -> str:
    """SHA-256, in hex, of the names, dtypes, shapes and values of all tensors that `graph` reads. Strides do not
    count."""
    tensors = {str(node.target): tensor for node, tensor in graphs.tensor_attributes(graph)}
    hashes = contents(list(tensors.values()))
    lines = [
        f"{name} {tensor.dtype} {list(tensor.shape)} {digest}"
        for (name, tensor), digest in sorted(zip(tensors.items(), hashes, strict=True), key=lambda item: item[0][0])
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensors_fingerprint(tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256, in hex, of the dtypes, shapes and values of `tensors`, in order; strides and devices do not count."""
    pairs = zip(tensors, contents(tensors), strict=True)
    lines = [f"{tensor.dtype} {list(tensor.shape)} {digest}" for tensor, digest in pairs]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Writer:
    """Collects the graph's canonical text."""

    def __init__(self, below_bytes: int) -> None:
        self.below_bytes = below_bytes
        self.lines: list[str] = []
        self.tensors: list[torch.Tensor] = []  # those whose values count, hashed together at the end
        self.symbols: dict[str, str] = {}
        self.memories: dict[Any, str] = {}

    def hexdigest(self) -> str:
        text = "\n".join([*self.lines, *contents(self.tensors)])
        return hashlib.sha256(text.encode()).hexdigest()

    def graph(self, module: fx.GraphModule) -> None:
        places: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            # the output's values are its arguments'; only a graph that torch.export has read back repeats them here
            value = None if node.op == "output" else graphs.val(node)
            # Strides inside follow from the inputs' and the operators; where sizes are dynamic they are expressions,
            # which come out otherwise simplified in a graph that was read back.
            shown = self._value(value, with_strides=node.op != "call_function")
            self.lines.append(f"{self._node(module, node, places)} -> {shown}")
            places[node] = len(places)
        self.lines.append("end")

    def _node(self, module: fx.GraphModule, node: fx.Node, places: dict[fx.Node, int]) -> str:
        if node.op == "placeholder":
            return "input"
        if node.op == "get_attr":
            return f"attribute {self._attribute(str(node.target), graphs.attribute(module, str(node.target)))}"
        bound = graphs.bound_arguments(node)
        if bound is None:
            arguments = [self._argument(a, places) for a in node.args]
            arguments += [f"{name}={self._argument(a, places)}" for name, a in sorted(node.kwargs.items())]
        else:
            arguments = [f"{name}={self._argument(a, places)}" for name, a in bound.items()]
        return f"{node.op} {_target(node.target)}({', '.join(arguments)})"

    def _attribute(self, name: str, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{name!r} {self._tensor(value)} {self._memory(value)}"
        if isinstance(value, fx.GraphModule):  # a branch or a loop's body
            self.lines.append(f"graph {name!r}")
            inner = _Writer(self.below_bytes)
            inner.symbols, inner.memories, inner.lines, inner.tensors = (
                self.symbols,
                self.memories,
                self.lines,
                self.tensors,
            )
            inner.graph(value)
            return f"{name!r} graph"
        return f"{name!r} {self._argument(value, {})}"

    def _tensor(self, tensor: torch.Tensor) -> str:
        # The text that describes a real tensor; its values are queued where they count.
        text = f"{tensor.dtype} {tensor.device} {list(tensor.shape)} {strides(tensor)}"
        # int8 is what quantised weights are: weights like floating-point ones
        exact = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.int8)
        if exact or tensor.numel() * tensor.element_size() < self.below_bytes:
            self.tensors.append(tensor)
            return f"{text} values {len(self.tensors)}"
        return text

    def _memory(self, tensor: torch.Tensor) -> str:
        # Attributes that share memory are told apart from copies: a write to one changes the other.
        if tensor.numel() == 0 or opaque(tensor):
            return "own"
        memory = self.memories.setdefault(
            (str(tensor.device), tensor.untyped_storage().data_ptr()), f"{len(self.memories)} {tensor.storage_offset()}"
        )
        number, first = memory.split()
        return f"memory {number} + {tensor.storage_offset() - int(first)}"

    def _value(self, value: Any, with_strides: bool = True) -> str:
        """A node's fake value: dtype, device, shape and strides, with symbols renamed."""
        if isinstance(value, torch.Tensor):
            shape = ", ".join(map(self._size, value.shape))
            if not with_strides and any(not isinstance(size, int) for size in value.shape):
                return f"{value.dtype} {value.device} [{shape}]"
            steps = ", ".join(map(self._size, value.stride())) if value.layout is torch.strided else str(value.layout)
            return f"{value.dtype} {value.device} [{shape}] [{steps}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self._value(v, with_strides) for v in value)})"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(value)
        return self._argument(value, {})

    def _size(self, size: Any) -> str:
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return repr(size)
        expression, ranges = size.node.expr, size.node.shape_env.var_to_range
        free = sorted(expression.free_symbols, key=str)
        for symbol in free:
            if str(symbol) not in self.symbols:
                bounds = ranges.get(symbol)
                self.symbols[str(symbol)] = f"n{len(self.symbols)}"
                # torch.export traces with sizes of 2 and more, and says so of the graph that it captured; of the same
                # graph read back from a file it says the declared minimum, which may be 1.
                low = bounds and ("2" if bounds.lower in (0, 1) else str(bounds.lower))
                self.lines.append(f"{self.symbols[str(symbol)]} in {bounds and (low, str(bounds.upper))}")
        renamed = expression.xreplace({s: _symbol(self.symbols[str(s)], s) for s in free})
        return f"{type(size).__name__} {renamed}"

    def _argument(self, value: Any, places: dict[fx.Node, int]) -> str:
        if isinstance(value, fx.Node):
            return f"%{places[value]}"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._size(value)
        if isinstance(value, torch.Tensor):
            return f"constant {self._tensor(value)}"
        if isinstance(value, dict):
            inner = (f"{self._argument(k, places)}: {self._argument(v, places)}" for k, v in value.items())
            return f"{{{', '.join(inner)}}}"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{_named(type(value))}({', '.join(self._argument(v, places) for v in value)})"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(self._argument(v, places) for v in value)}]"
        if isinstance(value, slice):
            return f"slice{self._argument((value.start, value.stop, value.step), places)}"
        return _plain(value)


def _symbol(name: str, like: Any) -> Any:
    import sympy

    return sympy.Symbol(
        name, **{k: v for k, v in like.assumptions0.items() if k in ("integer", "positive", "nonnegative")}
    )


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target} {target._schema}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher-order {target}"
    return target if isinstance(target, str) else _named(target)


def _named(value: Any) -> str:
    """A function or class by its name, if that finds it; else a fresh mark."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    found: Any = sys.modules.get(str(module))
    for part in str(name).split("."):
        found = getattr(found, part, None)
    return f"{module}.{name}" if found is value else unique(value)


def _plain(value: Any) -> str:
    if (
        value is None
        or value is Ellipsis
        or (isinstance(value, (bool, int, str, bytes)) and type(value).__module__ == "builtins")
    ):
        return repr(value)
    if isinstance(value, float):
        return "nan" if value != value else value.hex()
    if isinstance(value, complex):
        return f"{_plain(value.real)}+{_plain(value.imag)}j"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return f"{type(value).__name__} {value}"
    if isinstance(value, enum.Enum):
        return f"{_named(type(value))}.{value.name}"
    if isinstance(value, torch._ops.OpOverload) or inspect.isroutine(value) or isinstance(value, type):
        return _target(value)
    return unique(value)


# --- engines


def engine_key(
    graph: fx.GraphModule,
    backend: Backend,
    precision: Precision,
    onnx_passes: Sequence[OnnxPass],
    inputs: Sequence[torch.Tensor],
) -> str:
    """The name, 64 hex digits, of the cache entry for this build: all that the compiled engine may depend on.

    Beside the graph: the backend with its options and versions, the precision, the ONNX passes with their options, the
    example inputs' dtypes, shapes and devices, threads, global switches of PyTorch's arithmetic, the kind of
    processor, and accelkit's own code with that of the backend and the passes.
    """
    from accelkit import __version__

    lines = [
        f"accelkit {__version__} {_own_code()}",
        f"graph {graph_fingerprint(graph, backend.embeds_weights, backend.embeds_below_bytes)} {backend.embeds_weights}",
        f"backend {_made_by(backend)} {[(k, _stable(v)) for k, v in sorted(options_of(backend).items())]}",
        f"versions {sorted(backend.versions().items())}",
        f"precision {precision.name} {precision.dtype}",
        *(f"pass {_made_by(one)} {_stable(repr(one))}" for one in onnx_passes),
        *(f"input {t.dtype} {t.device} {list(t.shape)} {strides(t)}" for t in inputs),
        f"threads {torch.get_num_threads()}",
        f"arithmetic {_float32_products({t.device.type for t in inputs})} {torch.are_deterministic_algorithms_enabled()}",
        f"machine {_machine()} {[_gpu(t.device) for t in inputs]}",
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _float32_products(devices: set[str]) -> list[str]:
    """What float32 products are allowed to be on these kinds of device; settings of other devices change nothing there."""
    # by their new names: the old ones fail where a user has set the new ones
    cudnn: Any = torch.backends.cudnn
    owners: list[Any] = []
    if devices - {"cuda"}:
        owners.append(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    if "cuda" in devices:
        owners += [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    # "none", which a process starts with, and "ieee" are the same products
    return ["ieee" if owner.fp32_precision == "none" else owner.fp32_precision for owner in owners]


def _made_by(value: Any) -> str:
    # A plug-in's own version may stay the same while it is being written: its file counts as well.
    kind = type(value)
    source = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return f"{_named(kind)} {_files((source,)) if source else ''}"


def _stable(text: str) -> str:
    """A repr, unless it shows an address: that could be another object's in another process."""
    return unique(text) if " at 0x" in text else text


@lru_cache
def _own_code() -> str:
    folder = Path(__file__).parent
    return _files(tuple(sorted(str(p) for p in folder.rglob("*.py"))))


@lru_cache(maxsize=256)
def _files(paths: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if Path(path).is_file():  # not so inside a zip
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


@lru_cache
def _machine() -> str:
    """Operating system, instruction set and its extensions: a cache folder may be shared by different machines."""
    flags = ""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next(
                (" ".join(sorted(line.split())) for line in file if line.startswith(("flags", "Features"))), ""
            )
    parts = (platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability(), flags)
    return hashlib.sha256("|".join(parts).encode()).hexdigest()
