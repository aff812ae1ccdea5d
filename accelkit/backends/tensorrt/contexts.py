"""Execution contexts: what a call runs in. One call at a time in each, in memory of its own.

    tensors, shapes, stream --Context.enqueue--> results, while the GPU still computes
    ContextPool.take(stream, shapes) -> the idle context that is cheapest to use here; ContextPool.give(context)

A context is idle for the host as soon as its call is enqueued, while its scratch memory is still in use on the stream. On the
same stream the next call comes after it by itself; on another the stream waits for the context's event, the host never.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accelkit.backends.tensorrt import versions
from accelkit.backends.tensorrt.runtime import log_of, said
from accelkit.backends.tensorrt.streams import Streams
from accelkit.errors import InputError, LoweringError

Shapes = tuple[torch.Size, ...]
ALIGNMENT = (
    256  # of addresses that TensorRT reads and writes (ICudaEngine's documentation); PyTorch's own memory is at 512
)


@dataclass(frozen=True)
class Binding:
    """An input or result of the network: its name and the dtype that the engine has for it."""

    name: str
    dtype: torch.dtype


class Context:
    """One execution context with its scratch memory.

    Attributes:
        scratch: its activations' memory.
        shapes: of the inputs of the last call; None before the first.
        stream: the number of the stream that it last ran on; None before the first call.
        done: an event at the end of the last call.
    """

    def __init__(
        self, tensorrt: Any, engine: Any, inputs: Sequence[Binding], outputs: Sequence[Binding], streams: Streams
    ) -> None:
        """Raises LoweringError where the GPU has no memory for it."""
        self._log, self._streams, self._device = log_of(tensorrt), streams, streams.device
        size_bytes = versions.device_memory_bytes(engine)
        try:
            self.scratch = torch.empty(max(size_bytes, 1), dtype=torch.uint8, device=streams.device)
        except torch.OutOfMemoryError as error:
            raise LoweringError(_no_memory(size_bytes)) from error
        self._log.clear()
        context = versions.context_without_memory(tensorrt, engine)
        if context is None:  # the library allocates a little by itself, and PyTorch may hold on to all there is
            streams.empty_cache()
            context = versions.context_without_memory(tensorrt, engine)
        if context is None:
            raise LoweringError(_no_memory(size_bytes) + said(self._log))
        versions.set_context_memory(context, self.scratch.data_ptr(), size_bytes)
        self.context = context
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._set_address, self._execute = context.set_tensor_address, context.execute_async_v3
        self._results: tuple[tuple[str, list[int], torch.dtype], ...] = ()
        self._addresses: dict[str, int] = {}
        self.shapes: Shapes | None = None
        self.stream: int | None = None
        self.done = streams.new_event()

    def enqueue(self, tensors: Sequence[torch.Tensor], shapes: Shapes, stream: int) -> list[torch.Tensor]:
        """The results for contiguous, aligned tensors of the engine's dtypes; the stream is the caller's.

        Raises:
            InputError: the engine does not cover these shapes.
            LoweringError: the library failed to enqueue.
        """
        if shapes != self.shapes:
            self._reshape(shapes)
        addresses, set_address = self._addresses, self._set_address
        for binding, tensor in zip(self._inputs, tensors, strict=True):
            address = tensor.data_ptr()
            if addresses.get(binding.name) != address:
                set_address(binding.name, address)
                addresses[binding.name] = address
        results = []
        for name, shape, dtype in self._results:
            result = torch.empty(shape, dtype=dtype, device=self._device)
            address = result.data_ptr()
            if addresses.get(name) != address:
                set_address(name, address)
                addresses[name] = address
            results.append(result)
        if not self._execute(stream):
            raise LoweringError(f"TensorRT failed to run the engine{said(self._log)}")
        return results

    def enter(self, stream: int) -> None:
        """Get ready to run on the caller's stream: after what still runs elsewhere, in memory that this stream may use."""
        if stream == self.stream:
            return
        if self.stream is not None:
            self._streams.wait(self.done)
        self._streams.share(self.scratch)
        self.stream = stream

    def _reshape(self, shapes: Shapes) -> None:
        for binding, shape in zip(self._inputs, shapes, strict=True):
            if 0 in shape:
                raise InputError(f"input {binding.name} is empty ({list(shape)}); TensorRT takes sizes from 1")
        self.shapes = None
        context = self.context
        self._log.clear()
        for binding, shape in zip(self._inputs, shapes, strict=True):
            if not context.set_input_shape(binding.name, tuple(shape)):
                raise InputError(f"the engine does not cover {binding.name} of shape {list(shape)}{said(self._log)}")
        results = []
        for binding in self._outputs:
            sizes = [int(size) for size in context.get_tensor_shape(binding.name)]
            if min(sizes, default=1) < 0:
                raise LoweringError(f"the size of the result {binding.name} depends on the data; TensorRT has {sizes}")
            results.append((binding.name, sizes, binding.dtype))
        self._results, self.shapes = tuple(results), shapes


class ContextPool:
    """Up to `limit` contexts, made when they are first needed."""

    def __init__(
        self,
        tensorrt: Any,
        engine: Any,
        inputs: Sequence[Binding],
        outputs: Sequence[Binding],
        streams: Streams,
        limit: int,
    ) -> None:
        self._arguments = (tensorrt, engine, inputs, outputs, streams)
        self._limit, self._made = limit, 0
        self._idle: list[Context] = []
        self._changed = threading.Condition(threading.Lock())
        self.context_bytes = versions.device_memory_bytes(engine)

    @property
    def made(self) -> int:
        """Contexts so far."""
        return self._made

    def take(self, stream: int, shapes: Shapes) -> Context:
        """A context for a call of these shapes on this stream; waits for one where all are being used."""
        with self._changed:
            while not self._idle:
                if self._made < self._limit:
                    self._made += 1
                    break
                self._changed.wait()
            else:
                found = self._cheapest(stream, shapes)
                if found is not None:
                    self._idle.remove(found)
                    return found
                self._made += 1  # all idle ones still run on other streams: this call need not wait for them
        try:
            return Context(*self._arguments)
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify()
            raise

    def give(self, context: Context) -> None:
        with self._changed:
            self._idle.append(context)
            self._changed.notify()

    def take_warm(self, shapes: Shapes) -> Context | None:
        """An idle context that has run these shapes, for good: it belongs to the CUDA graph that is being captured."""
        with self._changed:
            found = next((c for c in self._idle if c.shapes == shapes), None)
            if found is not None:
                self._idle.remove(found)
                self._made -= 1
            return found

    def _cheapest(self, stream: int, shapes: Shapes) -> Context | None:
        """An idle one that need not wait, else, where there may be no more, any; None: make another."""
        here = [c for c in self._idle if c.stream == stream]
        free = here or [c for c in self._idle if c.done.query()]
        if not free and self._made < self._limit:
            return None
        candidates = free or self._idle
        return next((c for c in candidates if c.shapes == shapes), candidates[-1])


def _no_memory(size_bytes: int) -> str:
    return (
        f"the GPU has no memory for another execution context ({size_bytes / 2**20:.0f} MiB of activations): free some, lower "
        "TensorRT(contexts=...), or build for smaller shapes"
    )
