"""The engine: recorded shapes are replayed, others run the same graph without a recording.

shapes recorded     copy in, replay, copy out
batch in between    the next larger recording, where rows are independent (accelkit.rowwise) and it measured faster
any other shapes    the graph's operators, one after another
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from accelkit import graph as graphs
from accelkit.backend_api import CompileContext, Engine, EngineFacts
from accelkit.backends.eager import own_memory, shared_outputs
from accelkit.backends.fastertransformer import facts
from accelkit.backends.fastertransformer.batches import Padding, examples_of, shapes_of
from accelkit.backends.fastertransformer.choice import choose
from accelkit.backends.fastertransformer.obstacles import NotRecordable, why_not_recordable
from accelkit.backends.fastertransformer.prepare import prepare
from accelkit.backends.fastertransformer.record_ends import EndsRecorder
from accelkit.backends.fastertransformer.recording import Recorder, Recording, call_ms
from accelkit.backends.fastertransformer.turns import Run, Turns, cuda_of
from accelkit.batch import Shapes, batch_of
from accelkit.errors import InputError
from accelkit.ops import operator_of
from accelkit.tf32 import tensor_core_products

if TYPE_CHECKING:
    from accelkit.backends.fastertransformer import FasterTransformer


@dataclass(frozen=True, eq=False)  # so that counting one takes no time
class Way:
    """How a call ran (`replayed`, `padded`, `not recorded`), and the shapes of the recording that ran."""

    how: str
    shapes: Shapes | None = None

    def __str__(self) -> str:
        words = {"replayed": "replayed ", "padded": "padded to "}
        return self.how if self.shapes is None else words[self.how] + _shown(self.shapes)


class Replay(NamedTuple):
    """What calls of one recording do, and what they count as."""

    run: Run
    way: Way


_NOT_RECORDED = Way("not recorded")

_LAUNCHES_MS = 0.3
"""A replay faster than this cannot lose: launching a layer's kernels one by one takes about as long."""


