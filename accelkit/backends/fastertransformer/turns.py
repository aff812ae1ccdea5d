"""Calls that use the same static memory, one after another, whatever threads and streams they come from.

    turns = Turns(cuda_of(device));  turns.take(recording.run, inputs)     # never waits for the GPU

A call on another stream than the one before it waits for that one on the GPU, by an event that follows each call. The event
is recorded at once and not when somebody comes to wait for it: by then the stream may be gone, or be recording a
CUDA graph of its owner's, which the event would become a part of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

Place = tuple[int, int, int]
"""A stream as PyTorch's C functions give it: its id, the index and the type of its device."""


class Cuda(NamedTuple):
    """What is asked of CUDA at each call. PyTorch's Python functions around these cost several microseconds.

    Attributes:
        current: the caller's stream. stream: a stream by its place.
        event: which `record` records.
        record: records the event on a stream.
    """

    current: Callable[[], Place]
    stream: Callable[[Place], Any]
    event: Any
    record: Callable[[Any], object]


def cuda_of(device: torch.device) -> Cuda:
    """The GPU itself."""
    index, current, stream = device.index, torch._C._cuda_getCurrentStream, cast("Any", torch.cuda.Stream)
    event: Any = cast("Any", torch.cuda.Event)()
    return Cuda(
        current=lambda: current(index),
        stream=lambda place: stream(stream_id=place[0], device_index=place[1], device_type=place[2]),
        event=event,
        record=super(torch.cuda.Event, event).record,
    )


class Turns:
    """Whose turn it is."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._current, self._record = cuda.current, cuda.record
        self._lock = threading.Lock()
        self._place: Place | None = None  # of the latest call's stream
        self._stream: Any = None
        self._borrowed = False

    def take(self, run: Run, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`run(inputs)` without gradients, on the caller's stream, after all calls before it."""
        gradients = torch.is_grad_enabled()
        if gradients:  # what torch.no_grad() does, at a fifth of its time
            torch._C._set_grad_enabled(False)
        try:
            with self._lock:
                place = self._current()
                if place != self._place or self._borrowed:
                    self._enter(place)
                try:
                    return run(inputs)
                finally:  # also of a call that failed half-way: what it has enqueued runs
                    self._record(self._stream)
        finally:
            if gradients:
                torch._C._set_grad_enabled(True)

    def _enter(self, place: Place) -> None:
        stream = self._cuda.stream(place)
        if self._place is not None:
            stream.wait_event(self._cuda.event)
        self._place, self._stream = place, stream
        # The id of a stream that is not PyTorch's own is its address, an even number. Two such streams may have had the same
        # one after another, so they wait every time.
        self._borrowed = place[0] != 0 and place[0] % 2 == 0
