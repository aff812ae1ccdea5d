"""The example's shapes as one CUDA graph.

    call -> copy into static inputs -> replay -> copy out of static results

Launching a plan's kernels one by one costs the host more than small models take on the GPU. The static memory is used by one
call at a time; a call on another stream waits for it on the GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelkit.backends.fastertransformer.recording import Recorder, Recording, call_ms
from accelkit.backends.tensorrt.contexts import Shapes
from accelkit.backends.tensorrt.streams import Streams

WARMUP = 2
ALWAYS_BELOW_MS = 0.1
"""A replay this short is not measured against launching: the difference is in the noise, and the launches cost the host."""
GAIN = 0.98


class Replay:
    """A recording and the shapes and dtypes that it is for."""

    def __init__(self, recording: Recording, streams: Streams, scratch: torch.Tensor) -> None:
        self._recording, self._streams, self._scratch = recording, streams, scratch
        self.shapes: Shapes = tuple(t.shape for t in recording.inputs)
        self._dtypes = [t.dtype for t in recording.inputs]
        self._lock = threading.Lock()
        self._stream: int | None = None
        self._done = streams.new_event()

    def fits(self, inputs: Sequence[torch.Tensor]) -> bool:
        return [t.shape for t in inputs] == list(self.shapes) and [t.dtype for t in inputs] == self._dtypes

    def __call__(self, inputs: Sequence[torch.Tensor], stream: int) -> Sequence[torch.Tensor]:
        with self._lock, torch.no_grad():
            if stream != self._stream:
                if self._stream is not None:
                    self._streams.wait(self._done)
                self._streams.share(self._scratch)
                self._stream = stream
            results = self._recording.run(inputs)
            self._streams.mark(self._done)
        return results


def recorded(
    forward: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    streams: Streams,
    scratch: torch.Tensor,
) -> tuple[Replay | None, str]:
    """A recording of `forward` on the example where that pays, and a sentence for the report.

    `forward` runs in `scratch`, which nothing else uses.
    """
    from accelkit.backends.fastertransformer.obstacles import NotRecordable

    device: Any = streams.device
    try:
        recorder = Recorder(device)
        replay = Replay(recorder.record(forward, inputs, WARMUP), streams, scratch)
    except (NotRecordable, torch.OutOfMemoryError) as error:
        return None, f"no CUDA graph: {error}"
    stream = streams.current()
    replay_ms = call_ms(lambda: replay(inputs, stream), device)
    if replay_ms > ALWAYS_BELOW_MS:
        plain_ms = call_ms(lambda: forward(*inputs), device)
        if replay_ms > GAIN * plain_ms:
            return None, f"no CUDA graph: {plain_ms:.3f} ms without against {replay_ms:.3f} ms with it"
    memory = recorder.memory_bytes() / 2**20
    return replay, f"the example's shapes run as one CUDA graph ({memory:.0f} MiB of static memory)"