class FasterTransformerEngine(Engine):
    """A graph of fused operators and its recordings."""

    def __init__(
        self, backend: FasterTransformer, graph: fx.GraphModule, inputs: Sequence[Tensor], context: CompileContext
    ) -> None:
        self._backend = backend
        self._devices = tuple(i.device for i in inputs)
        self._device = next((d for d in self._devices if d.type == "cuda"), torch.device("cpu"))
        self._tf32 = context.precision.name == "tf32" and self._device.type == "cuda"
        prepared = prepare(graph, inputs, context)
        examples = graphs.laid_out(prepared)([i.detach() for i in inputs])
        self._tuned = self._tune(prepared, examples, context) if backend.tune else ()
        self._attention = self._choose_attention(prepared, examples, context)
        context.progress("choosing kernels")
        self._choice = choose(
            prepared, examples, backend.warmup, self._device, self._arithmetic, backend.fold_layer_norms, context.precision
        )  # fmt: skip
        self._graph = self._choice.graph
        self._weight_bytes = _own_bytes(self._graph, graph)
        self._forward = self._graph.forward
        self._laid_out = graphs.laid_out(self._graph)
        self._copied = shared_outputs(self._graph)
        self._recordings: dict[Shapes, Recording] = {}
        self._padding: Padding | None = None
        self._refusals: list[str] = []
        self._memory_bytes = 0
        self._replays: dict[Any, Replay] = {}  # by shapes, dtypes and devices
        self._turns: Turns | None = None
        self._ends: tuple[str, ...] = ()
        self._padded: dict[Shapes, Way] = {}
        self._counting = threading.Lock()
        self._calls: Counter[Way] = Counter()
        if backend.cuda_graph and self._device.type == "cuda":
            context.progress("recording CUDA graphs")
            self._record([i.detach() for i in inputs])

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run.

        Raises:
            InputError: an input is on another device than the engine.
        """
        replay = self._replays.get(tuple([(i.shape, i.dtype, i.device) for i in inputs]))
        if replay is None or torch.cuda.is_current_stream_capturing():
            return self._call(inputs)
        return self._replay(replay, inputs)

    def _call(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is not as recorded."""
        for position, (tensor, device) in enumerate(zip(inputs, self._devices, strict=True)):
            if tensor.device != device:
                raise InputError(
                    f"fastertransformer: input {position} is on {tensor.device}, the engine on {device}; move it there, "
                    f"or optimize a copy of the model on {tensor.device}"
                )
        if not self._recordings or torch.cuda.is_current_stream_capturing():
            return self._run(inputs)
        if self._padding is not None and (recording := self._padding.recording_for(inputs)) is not None:
            batch, rows = self._padding.batch, self._padding.batch.rows(inputs)
            shapes, run_padded = shapes_of(recording.inputs), recording.run_padded
            way = self._padded.setdefault(shapes, Way("padded", shapes))
            return self._replay(Replay(lambda i: run_padded(i, batch.batched, rows), way), inputs)
        self._count(_NOT_RECORDED)
        return self._run(inputs)

    def calls(self) -> dict[str, int]:
        """Calls so far where there are recordings: `replayed`, `padded` to a larger recording, `not recorded`."""
        return self._counted(lambda way: way.how)

    def counters(self) -> dict[str, int]:
        """The same by the recording that ran: `replayed [8, 128, 768]`, `padded to [8, 128, 768]`, `not recorded`."""
        return self._counted(str)

    def _counted(self, words: Callable[[Way], str]) -> dict[str, int]:
        found: Counter[str] = Counter()
        with self._counting:
            for way, count in self._calls.items():
                found[words(way)] += count
        return dict(found)

    def _count(self, way: Way) -> None:
        with self._counting:
            self._calls[way] += 1

    def describe(self) -> EngineFacts:
        notes = [*facts.operator_notes(self._graph, self._device)]
        notes += [*self._tuned, *self._attention]
        if (chosen := self._choice.note()) is not None:
            notes.append(chosen)
        if self._weight_bytes:
            notes.append(f"{self._weight_bytes / 2**20:.0f} MiB of folded weights beside the model's own")
        if self._recordings:
            count = len(self._recordings)
            notes.append(
                f"{count} CUDA graph{'s' * (count > 1)} in {self._memory_bytes / 2**20:.0f} MiB of static memory: "
                + " | ".join(_shown(shapes) for shapes in self._recordings)
                + "; other shapes run without"
            )
        notes += self._ends
        if self._padding is not None:
            notes.append("a batch between two recorded sizes runs in the larger one where that is faster")
        if calls := self.calls():
            notes.append("calls: " + ", ".join(f"{n} {how}" for how, n in sorted(calls.items())))
        return EngineFacts(
            backend=self._backend.name,
            versions=self._backend.versions(),
            precisions=facts.precisions(self._graph, self._tf32),
            memory_bytes=self._memory_bytes + self._weight_bytes,
            notes=(*notes, *self._refusals),
        )

    # --- running

    def _run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad(), self._arithmetic(), self._on_device():
            results = self._forward(*self._laid_out(inputs))
            return own_memory(results, self._copied) if self._copied else results

    def _replay(self, replay: Replay, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert self._turns is not None, "what was recorded has its turns"
        results = self._turns.take(replay.run, inputs)
        self._count(replay.way)
        return results

    def _arithmetic(self) -> AbstractContextManager[None]:
        return tensor_core_products() if self._tf32 else nullcontext()

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    # --- tuning and recording, while the engine is made

    def _tune(self, graph: fx.GraphModule, inputs: Sequence[Tensor], context: CompileContext) -> tuple[str, ...]:
        if self._device.type != "cuda":
            return ("nothing to tune: on a CPU fused operators run their plain definitions",)
        from accelkit.backends.fastertransformer.tune import seconds_of, tune_graph

        examples, _ = examples_of(self._backend.capture_sizes, batch_of(graph), inputs)
        with self._arithmetic(), self._on_device():
            outcome = tune_graph(
                graph, examples, seconds_of(self._backend.tune), self._device,
                lambda done, total, words: context.progress(f"tuning {done + 1} of {total}: {words}"),
            )  # fmt: skip
        return tuple(outcome.notes())

    def _choose_attention(
        self, graph: fx.GraphModule, inputs: Sequence[Tensor], context: CompileContext
    ) -> tuple[str, ...]:
        if self._device.type != "cuda" or all(
            (o := operator_of(n)) is None or o.name != "attention" for n in graph.graph.nodes
        ):
            return ()
        from accelkit.backends.fastertransformer.tune import measure_attention

        context.progress("measuring attention")
        examples, _ = examples_of(self._backend.capture_sizes, batch_of(graph), inputs)
        with self._arithmetic(), self._on_device():
            return tuple(measure_attention(graph, examples, self._device))

    def _record(self, inputs: Sequence[Tensor]) -> None:
        if (obstacle := why_not_recordable(self._graph, self._device)) is not None:
            self._refusals.append(f"no CUDA graph: {obstacle}")
            return
        batch = batch_of(self._graph)
        examples, refusals = examples_of(self._backend.capture_sizes, batch, self._laid_out(inputs))
        self._refusals += refusals
        recorder = Recorder(self._device)
        ends = EndsRecorder(self._graph, self._device, self._backend.warmup, self._arithmetic, split=not self._tf32)
        self._turns = Turns(cuda_of(self._device))
        recorded = []
        for one in examples:  # from the largest on: the smaller ones fit into the memory that it leaves
            try:
                self._recordings[shapes_of(one)] = ends.record(recorder, one, self._turns.take)
            except NotRecordable as error:
                self._refusals.append(f"no CUDA graph for {_shown(shapes_of(one))}: {error}")
            except torch.OutOfMemoryError as error:
                self._refusals.append(f"no CUDA graph for {_shown(shapes_of(one))}, out of memory: {error}")
            else:
                recorded.append(one)
        recorded = [one for one in recorded if self._pays(one)]
        for one in recorded:
            shapes = shapes_of(one)
            key = tuple((shape, dtype, device) for (shape, dtype), device in zip(shapes, self._devices, strict=True))
            self._replays[key] = Replay(self._recordings[shapes].run, Way("replayed", shapes))
        self._ends = tuple(ends.notes)
        self._memory_bytes = recorder.memory_bytes() if recorded else 0
        if self._backend.pad_batch and recorded and not isinstance(batch, str):
            self._allow_padding(batch, recorded)

    def _pays(self, example: Sequence[Tensor]) -> bool:
        """Whether replaying is faster than running without; a large batch copies more than its launches cost."""
        recording = self._recordings[shapes_of(example)]
        replay_ms = self._replay_ms(recording, example)
        if replay_ms < _LAUNCHES_MS:
            return True
        try:
            run_ms = call_ms(functools.partial(self._run, example), self._device)
        except torch.OutOfMemoryError:  # activations beside the recording's own
            return True
        if run_ms > 0.98 * replay_ms:
            return True
        del self._recordings[shapes_of(example)]
        self._refusals.append(
            f"no CUDA graph for {_shown(shapes_of(example))}: {run_ms:.3f} ms without against {replay_ms:.3f} ms with it"
        )
        return False

    def _allow_padding(self, batch: Any, recorded: Sequence[Sequence[Tensor]]) -> None:
        from accelkit.rowwise import why_not_rowwise

        if (reason := why_not_rowwise(self._graph, batch.symbol)) is not None:
            self._refusals.append(f"batches are not padded to a recorded size: {reason}")
            return
        times = {}
        for one in recorded:
            try:
                times[batch.rows(one)] = (
                    self._replay_ms(self._recordings[shapes_of(one)], one),
                    call_ms(functools.partial(self._run, one), self._device),
                )
            except torch.OutOfMemoryError as error:  # activations beside the recordings' own
                self._refusals.append(f"batches are not padded to {_shown(shapes_of(one))}, out of memory: {error}")
        self._padding = Padding(batch, self._recordings, times)

    def _replay_ms(self, recording: Recording, example: Sequence[Tensor]) -> float:
        assert self._turns is not None
        return call_ms(functools.partial(self._turns.take, recording.run, example), self._device)


def _own_bytes(graph: fx.GraphModule, given: fx.GraphModule) -> int:
    """Bytes of the tensors that `graph` has and the graph that it was made from has not."""
    known = {tensor.untyped_storage()._cdata for _, tensor in graphs.tensor_attributes(given)}
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in graphs.tensor_attributes(graph)}
    return sum(nbytes for storage, nbytes in held.items() if storage not in known)


def _shown(shapes: Shapes) -> str:
    return ", ".join(str(list(shape)) for shape, _ in shapes)
