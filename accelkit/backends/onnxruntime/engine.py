"""A session on tensors in the CPU's memory: inputs are read from, and outputs are, the memory that they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accelkit.backend_api import Engine, EngineFacts
from accelkit.backends.onnxruntime.session import first_line
from accelkit.errors import InputError, LoweringError

BLOB = "model.onnx"


class OnnxRuntimeEngine(Engine):
    """A session on torch tensors."""

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
                raise empty_input(name, tensor)
            if tensor.requires_grad:
                tensor = tensor.detach()
            feed[name] = tensor.numpy() if tensor.is_contiguous() else tensor.contiguous().numpy()
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:
            raise failed(error) from error
        return [torch.from_numpy(result) for result in results]

    def serialize(self) -> dict[str, bytes]:
        return {BLOB: self._data}

    def describe(self) -> EngineFacts:
        return self._facts


def empty_input(name: str, tensor: torch.Tensor) -> InputError:
    return InputError(f"input {name} is empty ({list(tensor.shape)}); ONNX Runtime takes sizes from 1")


def failed(error: BaseException) -> LoweringError:
    return LoweringError(f"ONNX Runtime failed at run time: {first_line(error)}")
