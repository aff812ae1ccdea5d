"""Backends planted with a fault, for tests: they refuse operators, compute wrongly, fail, or count what is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

import accelkit
from accelkit.backend_api import Backend, CompileContext, Engine, EngineFacts

Spoil = Callable[[list[Any], tuple[Any, ...]], list[Any]]
"""(results, inputs) -> what the engine gives instead."""


class GraphEngine(Engine):
    """Runs the graph, then whatever the test does to the results."""

    def __init__(
        self, graph: fx.GraphModule, spoil: Callable[[list[Any], tuple[Any, ...]], list[Any]] | None = None
    ) -> None:
        self.graph, self.spoil = graph, spoil

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        assert all(isinstance(i, torch.Tensor) for i in inputs), "engines take tensors only"
        with torch.no_grad():
            results = list(self.graph(*inputs))
        return self.spoil(results, inputs) if self.spoil else results

    def describe(self) -> EngineFacts:
        return EngineFacts("planted")


@dataclass(frozen=True)
class Planted(Backend):
    """Refuses operators named in `refuse`; `fail` gets a graph before it is compiled, `spoil` its results."""

    refuse: frozenset[str] = frozenset()
    spoil: Spoil | None = None
    fail: Callable[[fx.GraphModule], None] | None = None
    compiled: list[fx.GraphModule] = field(default_factory=list, compare=False, repr=False)

    name: ClassVar[str] = "planted"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    embeds_weights: ClassVar[bool] = False

    def unsupported(self, node: fx.Node) -> str | None:
        words = str(node.target).split(".")
        return f"planted refusal of {words[1]}" if len(words) > 1 and words[1] in self.refuse else None

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        assert len(inputs) == len(graph.graph.find_nodes(op="placeholder"))
        if self.fail is not None:
            self.fail(graph)
        self.compiled.append(graph)
        return GraphEngine(graph, self.spoil)

    def load(
        self, blobs: Mapping[str, bytes], graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Engine:
        return self.compile(graph, inputs, context)


def optimize(model: nn.Module, example: Any = None, **options: Any) -> accelkit.CompiledModel:
    """`accelkit.optimize` without passes, cache or progress, on the eager target unless the test says otherwise."""
    options = {"target": "eager", "passes": (), "cache": False, "progress": False} | options
    return accelkit.optimize(model, example, **options)


def in_threads(work: Callable[[int], None], threads: int = 8) -> None:
    """Run `work(i)` in several threads that start together; what one raises is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(threads)

    def run(index: int) -> None:
        try:
            start.wait()
            work(index)
        except BaseException as error:  # noqa: BLE001 - raised again by the test's own thread
            errors.append(error)

    running = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
