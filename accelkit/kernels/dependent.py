"""Programmatic dependent launch: a kernel starts while the one before it still ends (compute capability 9.0 and later).

    launched early  ->  barriers, descriptors, constants  ->  wait  ->  let the next one start  ->  everything else

Between two kernels of a stream lie the first one's last blocks, a launch, and the second one's set-up. With it the second
one's blocks come onto multiprocessors that the first has left, set up there, and wait (`griddepcontrol.wait`) until the first has
ended and its results can be read. A CUDA graph keeps such an edge between two kernels as it was captured.

Nothing that a stream guarantees is lost as long as each kernel that is launched so keeps four rules:

1. Every block waits, on every path to its end. So a kernel has not ended before the one before it has, and waiting for the
   last kernel is waiting for all: what a kernel two launches ago wrote, and memory that the allocator has handed on.
2. Until it has waited, a thread writes no global memory, and reads none but constants.
3. It lets the next kernel start (`griddepcontrol.launch_dependents`) only after it has waited. A kernel that has started but
   not yet waited then runs beside one other at most, the one before it.
4. A constant is what the caller of a kernel has declared as one (`constants`): not written between the first kernel and the last
   of what it records. Rule 3 would allow all that the kernel directly before does not write, but a kernel cannot know that.

Kernels of cuBLAS and PyTorch in between are launched as ever, after all before them has ended; they let the next one start
by ending. docs/decisions/0012-programmatic-dependent-launch.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from accelkit.kernels import dependent_launch_on

BY_DEFAULT = frozenset({"attention", "norm", "split", "tiles"})
"""Kernels that are launched so unless `launches` says otherwise."""

_asked: ContextVar[bool | None] = ContextVar("accelkit dependent launches", default=None)
_constants: ContextVar[frozenset[int]] = ContextVar("accelkit constants", default=frozenset())


@contextmanager
def launches(on: bool) -> Iterator[None]:
    """Inside, all kernels that can are launched so, or none: for measuring one against the other."""
    token = _asked.set(on)
    try:
        yield
    finally:
        _asked.reset(token)


def dependent(kernel: str, tensor: Tensor) -> bool:
    """Whether a kernel is launched so on the device of a tensor."""
    asked = _asked.get()
    return (kernel in BY_DEFAULT if asked is None else asked) and dependent_launch_on(tensor.device)


def allowed(configured: bool) -> bool:
    """Whether a configuration that says so is launched so: it is, unless `launches(False)`."""
    return configured and _asked.get() is not False


def options(pdl: bool) -> dict[str, Any]:
    """What a launch takes beside the kernel's own `PDL`; nothing where it is off, for backends without the option."""
    return {"launch_pdl": True} if pdl else {}


@contextmanager
def constants(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, kernels may read these tensors' memory before the kernels before them have ended.

    They must have been written before the first kernel inside is enqueued, and nothing inside may write them. Around
    kernels that are recorded in a CUDA graph that holds for each replay too, since a replay as a whole waits for what was
    enqueued before it.
    """
    token = _constants.set(frozenset(_memory(t) for t in tensors if t.is_cuda))
    try:
        yield
    finally:
        _constants.reset(token)


def is_constant(tensor: Tensor) -> bool:
    """Whether the tensor, or what it is a view of, was declared a constant."""
    known = _constants.get()
    return bool(known) and _memory(tensor) in known


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
