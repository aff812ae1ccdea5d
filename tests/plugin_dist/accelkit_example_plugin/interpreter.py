"""A backend that runs the graph node by node and counts what it ran: for seeing what a model really does."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelkit.backend_api import Backend, CompileContext, Engine, EngineFacts


class _Counting(fx.Interpreter):
    """One run of the graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.counts: Counter[str] = Counter()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.counts[str(target)] += 1
        return super().call_function(target, args, kwargs)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class InterpreterEngine(Engine):
    """Attributes: counts, operator -> how often it ran since the engine was made, over all threads."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        run = _Counting(self._graph)  # holds the run's values, so one a call: calls may overlap
        with torch.no_grad():
            outputs: Sequence[torch.Tensor] = run.run(*inputs)
        with self._lock:
            self.counts += run.counts
        # a caller may write into a result: it must never be the caller's own input or a weight
        lent = {_memory(t) for t in (*inputs, *self._graph.parameters(), *self._graph.buffers())}
        return tuple(output.clone() if _memory(output) in lent else output for output in outputs)

    def describe(self) -> EngineFacts:
        operators = sum(node.op == "call_function" for node in self._graph.graph.nodes)
        return EngineFacts(
            backend=Interpreter.name,
            versions={"torch": torch.__version__},
            memory_bytes=0,
            notes=(f"{operators} operators run one by one",),
        )


@dataclass(frozen=True)
class Interpreter(Backend):
    """The graph, node by node, each operator counted."""

    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    embeds_weights: ClassVar[bool] = False
    description: ClassVar[str] = "the graph, node by node, each operator counted"

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        return InterpreterEngine(graph)
