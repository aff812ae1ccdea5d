"""New weights for a compiled model: the captured program with other tensors, through the same passes, to the same engines.

program + state dict -> program' -> passes -> engines: the ones there are, with the new weights, where their serialised
                                               form holds none; else compiled

The first matters to training code that evaluates its weights every epoch: nothing is compiled, with a cache or without.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from accelkit import graph as graphs
from accelkit.backend_api import Backend, CompileContext
from accelkit.capture import Program
from accelkit.compiled import Built
from accelkit.errors import InputError, LoweringError, warn
from accelkit.lowering import EngineStore, Lowered, Stored
from accelkit.persistence import ProgramModule

if TYPE_CHECKING:
    from accelkit.pipeline import Plan


def refitted(plan: Plan, built: Built, state_dict: dict[str, torch.Tensor]) -> Built:
    """The same build with the weights of `state_dict`.

    Raises:
        InputError: keys or shapes that do not fit, or a model that was captured in pieces.
    """
    if built.program is None:
        raise InputError(
            "refit() needs a model that torch.export captures whole; this one runs in pieces: call optimize() again"
        )
    plan = dataclasses.replace(plan, store=KeptEngines(built, plan.store))
    model = built.fallback
    if isinstance(model, ProgramModule):
        if unknown := sorted(set(state_dict) - set(built.program.exported.state_dict)):
            raise InputError(f"refit(): the model has no {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
        program = _program_with(built.program, _copied(state_dict))
        return dataclasses.replace(plan.build_program(program, 0.0, None), fallback=ProgramModule(program))
    assert model is not None
    fresh = copy.deepcopy(model)  # the twin's tensors are the user's: the copy gets its own
    try:
        fresh.load_state_dict(state_dict)
    except RuntimeError as error:
        raise InputError(f"refit(): {_one_line(error)}") from None
    own = dict(fresh.named_parameters(remove_duplicate=False)) | dict(fresh.named_buffers(remove_duplicate=False))
    return plan.build_program(_program_with(built.program, own), 0.0, fresh)


class KeptEngines:
    """The engines of a build, loaded again with other weights; what it does not have, or what holds weights, comes from
    `inner`."""

    def __init__(self, built: Built, inner: EngineStore) -> None:
        self._pieces = {piece.key: piece for variant in built.variants for piece in variant.lowered.pieces}
        self._given_back = {key: blobs for v in built.variants for key, blobs in v.lowered.given_back.items()}
        self._inner = inner

    def build(
        self, backend: Backend, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Stored:
        from accelkit.fingerprint import engine_key

        if not backend.embeds_weights:
            key = engine_key(graph, backend, context.precision, context.onnx_passes, inputs)
            piece = self._pieces.get(key)
            blobs = piece.engine.serialize() if piece is not None else self._given_back.get(key, {})
            if blobs:
                try:
                    engine = backend.load(blobs, graph, inputs, context)
                except LoweringError as error:
                    warn(f"an engine does not take the new weights, so it is built anew: {error}")
                else:
                    context.records += piece.records if piece is not None else ()
                    return Stored(engine, "refitted", key)
        return self._inner.build(backend, graph, inputs, context)

    def recall(self, program: Any, lowered: Lowered, tolerance: float | None, results: Sequence[Any]) -> Any | None:
        return self._inner.recall(program, lowered, tolerance, results)

    def remember(self, program: Any, lowered: Lowered, tolerance: float | None, findings: Any) -> None:
        self._inner.remember(program, lowered, tolerance, findings)


def _copied(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # the caller may go on training: what the engines read must not change under them
    copies: dict[int, torch.Tensor] = {}
    for tensor in state_dict.values():
        copies.setdefault(id(tensor), tensor.detach().clone())
    return {name: copies[id(tensor)] for name, tensor in state_dict.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _program_with(program: Program, tensors: dict[str, torch.Tensor]) -> Program:
    graph = fx.GraphModule(program.graph, copy.deepcopy(program.graph.graph), type(program.graph).__name__)
    replaced: dict[int, torch.Tensor] = {}
    for node, old in graphs.tensor_attributes(program.graph):
        new = tensors.get(str(node.target))
        if new is None or id(old) in replaced:
            continue
        if new.shape != old.shape:
            raise InputError(
                f"refit(): {node.target} has shape {list(new.shape)}, the compiled model's is {list(old.shape)}"
            )
        replaced[id(old)] = new.detach().to(device=old.device, dtype=old.dtype)
    missing = []
    for node, old in graphs.tensor_attributes(program.graph):  # tied weights: one tensor under several names
        if id(old) in replaced:
            _assign(graph, str(node.target), replaced[id(old)], isinstance(old, nn.Parameter))
        elif str(node.target) in program.exported.state_dict:
            missing.append(str(node.target))
    if missing:
        raise InputError(f"refit(): the state dict lacks {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    return dataclasses.replace(program, graph=graph)


def _assign(graph: fx.GraphModule, name: str, tensor: torch.Tensor, parameter: bool) -> None:
    *path, leaf = name.split(".")
    owner: nn.Module = graph
    for part in path:
        owner = getattr(owner, part)
    if parameter:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
