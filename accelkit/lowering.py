"""From a graph to engines: partition by what the backend takes, compile each piece, run the rest in PyTorch.

    graph --level by level--> stages: PyTorch | piece | PyTorch | piece ...

Each node gets a level: that of its inputs, plus one where the side (backend or PyTorch) changes. The nodes of one side and
one level form one stage; every value flows to an equal or higher level, so the stages run in order and never in a circle.
Sizes are free: a stage that needs `x.shape[0]` computes it from x itself.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import Backend, CompileContext, Engine
from accelkit.errors import LoweringError
from accelkit.ops.decompose import decomposed_for
from accelkit.pass_api import Refusal
from accelkit.pieces import Piece, PieceBuilder

_MATRIX_WORDS = ("linear", "mm", "conv", "attention", "einsum", "lstm", "gru", "embedding", "norm", "softmax")
_MIN_NODES = 4


class Stored(NamedTuple):
    """An engine, where it came from (`compiled`, `cache`, `artifact`, `refitted`), and the key that a cache or a file keeps it
    under."""

    engine: Engine
    origin: str
    key: str


class EngineStore(Protocol):
    """Where compiled engines come from: the cache on disk, an artifact, or nowhere."""

    def build(
        self, backend: Backend, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Stored:
        """The engine for this graph."""
        ...

    def recall(self, program: Any, lowered: Lowered, tolerance: float | None, results: Sequence[Any]) -> Any | None:
        """What an earlier check of these engines on these weights and inputs found, or None."""
        ...

    def remember(self, program: Any, lowered: Lowered, tolerance: float | None, findings: Any) -> None:
        """Keep what a check found."""
        ...


class AlwaysCompile:
    """An EngineStore that keeps nothing."""

    def build(
        self, backend: Backend, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Stored:
        from accelkit.fingerprint import engine_key

        # the key is what an artifact keeps the engine under
        key = engine_key(graph, backend, context.precision, context.onnx_passes, inputs)
        return Stored(backend.compile(graph, inputs, context), "compiled", key)

    def recall(self, program: Any, lowered: Lowered, tolerance: float | None, results: Sequence[Any]) -> Any | None:
        return None

    def remember(self, program: Any, lowered: Lowered, tolerance: float | None, findings: Any) -> None:
        return None


@dataclass
class Lowered:
    """A lowered graph: call it with the graph's inputs, get its outputs.

    Attributes:
        call: the callable; runs without gradients.
        pieces: what runs in engines.
        refusals: operators that stay in PyTorch, and why.
        torch_operators: number of operators that stay in PyTorch.
        graph: what was lowered: the graph after the passes.
        given_back: serialised engines, by key, of pieces that measured slower than PyTorch and run there.
    """

    call: Callable[..., Sequence[Any]]
    pieces: list[Piece]
    refusals: list[Refusal] = field(default_factory=list)
    torch_operators: int = 0
    graph: fx.GraphModule | None = None
    given_back: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def serialized(self, except_for: Container[str] = ()) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Each engine's key and serialised form, those that were given back too."""
        yield from ((p.key, p.engine.serialize()) for p in self.pieces if p.key not in except_for)
        yield from ((key, blobs) for key, blobs in self.given_back.items() if key not in except_for)


def lower(
    graph: fx.GraphModule,
    backend: Backend,
    inputs: Sequence[torch.Tensor],
    context: CompileContext,
    store: EngineStore | None = None,
) -> Lowered:
    """Compile `graph` for `backend`; what it refuses runs in PyTorch, with the reason kept.

    Raises:
        LoweringError: the backend failed on a piece without naming operators that it could do without.
    """
    builder = PieceBuilder(backend, context, store or AlwaysCompile())
    after_passes = graph
    graph, refused = decomposed_for(backend.name, backend.fused_operators, graph, context.records)
    for node in graph.graph.nodes:
        if _computes(node) and node not in refused and (why := backend.unsupported(node)) is not None:
            refused[node] = why
    refused.update({n: "writes to a buffer while it computes" for n in graph.graph.nodes if _writes_amid(n)})
    while True:
        _refuse_run_time_numbers(graph, refused)
        stages = _stages(graph, refused)
        records = len(context.records)
        try:
            lowered = _compile(graph, stages, refused, inputs, builder)
            lowered.graph, lowered.given_back = after_passes, builder.given_back
            return lowered
        except LoweringError as error:
            culprits = {n: error.nodes[n.name] for n in graph.graph.nodes if n.name in error.nodes and n not in refused}
            if not culprits:
                raise
            refused.update(culprits)
            del context.records[records:]  # of pieces that are compiled anew


