"""What of a graph runs in engines: pieces, each built once, and given back to PyTorch where that measured faster.

    part of the graph + examples --store--> engine --beside PyTorch?--> Piece, or a LoweringError that names its operators

Lowering starts anew whenever operators turn out to stay in PyTorch; the pieces that this does not change are not built again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from accelkit.backend_api import Backend, CompileContext, Engine
from accelkit.errors import LoweringError
from accelkit.give_back import why_given_back
from accelkit.pass_runner import PassRecord

if TYPE_CHECKING:
    from accelkit.lowering import EngineStore


@dataclass
class Piece:
    """A part of the graph that one engine runs.

    Attributes:
        engine: the engine.
        graph: the part, as it was compiled.
        operators: number of operators in it.
        origin: where the engine came from: `compiled`, `cache`, `artifact`, or `refitted` (the same with other weights).
        key: what a cache or a file keeps the engine under.
        records: what the backend's own passes did to it.
    """

    engine: Engine
    graph: fx.GraphModule
    operators: int
    origin: str
    key: str
    records: tuple[PassRecord, ...] = ()


class PieceBuilder:
    """Builds the pieces of one graph, each once.

    Attributes:
        given_back: serialised engines, by key, of pieces that measured slower than PyTorch. A file keeps them too: whoever
            loads it measures again, where it runs, and builds nothing for that.
    """

    def __init__(self, backend: Backend, context: CompileContext, store: EngineStore) -> None:
        self.backend, self.context, self.store = backend, context, store
        self.given_back: dict[str, dict[str, bytes]] = {}
        self._built: dict[Any, Piece] = {}

    def build(
        self, graph: fx.GraphModule, operators: int, inputs: Sequence[torch.Tensor], *, whole: bool = False
    ) -> Piece:
        """The piece; its records are in the ledger. `whole`: it is all of the graph, so that its results can be judged."""
        known = tuple((node.name, *(i.name for i in node.all_input_nodes)) for node in graph.graph.nodes)
        if (piece := self._built.get(known)) is not None:
            self.context.records.extend(piece.records)
            return piece
        before = len(self.context.records)
        context = self.context if whole else replace(self.context, judge=None)
        engine, origin, key = self.store.build(self.backend, graph, inputs, context)
        piece = Piece(engine, graph, operators, origin, key, tuple(self.context.records[before:]))
        self._built[known] = piece
        return piece

    def build_beside(
        self,
        graph: fx.GraphModule,
        names: Sequence[str],
        inputs: Sequence[torch.Tensor],
        in_pytorch: Callable[..., Sequence[Any]],
    ) -> Piece:
        """The piece of the operators `names`, beside others that stay in PyTorch.

        Raises:
            LoweringError: it measured slower than `in_pytorch`; `nodes` has its operators, with the times.
        """
        before = len(self._built)
        piece = self.build(graph, len(names), inputs)
        if (
            not self.backend.measures_pieces or len(self._built) == before
        ):  # that it was built before says that it stays
            return piece
        self.context.progress(f"measuring {len(names)} operators beside PyTorch")
        if (why := why_given_back(piece.engine, in_pytorch, inputs)) is not None:
            self.given_back[piece.key] = piece.engine.serialize()
            raise LoweringError(f"{self.backend.name}: {len(names)} operators {why}", dict.fromkeys(names, why))
        return piece
