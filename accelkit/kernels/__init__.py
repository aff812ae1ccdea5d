"""Triton kernels of the fused operators; what each computes is written down, in plain PyTorch, in `accelkit.ops`.

Every module here imports Triton when it is imported, so import them in the function that launches a kernel. A kernel's
configuration is a plain tuple: `candidates(...)` lists those worth measuring, `default(...)` picks one by rule; nothing
is tuned inside a call.
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the tensor's GPU: Triton launches on the current one, whatever the arguments' is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def dense_last(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it where its last dimension does not lie densely."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dependent_launch(tensor: Tensor) -> bool:
    """Whether a kernel's launch can overlap with the end of the one before it on this tensor's device (Hopper and later)."""
    return dependent_launch_on(tensor.device)


@functools.cache
def dependent_launch_on(device: torch.device) -> bool:
    """The same of a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