def _computes(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr", "output") and not _is_free(node)


def _writes_amid(node: fx.Node) -> bool:
    """An operator that writes and whose result is computed on with: an instance_norm that updates its statistics."""
    return graphs.is_mutating(node) and any(user.op != "output" for user in node.users)


def _is_free(node: fx.Node) -> bool:
    """A size, or arithmetic on sizes, that any stage can compute again from tensors it has."""
    return graphs.is_size(node) and (
        node.target is torch.ops.aten.sym_size.int or (all(_is_free(i) for i in node.all_input_nodes if graphs.is_size(i))
        and all(graphs.is_size(i) for i in node.all_input_nodes))
    )  # fmt: skip


def _refuse_run_time_numbers(graph: fx.GraphModule, refused: dict[fx.Node, str]) -> None:
    # `int(x.max())` is a number that only a run knows; engines take tensors, so what uses it stays beside it.
    for node in graph.graph.nodes:
        if not _computes(node) or node in refused:
            continue
        if graphs.is_size(node):
            refused[node] = "computes a Python number from tensor data"
        elif numbers := [i.name for i in node.all_input_nodes if graphs.is_size(i) and not _is_free(i)]:
            refused[node] = f"uses {', '.join(numbers)}, computed from tensor data"


# --- stages


@dataclass
class _Stage:
    in_engine: bool
    nodes: list[fx.Node]


def _stages(graph: fx.GraphModule, refused: dict[fx.Node, str]) -> list[_Stage]:
    while True:
        stages = _levels(graph, refused)
        if all(s.in_engine for s in stages):
            return stages
        small = [s for s in stages if s.in_engine and not _worthwhile(s.nodes)]
        if not small:
            return stages
        for stage in small:
            refused.update(
                dict.fromkeys(
                    stage.nodes, "alone between operators that stay in PyTorch: too little work for an engine"
                )
            )


def _worthwhile(nodes: list[fx.Node]) -> bool:
    return len(nodes) >= _MIN_NODES or any(word in str(n.target) for n in nodes for word in _MATRIX_WORDS)


def _levels(graph: fx.GraphModule, refused: dict[fx.Node, str]) -> list[_Stage]:
    level: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            level[node] = 0
        elif node.op != "output":
            mine = node in refused
            level[node] = max(
                (level[i] + (_computes(i) and (i in refused) != mine) for i in _tensor_inputs(node)), default=0
            )
    writes = [n for n in level if graphs.is_mutating(n) and not _writes_amid(n)]
    last = max(level.values(), default=0) + 1
    stages: dict[tuple[int, bool], list[fx.Node]] = {}
    for node in level:
        if _computes(node):
            # writes to buffers and inputs come after every read
            key = (last, False) if node in writes else (level[node], node not in refused)
            stages.setdefault(key, []).append(node)
    return [_Stage(in_engine, stages[at, in_engine]) for at, in_engine in sorted(stages)]


def _tensor_inputs(node: fx.Node) -> set[fx.Node]:
    """The nodes a node really waits for: sizes are looked through."""
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if _is_free(current):
            stack.extend(current.all_input_nodes)
        else:
            found.add(current)
    return found


# --- compiling


def _compile(
    graph: fx.GraphModule,
    stages: list[_Stage],
    refused: dict[fx.Node, str],
    inputs: Sequence[torch.Tensor],
    builder: PieceBuilder,
) -> Lowered:
    say, name = builder.context.progress, builder.backend.name
    refusals = [Refusal(n.name, f"{n.target}: {why}") for n, why in refused.items()]
    results = _results(graph)
    state = _state(graph)
    whole = len(stages) == 1 and stages[0].in_engine and all(_computes(r) for r in results) and not state
    if whole:
        say(f"compiling {len(stages[0].nodes)} operators for {name}")
        piece = builder.build(graph, len(stages[0].nodes), inputs, whole=True)
        return Lowered(piece.engine, [piece], refusals, 0, graph)

    placeholders = graph.graph.find_nodes(op="placeholder")
    values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True)) | state
    slots = {node: index for index, node in enumerate([*placeholders, *state])}
    steps: list[tuple[Callable[..., Sequence[Any]], tuple[int, ...], int]] = []
    pieces: list[Piece] = []
    torch_operators = 0
    stages = [*stages, _Stage(False, [r for r in results if _is_free(r)])]
    for index, stage in enumerate(stages):
        if not stage.nodes:
            continue
        later = {i for s in stages[index + 1 :] for n in s.nodes for i in _tensor_inputs(n)} | set(results)
        part, taken, given = _extract(graph, stage.nodes, [n for n in stage.nodes if n in later], state)
        needed = any(s.in_engine for s in stages[index + 1 :])
        examples = [values[n] for n in taken] if stage.in_engine or needed else []
        if stage.in_engine:
            say(f"compiling {len(stage.nodes)} operators for {name} (stage {index + 1} of {len(stages)})")
            inside = [n.name for n in stage.nodes]
            if all(s.in_engine for s in stages if s.nodes):
                pieces.append(builder.build(part, len(inside), examples))
            else:
                pieces.append(builder.build_beside(part, inside, examples, _TorchStage(part)))
            run: Callable[..., Sequence[Any]] = pieces[-1].engine
        else:
            torch_operators += len(stage.nodes)
            run = _TorchStage(part)
        if needed:
            values.update(zip(given, _example_run(part, examples), strict=True))
        steps.append((run, tuple(slots[n] for n in taken), len(given)))
        for node in given:
            slots[node] = len(slots)
    constants = {r: graphs.attribute(graph, str(r.target)) for r in results if r.op == "get_attr" and r not in state}
    returned = tuple(constants[r] if r in constants else slots[r] for r in results)
    return Lowered(_Stitched(steps, tuple(state.values()), returned), pieces, refusals, torch_operators, graph)


