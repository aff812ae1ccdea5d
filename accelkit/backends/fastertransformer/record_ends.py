"""Recordings of a graph, with the ends that measured faster: casts go into the copy, last operators may run outside.

copy (and cast) in, replay, copy out     |     copy (and cast) in, replay up to the last operators, these into fresh memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, fx

from accelkit.backends.fastertransformer.ends import split_end, without_casts
from accelkit.backends.fastertransformer.obstacles import NotRecordable
from accelkit.backends.fastertransformer.prepare import constants_of
from accelkit.backends.fastertransformer.recording import Recorder, Recording, call_ms
from accelkit.backends.fastertransformer.turns import Run

SPLIT_FROM_BYTES = 2**20
"""Of results. Copying less is a launch and hardly more: at 3 TB/s it takes under a microsecond."""
_FASTER = 0.99  # both forms give the same bits, so a near-tie may come out either way
_ROUNDS, _IN_A_ROW = 5, 8


class EndsRecorder:
    """Records a graph for one example after another."""

    def __init__(
        self,
        graph: fx.GraphModule,
        device: torch.device,
        warmup: int,
        arithmetic: Callable[[], AbstractContextManager[None]],
        split: bool = True,
    ) -> None:
        """`split`: whether last operators may run outside, where `arithmetic` is not in force."""
        self._graph, self._dtypes = without_casts(graph)
        self._device, self._warmup, self._arithmetic = device, warmup, arithmetic
        self._split = split_end(self._graph) if split else None
        self.notes: list[str] = []

    def record(
        self, recorder: Recorder, example: Sequence[Tensor], take: Callable[[Run, Sequence[Tensor]], object]
    ) -> Recording:
        """The faster recording for this example; `take` runs one as calls will.

        Raises:
            NotRecordable, torch.OutOfMemoryError: as `Recorder.record`.
        """
        whole = self._record(recorder, self._graph, example)
        if self._split is None or sum(o.nbytes for o in whole.outputs) < SPLIT_FROM_BYTES:
            return whole
        try:  # in a pool of its own: what loses leaves no memory behind
            split = self._record_split(Recorder(self._device), example)
            whole_ms, split_ms = self._measure([whole, split], example, take)
        except (NotRecordable, RuntimeError) as error:  # a graph's first launch takes memory of the driver's own
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.notes.append(f"{list(example[0].shape)}: results are copied out of the CUDA graph's memory ({why})")
            return whole
        if any(b > _FASTER * a for a, b in zip(whole_ms, split_ms, strict=True)):
            return whole
        del whole, split
        _, end = self._split
        names = ", ".join(str(n.target) for n in end.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        self.notes.append(
            f"{list(example[0].shape)}: {names} after the CUDA graph, into the results: {split_ms[0]:.3f} ms against "
            f"{whole_ms[0]:.3f} ms with a copy of them"
        )
        return self._record_split(recorder, example)

    def _record(self, recorder: Recorder, graph: fx.GraphModule, example: Sequence[Tensor]) -> Recording:
        cast = [i if d is None else i.to(d) for i, d in zip(example, self._dtypes, strict=True)]
        with self._arithmetic():
            return recorder.record(graph.forward, cast, self._warmup, constants_of(graph))

    def _record_split(self, recorder: Recorder, example: Sequence[Tensor]) -> Recording:
        assert self._split is not None
        head, end = self._split
        return replace(self._record(recorder, head, example), end=end.forward)

    def _measure(
        self,
        recordings: Sequence[Recording],
        example: Sequence[Tensor],
        take: Callable[[Run, Sequence[Tensor]], object],
    ) -> list[tuple[float, float]]:
        """Milliseconds of each: of a call by itself, and of one of several in a row, where launching may be what takes long."""

        def in_a_row(run: Run) -> None:
            for _ in range(_IN_A_ROW):
                take(run, example)

        alone: list[list[float]] = [[] for _ in recordings]
        rows: list[list[float]] = [[] for _ in recordings]
        for _ in range(_ROUNDS):  # in turns: the clocks drift
            for index, recording in enumerate(recordings):
                run = recording.run
                alone[index].append(call_ms(lambda run=run: take(run, example), self._device, repeats=3))  # type: ignore[misc]
                rows[index].append(call_ms(lambda run=run: in_a_row(run), self._device, repeats=1) / _IN_A_ROW)  # type: ignore[misc]
        return [(median(a), median(r)) for a, r in zip(alone, rows, strict=True)]
