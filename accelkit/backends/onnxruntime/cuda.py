"""A session on tensors in a GPU's memory: no copies, the caller's stream, and a CUDA graph where asked for.

    caller's stream --event--> session's stream: run --event--> caller's stream

ONNX Runtime takes one stream for the life of a session (`user_compute_stream`; the default stream cannot be named), so a
session has its own, which waits for the caller's, and the caller's for it; the host waits for neither. Inputs are bound at
the address that they lie at, outputs are allocated by PyTorch and bound too. With `cuda_graph`, the shapes of the example
are captured once; static copies of the inputs and outputs stand between the graph and the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.dlpack import from_dlpack

from accelkit import graph as graphs
from accelkit.backend_api import EngineFacts
from accelkit.backends.onnxruntime.engine import OnnxRuntimeEngine, empty_input, failed

ELEMENT_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
"""ONNX's numbers for types."""
Shape = tuple[int, ...]


class CudaEngine(OnnxRuntimeEngine):
    """A session of the CUDA provider."""

    def __init__(
        self, session: Any, data: bytes, facts: EngineFacts, dynamic: bool, graph: fx.GraphModule, stream: Any,
        captured: Sequence[torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        """`stream`: the session's. `captured`: an example whose shapes are captured as a CUDA graph; None: no graph."""
        super().__init__(session, data, facts, dynamic)
        self._stream = stream
        self._results = [graphs.val(node) for node in results_of(graph)]
        self._on_host = any(value.device.type == "cpu" for value in self._results)
        self._shapes = output_shapes(graph)
        self._bindings = threading.local()
        self._options = _run_options(graph_id=-1 if captured is not None else None)
        self._captured = _CapturedRun(self, captured) if captured is not None else None

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        inputs = tuple([t.detach() if t.requires_grad else t for t in inputs])
        if self._dynamic:
            for name, tensor in zip(self._inputs, inputs, strict=True):
                if not tensor.numel():
                    raise empty_input(name, tensor)
        caller = torch.cuda.current_stream(self._stream.device)
        if self._captured is not None and self._captured.fits(inputs):
            return self._captured(inputs, caller)
        results = self._run(tuple([t if t.is_contiguous() else t.contiguous() for t in inputs]), caller)
        if self._on_host:
            caller.synchronize()
        return results

    def _run(self, inputs: Sequence[torch.Tensor], caller: Any) -> Sequence[torch.Tensor]:
        shapes = self._shapes([tuple(t.shape) for t in inputs])
        # Allocated on the caller's stream, written on the session's, which the caller's then waits for.
        results: Sequence[torch.Tensor | None] = [
            None if shape is None else torch.empty(shape, dtype=value.dtype, device=value.device)
            for shape, value in zip(shapes, self._results, strict=True)
        ]
        self._stream.wait_stream(caller)
        binding = self.bound(self._binding(), inputs, results)
        self.run(binding, self._options)
        if None in shapes:
            results = self._allocated(binding, results, caller)
        caller.wait_stream(self._stream)
        return results  # type: ignore[return-value]

    def _binding(self) -> Any:
        if not hasattr(self._bindings, "one"):  # each thread's own
            self._bindings.one = self._session.io_binding()
        return self._bindings.one

    def bound(self, binding: Any, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor | None]) -> Any:
        """`binding` with the tensors' addresses; a result that is None is allocated by ONNX Runtime."""
        for name, tensor in zip(self._inputs, inputs, strict=True):
            binding.bind_input(
                name, *_device(tensor), ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr()
            )
        for name, value, result in zip(self._outputs, self._results, results, strict=True):
            if result is None:
                binding.bind_output(name, *_device(value))
                continue
            kind, shape = ELEMENT_TYPES[result.dtype], list(result.shape)
            binding.bind_output(name, *_device(result), kind, shape, result.data_ptr())
        return binding

    def run(self, binding: Any, options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:
            raise failed(error) from error

    def _allocated(self, binding: Any, results: Sequence[torch.Tensor | None], caller: Any) -> list[torch.Tensor]:
        """The results, with those of ONNX Runtime's memory copied: it may reuse that in the next run."""
        found = []
        with torch.cuda.stream(self._stream):
            for value, tensor, given in zip(self._results, results, binding.get_outputs(), strict=True):
                if tensor is not None:
                    found.append(tensor)
                    continue
                own = from_dlpack(given)
                copy = (own.view(value.dtype) if own.dtype != value.dtype else own).clone()
                if copy.is_cuda:
                    copy.record_stream(caller)
                found.append(copy)
        return found


class _CapturedRun:
    """The CUDA graph of one set of shapes; ONNX Runtime captures it in the second run."""

    def __init__(self, engine: CudaEngine, example: Sequence[torch.Tensor]) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._shapes = [tuple(t.shape) for t in example]
        caller = torch.cuda.current_stream(engine._stream.device)
        engine._stream.wait_stream(caller)
        with torch.cuda.stream(engine._stream):
            self._inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in example]
            shapes = engine._shapes(self._shapes)
            self._outputs = [
                torch.empty(shape, dtype=value.dtype, device=value.device)  # type: ignore[arg-type]
                for shape, value in zip(shapes, engine._results, strict=True)
            ]
        self._binding = engine.bound(engine._session.io_binding(), self._inputs, self._outputs)
        self._options = _run_options(graph_id=1)
        for _ in range(2):
            engine.run(self._binding, self._options)
        caller.wait_stream(engine._stream)

    def fits(self, inputs: Sequence[torch.Tensor]) -> bool:
        return [tuple(t.shape) for t in inputs] == self._shapes

    def __call__(self, inputs: Sequence[torch.Tensor], caller: Any) -> list[torch.Tensor]:
        stream = self._engine._stream
        with self._lock, torch.cuda.stream(stream):
            stream.wait_stream(caller)
            for static, given in zip(self._inputs, inputs, strict=True):
                static.copy_(given, non_blocking=True)
            self._engine.run(self._binding, self._options)
            results = [static.clone() for static in self._outputs]
        for result in results:
            result.record_stream(caller)
        caller.wait_stream(stream)
        return results


def why_not_captured(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> str | None:
    """Why a CUDA graph cannot stand for this graph on these inputs, or None."""
    tensors = [*inputs, *(graphs.val(node) for node in results_of(graph))]
    if any(not t.is_cuda for t in tensors):
        return "an input or a result is in the CPU's memory"
    if None in output_shapes(graph)([tuple(t.shape) for t in inputs]):
        return "the size of a result depends on the data"
    return None


def results_of(graph: fx.GraphModule) -> list[fx.Node]:
    (returned,) = graph.graph.output_node().args
    return list(returned)  # type: ignore[arg-type]


def output_shapes(graph: fx.GraphModule) -> Callable[[Sequence[Shape]], list[Shape | None]]:
    """From the inputs' shapes to the outputs'; None for one that depends on the data."""
    places: dict[Any, tuple[int, int]] = {}
    for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        for d, size in enumerate(graphs.val(node).shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                places.setdefault(size.node.expr, (i, d))
    wanted = [tuple(graphs.val(node).shape) for node in results_of(graph)]
    known: dict[tuple[Shape, ...], list[Shape | None]] = {}

    def size_of(size: Any, shapes: Sequence[Shape]) -> int | None:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if not expression.free_symbols <= places.keys():
            return None
        return int(expression.subs({s: shapes[i][d] for s, (i, d) in places.items()}))

    def of(shapes: Sequence[Shape]) -> list[Shape | None]:
        key = tuple(shapes)
        if key not in known:
            found = [tuple(size_of(size, shapes) for size in shape) for shape in wanted]
            if len(known) > 1000:  # endlessly many shapes must not fill the memory
                known.clear()
            known[key] = [None if None in shape else shape for shape in found]  # type: ignore[misc]
        return known[key]

    return of


def _device(tensor: torch.Tensor) -> tuple[str, int]:
    return tensor.device.type, tensor.device.index or 0


def _run_options(graph_id: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if graph_id is not None:  # -1: this run is not captured
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