def _state(graph: fx.GraphModule) -> dict[fx.Node, torch.Tensor]:
    """The buffers that the graph writes to: engines would keep a copy of a weight, so these are given to them at each call."""
    tensors = dict(graphs.tensor_attributes(graph))
    written = {tensors[n].untyped_storage()._cdata for n in graphs.written_roots(graph.graph) if n in tensors}
    return {node: tensor for node, tensor in tensors.items() if tensor.untyped_storage()._cdata in written}


def _results(graph: fx.GraphModule) -> list[fx.Node]:
    (returned,) = graph.graph.output_node().args
    return list(returned)  # type: ignore[arg-type]


def _example_run(part: fx.GraphModule, examples: list[Any]) -> Sequence[Any]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return part(*examples)  # type: ignore[no-any-return]


class _TorchStage:
    """A part of the graph that stays in PyTorch."""

    def __init__(self, part: fx.GraphModule) -> None:
        self._forward, self._laid_out = part.forward, graphs.laid_out(part)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        with torch.no_grad():
            return self._forward(*self._laid_out(inputs))  # type: ignore[no-any-return]


class _Stitched:
    """Runs the stages in order; values live in numbered slots: inputs first, then the buffers that are written to."""

    def __init__(
        self,
        steps: list[tuple[Callable[..., Sequence[Any]], tuple[int, ...], int]],
        state: tuple[torch.Tensor, ...],
        returned: tuple[int | torch.Tensor, ...],
    ) -> None:
        self._steps, self._state, self._returned = steps, state, returned

    def __call__(self, *inputs: torch.Tensor) -> Sequence[Any]:
        slots: list[Any] = [*inputs, *self._state]
        for run, taken, _ in self._steps:
            slots.extend(run(*[slots[i] for i in taken]))
        return tuple(slots[r] if isinstance(r, int) else r for r in self._returned)


def _extract(
    graph: fx.GraphModule, nodes: list[fx.Node], given: list[fx.Node], state: Container[fx.Node] = ()
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """The nodes as a graph of their own: (graph, the nodes it takes, the nodes it gives)."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    taken: list[fx.Node] = []
    inside = set(nodes)

    def require(node: fx.Node) -> None:
        if node in copies:
            return
        if (node.op == "get_attr" and node not in state) or _is_free(node):
            for i in node.all_input_nodes:
                require(i)
            return
        if node not in inside:
            copies[node] = part.placeholder(node.name)
            copies[node].meta = dict(node.meta)
            taken.append(node)

    for node in nodes:  # inputs first: fx wants placeholders on top
        for i in node.all_input_nodes:
            require(i)
        if _is_free(node):
            require(node)

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            for i in node.all_input_nodes:
                copy(i)
            copies[node] = part.node_copy(node, lambda n: copies[n])
        return copies[node]

    for node in nodes:
        copy(node)
    part.output(tuple(copies[n] for n in given))
    module = fx.GraphModule(graph, part)
    module.graph.lint()
    return module, taken, given
