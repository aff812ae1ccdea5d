"""The CUDA streams of one GPU, as the numbers that TensorRT takes: all that the engine asks of CUDA beside memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


class Streams:
    """Streams of `device`, whose index is known.

    Attributes:
        device, index: the GPU, and its number.
        current: gives the number of the caller's stream on it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.index = device, device.index
        self.current: Callable[[], int] = functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
        self.capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing
        self.device_now: Callable[[], int] = torch._C._cuda_getDevice

    def on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def new_event(self) -> Any:
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self, event: Any) -> None:
        """`event` happens when all that was enqueued on the caller's stream so far is done."""
        event.record(torch.cuda.current_stream(self.device))

    def wait(self, event: Any) -> None:
        """What is enqueued on the caller's stream from now on waits for `event`; the host does not."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def share(self, tensor: torch.Tensor) -> None:
        """The caller's stream uses the tensor's memory too: it is not given to others before that is done."""
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()
