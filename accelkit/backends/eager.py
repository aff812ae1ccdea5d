"""Eager: the optimised graph as it is, run by PyTorch: the reference for the other targets, and always there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import Backend, CompileContext, Engine, EngineFacts
from accelkit.graph import SHORT
from accelkit.ops import OPERATORS

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Eager(Backend):
    """PyTorch itself, on the optimised graph."""

    name: ClassVar[str] = "eager"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "int8")
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    embeds_weights: ClassVar[bool] = False
    fused_operators: ClassVar[frozenset[str]] = frozenset(OPERATORS)
    description: ClassVar[str] = "PyTorch's own operators on the optimised graph"

    def pads_batches(self) -> bool:
        return True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        return EagerEngine(graph)


class EagerEngine(Engine):
    """Runs the graph. An output that shares memory with an input or a weight is copied: results are always the
    caller's own."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._forward = graph.forward
        self._laid_out = graphs.laid_out(graph)
        self._copied = shared_outputs(graph)

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            results = self._forward(*self._laid_out(inputs))
            if not self._copied:
                return results  # type: ignore[no-any-return]
            return own_memory(results, self._copied)

    def describe(self) -> EngineFacts:
        types = Counter(result_type(node) for node in self._graph.graph.nodes if node.op == "call_function")
        return EngineFacts(
            backend=Eager.name,
            versions={"torch": torch.__version__},
            precisions={name: count for name, count in types.items() if name is not None},
            memory_bytes=0,
            notes=("shares the weights with the model: changing a parameter in place changes the engine",),
        )


def shared_outputs(graph: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the outputs that may share memory with an input or a weight."""
    (returned,) = graph.graph.output_node().args
    results = returned if isinstance(returned, (tuple, list)) else (returned,)
    return tuple(i for i, node in enumerate(results) if isinstance(node, fx.Node) and graphs.storage_roots(node))


def own_memory(results: Sequence[torch.Tensor], positions: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The results with those at `positions` copied."""
    return tuple(
        r.clone() if i in positions and isinstance(r, torch.Tensor) else r for i, r in enumerate(results)
    )  # fmt: skip


def result_type(node: fx.Node) -> str | None:
    value = graphs.val(node)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    return _NAMES.get(value.dtype, SHORT.get(value.dtype, str(value.dtype)))
