"""Attentions that run in PyTorch because they were measured to be faster there.

    attention(q, k, v) in an engine of its own  |  accelkit.attention in PyTorch   ->   nodes that the engine gives up, and why

Lowering then cuts the graph there, and queries, keys, values and the residual stream cross as [batch, length, heads, width] and
[batch, length, width], as they lie. Both ways are timed once for a shape on a machine, and kept with the tuned choices, which
hold for one GPU, driver and PyTorch; TensorRT's version is part of the problem.

PyTorch has to win by more than two borders cost: what the host needs to enqueue one engine more and the attention, which a GPU
that is not busy waits for. It is measured beside the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.errors import LoweringError
from accelkit.measure import interleaved
from accelkit.tuning import files

ATTENTION = ops.attention.OPERATOR.overload
PLACES = ("auto", "engine", "pytorch")
KIND = "tensorrt attention"
GAIN = 1.15
"""Times PyTorch's time that the engine has to take: what an engine fuses attention's neighbours with is not in its own time."""
_SECONDS = 0.2
_HOST_CALLS = 20

Call = Callable[..., Any]
Build = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Call]


class Times(NamedTuple):
    """Milliseconds of one attention: on the GPU in an engine and in PyTorch, and on the host for enqueueing both."""

    engine: float
    pytorch: float
    borders: float

    @property
    def better_in_pytorch(self) -> bool:
        return self.pytorch * GAIN + self.borders < self.engine


def in_pytorch(graph: fx.GraphModule, place: str, version: str, device: torch.device, build: Build) -> dict[str, str]:
    """The attentions that are left to PyTorch, by node, and why.

    Args:
        graph: an accelkit graph.
        place: of PLACES.
        version: TensorRT's.
        device: where it runs; nothing is measured without a GPU.
        build: gives an engine of a graph; it may raise a LoweringError, which leaves that attention in the engine.
    """
    nodes = [node for node in graph.graph.nodes if node.target is ATTENTION]
    if place == "pytorch":
        return {node.name: "runs in PyTorch: asked for" for node in nodes}
    if place == "engine" or device.type != "cuda" or not _beside_others(graph):
        return {}
    found: dict[str, str] = {}
    seen: dict[str, Times | None] = {}
    for node in nodes:
        if (problem := problem_of(node, version)) is None:
            continue
        if (key := str(problem)) not in seen:
            seen[key] = _known(device, problem)
            if seen[key] is None and (new := _measured(node, device, build)) is not None:
                files.keep(device, [{"kind": KIND, "problem": problem, "choice": new._asdict()}])
                seen[key] = new
        if (times := seen[key]) is None:
            continue
        if times.better_in_pytorch:
            found[node.name] = (
                f"runs in PyTorch: {times.pytorch:.3g} ms there, {times.engine:.3g} ms in an engine of its own; the border costs "
                f"{times.borders:.2g} ms"
            )
    return found


def _beside_others(graph: fx.GraphModule) -> bool:
    """Whether there is more than attention: an engine of one attention is what is measured here."""
    return any(n.op == "call_function" and n.target is not ATTENTION for n in graph.graph.nodes)


def problem_of(node: fx.Node, version: str) -> dict[str, Any] | None:
    """What the times hold for; None where a size is known at run time only."""
    bound = graphs.bound_arguments(node) or {}
    operands = {name: graphs.val(bound[name]) for name in ("query", "key", "value", "mask") if bound[name] is not None}
    if not all(isinstance(size, int) for value in operands.values() for size in value.shape):
        return None
    shapes = {name: [str(v.dtype).removeprefix("torch."), *v.shape] for name, v in operands.items()}
    return {"tensorrt": version, **shapes, "causal": bound["causal"], "kind": bound["kind"]}


def _known(device: torch.device, problem: Mapping[str, Any]) -> Times | None:
    for entry in files.entries_of(device):
        if entry.get("kind") == KIND and entry.get("problem") == problem:
            try:
                return Times(**{name: float(ms) for name, ms in entry["choice"].items()})
            except (KeyError, TypeError, ValueError, AttributeError):
                return None  # damaged: measured anew
    return None


def _measured(node: fx.Node, device: torch.device, build: Build) -> Times | None:
    part = alone(node)
    inputs = [_example(graphs.val(n), device) for n in part.graph.find_nodes(op="placeholder")]
    try:
        engine = build(part, inputs)
    except LoweringError:
        return None  # the whole graph's build says why
    forward = part.forward

    def plain() -> Any:
        with torch.no_grad():
            return forward(*inputs)

    timings = interleaved({"engine": lambda: engine(*inputs), "PyTorch": plain}, seconds=_SECONDS, device=device)
    borders = _host_ms(lambda: engine(*inputs), device) + _host_ms(plain, device)
    return Times(timings["engine"].median_ms, timings["PyTorch"].median_ms, borders)


def alone(node: fx.Node) -> fx.GraphModule:
    """A graph of this node and its inputs."""
    part = fx.Graph()
    copies = {}
    for given in node.all_input_nodes:
        copies[given] = part.placeholder(given.name)
        copies[given].meta = {"val": graphs.val(given)}
    copied = part.node_copy(node, lambda n: copies[n])
    part.output((copied,))
    return fx.GraphModule({}, part)


def _example(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    shape = tuple(value.shape)
    if value.dtype is torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return torch.randn(shape, device=device).to(value.dtype)


def _host_ms(call: Callable[[], Any], device: torch.device) -> float:
    """What one call takes of the host, on a GPU that has nothing else to do."""
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(_HOST_CALLS):
        call()
    host = (time.perf_counter() - started) * 1e3 / _HOST_CALLS
    torch.cuda.synchronize(device)
    return host
