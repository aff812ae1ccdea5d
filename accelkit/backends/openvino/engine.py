"""A compiled model on torch tensors: inputs are read where they lie, results are written into memory of torch's.

Calls from several threads take an infer request each, from a pool that grows as needed; OpenVINO runs as many of them at
once as it has streams. A result whose shape only the run tells is memory of OpenVINO's, which lives as long as the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from accelkit.backend_api import Engine, EngineFacts
from accelkit.backends.openvino.model import as_ov, ov_type, reason
from accelkit.errors import InputError, LoweringError

BLOB = "model.onnx"


class Result(NamedTuple):
    """A result of an engine; `shape` has 0 for each size that only a run tells, and is not `static` then."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    static: bool


class OpenVinoEngine(Engine):
    """An ov.CompiledModel.

    Args:
        compiled: the model; inputs that nothing reads are not in it.
        names: of the graph's inputs, in order.
        data: the ONNX model that it was made from, without its weights.
        shared: tensors whose memory it reads; they live as long as the engine.
        results: what each is.
        facts: what `describe` gives.
        dynamic: whether a size of the inputs varies.
    """

    def __init__(
        self, compiled: Any, data: bytes, names: Sequence[str], shared: Sequence[torch.Tensor],
        results: Sequence[Result], facts: EngineFacts, dynamic: bool,
    ) -> None:  # fmt: skip
        self._compiled, self._data, self._shared, self._facts = compiled, data, shared, facts
        self._dynamic, self._results = dynamic, tuple(results)
        self._names = tuple(names)
        ports = {name: index for index, port in enumerate(compiled.inputs) for name in port.names}
        self._ports = [ports.get(name) for name in names]
        self._requests: deque[Any] = deque()

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Raises InputError for an empty tensor in a dynamic graph (ONNX operators read a size of 0 in several
        ways)."""
        given = [tensor.detach().contiguous() for tensor in inputs]  # OpenVINO keeps no memory alive
        if self._dynamic:
            for name, tensor in zip(self._names, given, strict=True):
                if not tensor.numel():
                    raise InputError(f"input {name} is empty ({list(tensor.shape)}); OpenVINO takes sizes from 1")
        results = [_memory_for(result) for result in self._results]
        try:
            request = self._requests.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            for port, tensor in zip(self._ports, given, strict=True):
                if port is not None:
                    request.set_input_tensor(port, as_ov(tensor))
            for index, (_, memory) in enumerate(results):
                request.set_output_tensor(index, memory)
            request.infer()
        except RuntimeError as error:
            raise LoweringError(f"OpenVINO failed at run time: {reason(error)}") from error
        finally:
            self._requests.append(request)
        return [
            _as_torch(memory, result.dtype) if own is None else own
            for result, (own, memory) in zip(self._results, results, strict=True)
        ]

    def serialize(self) -> dict[str, bytes]:
        return {BLOB: self._data}

    def describe(self) -> EngineFacts:
        return self._facts


def _memory_for(result: Result) -> tuple[torch.Tensor | None, Any]:
    """A new tensor and OpenVINO's view of it; of an unknown shape, OpenVINO's own that it makes as large as it needs."""
    import openvino

    if not result.static:
        return None, openvino.Tensor(ov_type(result.dtype), openvino.Shape(result.shape))
    own = torch.empty(result.shape, dtype=result.dtype)
    return own, as_ov(own)


def _as_torch(memory: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over OpenVINO's memory, which it keeps alive."""
    values = memory.data
    if dtype is torch.bfloat16:  # numpy's stand-in for it is float16's bits
        return torch.from_numpy(values.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(values)
