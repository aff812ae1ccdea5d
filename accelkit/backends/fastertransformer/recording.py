"""One forward in a CUDA graph: recorded once, replayed at each call.

    forward(*inputs)  ->  copy into static inputs, replay, copy out of static outputs or compute the results from them

All static memory (inputs, activations, outputs, cuBLAS's workspace) is in one pool that the recordings of an engine share:
they never run at the same time, and PyTorch's allocator reuses activations within each and between them. When the engine
goes, the pool goes back to the driver, which waits for what still runs.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accelkit.backends.fastertransformer.obstacles import NotRecordable, Watch
from accelkit.kernels import dependent

Forward = Callable[..., Sequence[Tensor]]

_ONE_AT_A_TIME = threading.Lock()  # PyTorch records one CUDA graph at a time in a process


@dataclass(frozen=True)
class Recording:
    """A recorded forward.

    Attributes:
        inputs, outputs: the addresses that the recording reads and writes.
        replay: enqueues the recorded kernels on the current stream.
        end: what computes the results from the outputs, in memory of their own; None where the outputs are the results.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    end: Callable[..., Sequence[Tensor]] | None = None

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The forward of `inputs`, whose shapes are the recorded ones; results in fresh memory."""
        _copy(self.inputs, inputs)
        self.replay()
        if self.end is not None:
            return self.end(*self.outputs)
        if len(self.outputs) == 1:
            return (self.outputs[0].clone(),)
        fresh = tuple(torch.empty_like(o) for o in self.outputs)
        _copy(fresh, self.outputs)
        return fresh

    def run_padded(self, inputs: Sequence[Tensor], batched: Sequence[bool], rows: int) -> tuple[Tensor, ...]:
        """The same for the first `rows` rows of those inputs that are `batched`; the other rows hold anything."""
        static = [s[:rows] if b else s for s, b in zip(self.inputs, batched, strict=True)]
        _copy(static, inputs)
        self.replay()
        if self.end is not None:
            return tuple(result[:rows] for result in self.end(*self.outputs))
        return tuple(o[:rows].clone() for o in self.outputs)


def call_ms(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Milliseconds of a call on the GPU, the fastest of a few; waits for them, so only while an engine is made."""
    new_event: Any = torch.cuda.Event
    times = []
    with torch.cuda.device(device):
        for _ in range(repeats):
            begin, end = new_event(enable_timing=True), new_event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)))
    return min(times)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if len(targets) == 1:
        targets[0].copy_(sources[0])
    elif targets:
        torch._foreach_copy_(list(targets), list(sources))


class Recorder:
    """Makes the recordings of one engine: its memory pool and its stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(
        self, forward: Forward, inputs: Sequence[Tensor], warmup: int, constants: Iterable[Tensor] = ()
    ) -> Recording:
        """Run `forward` on the examples `inputs`, then record it.

        Args:
            constants: what the forward reads and never writes, its weights: kernels may read it before the kernels before
                them have ended (`accelkit.kernels.dependent`).

        Raises:
            NotRecordable: the forward waits for the GPU, or PyTorch refuses to record it.
            torch.OutOfMemoryError: nothing of the attempt stays allocated.
        """
        with (
            _ONE_AT_A_TIME,
            torch.cuda.device(self._device),
            torch.inference_mode(False),
            torch.no_grad(),
            dependent.constants(constants),
        ):
            caller = torch.cuda.current_stream()
            graph = torch.cuda.CUDAGraph()
            static: tuple[Tensor, ...] = ()
            try:
                self._warm_up(forward, inputs, warmup)
                with (
                    _own_cublas_workspace(),
                    torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
                ):
                    static = tuple(torch.empty_like(i) for i in inputs)
                    outputs = tuple(forward(*static))
            except BaseException as error:  # an interrupt too must leave PyTorch as it was
                static = ()
                torch.cuda.set_stream(caller)  # PyTorch leaves its own where it fails to end the recording
                failure = _said_shortly(error)
                self._clean_up(graph)
                if not isinstance(error, Exception):
                    raise
                raise failure from None
            _copy(static, inputs)  # rows that no call has filled yet hold valid values
            return Recording(static, outputs, graph.replay)

    def memory_bytes(self) -> int:
        """Bytes of GPU memory that the recordings hold."""
        pool = tuple(self._pool)
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(int(s["total_size"]) for s in segments if tuple(s["segment_pool_id"]) == pool)

    def _warm_up(self, forward: Forward, inputs: Sequence[Tensor], runs: int) -> None:
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            with Watch():  # type: ignore[no-untyped-call]
                forward(*inputs)
            for _ in range(runs - 1):
                forward(*inputs)
        caller.wait_stream(self._stream)

    def _clean_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Bring PyTorch back to where it was: where it cannot end a recording, it goes on reserving memory for it."""
        torch.cuda.synchronize()
        graph.reset()
        if _stop_reserving(self._device.index, self._pool):
            torch._C._cuda_releasePool(self._device.index, self._pool)
        torch._C._cuda_clearCublasWorkspaces()  # the runs before it left one, for a stream that nothing runs on any more
        torch.cuda.empty_cache()
        _end_counting(self._device)


def _stop_reserving(index: int, pool: Any) -> bool:
    try:
        torch._C._cuda_endAllocateToPool(index, pool)
    except RuntimeError:  # the recording was ended properly, or had never begun
        return False
    return True


def _end_counting(device: torch.device) -> None:
    """Random numbers that a recording draws are counted; a recording that was never ended would leave none to others."""
    generator = torch.cuda.default_generators[device.index]
    before = generator.get_state()
    try:
        torch.rand(1, device=device)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
    else:
        generator.set_state(before)


@contextmanager
def _own_cublas_workspace() -> Iterator[None]:
    # cuBLAS keeps a workspace for each stream. One made before would be used by the recording and freed by whoever clears
    # it next (torch.compile's CUDA graphs do); so the recording makes its own in its pool, and nobody else keeps it.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _said_shortly(error: BaseException) -> Exception:
    """The error without its traceback, whose frames hold activations; NotRecordable where it is not about memory."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for one in chain:
        traceback.clear_frames(one.__traceback__)
    memory = next((e for e in chain if isinstance(e, torch.OutOfMemoryError)), None)
    # what fails while a recording ends says less than what made it fail
    told = memory or next((e for e in chain if isinstance(e, NotRecordable)), chain[-1])
    text = (str(told).strip().splitlines() or [type(told).__name__])[0]
    return torch.OutOfMemoryError(text) if memory else NotRecordable(text)
