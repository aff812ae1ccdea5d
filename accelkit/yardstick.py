"""What results are judged by: the program in float64, and plain PyTorch in the precision asked for, on the example.

    Yardstick(program, model, precision): .reference, .plain, .own     each computed once, when it is first asked for

A backend that has to choose between engines of a whole graph asks while it compiles (CompileContext.judge), and the check at the
end asks again: it is the same yardstick, so that both go by one bound.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.accuracy import OutputError, check_outputs, reference_outputs
from accelkit.capture import Program
from accelkit.pass_runner import PassRecord
from accelkit.precision import Precision
from accelkit.signature import Constant, TensorSpec
from accelkit.tf32 import tensor_core_products
from accelkit.twin import clone_inputs, no_fused_multi_head_attention, preserved


class Yardstick:
    """The example's results as they should be.

    Args:
        program: as captured.
        model: the original (its twin), or None where only the program is at hand.
        precision: what was asked for.

    Attributes:
        notes: what could not be computed, and why; complete once `plain` was asked for.
    """

    def __init__(self, program: Program, model: nn.Module | None, precision: Precision) -> None:
        self.program, self.model, self.precision = program, model, precision
        self.notes: list[str] = []
        self._no_reference: Exception | None = None

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """Whose buffers are as before afterwards."""
        return (self.program.graph,) if self.model is None else (self.program.graph, self.model)

    @functools.cached_property
    def original(self) -> Callable[[], Any]:
        """Runs the original on a copy of the example."""
        return original_call(self.program, self.model)

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the outputs, in the graph's order."""
        (returned,) = self.program.graph.graph.output_node().args
        return [output_name(self.program, i) for i in range(len(returned))]  # type: ignore[arg-type]

    @functools.cached_property
    def own(self) -> Sequence[Any]:
        """The original's outputs, in its own precision."""
        arithmetic = tensor_core_products() if self.precision.name == "tf32" else contextlib.nullcontext()
        with preserved(*self.owners), torch.no_grad(), arithmetic:
            output = self.original()
        return output if self.model is None else _graph_order(self.program, output)

    @functools.cached_property
    def plain(self) -> Sequence[Any] | None:
        """The outputs of plain PyTorch in the precision asked for; None where it cannot run in that."""
        if self.precision.dtype == torch.float32:
            return self.own
        return _plain_in(self.precision.dtype, self.program, self.model, self.notes)

    @property
    def reference(self) -> Sequence[Any]:
        """The outputs in float64.

        Raises:
            RuntimeError, NotImplementedError, TypeError: an operator has no float64 form, or there is no memory for it.
        """
        if self._no_reference is not None:
            raise self._no_reference
        try:
            return self._reference
        except (RuntimeError, NotImplementedError, TypeError) as error:
            self._no_reference = error.with_traceback(None)  # whose frames hold what was computed so far
            raise

    @functools.cached_property
    def _reference(self) -> Sequence[Any]:
        return reference_outputs(self.program.graph, self.program.inputs)

    def judge(self, results: Sequence[Any], tolerance: float | None = None) -> list[OutputError]:
        """Each output's error, beside plain PyTorch's own and what is allowed; raises what `reference` does."""
        reference = self.reference
        return check_outputs(results, reference, self.plain, self.names, self.precision, tolerance)


def judge_of(
    yardstick: Yardstick, graph: fx.GraphModule, ledger: Sequence[PassRecord], tolerance: float | None
) -> Callable[[Sequence[Any]], list[OutputError]] | None:
    """For CompileContext: what the final check will find of results; None where that is not all of them beside the original's."""
    otherwise = any(r.meaning is not None or r.emulation is not None or r.open for r in ledger)
    if yardstick.model is None or otherwise or any(map(graphs.is_random, graph.graph.nodes)):
        return None
    return functools.partial(yardstick.judge, tolerance=tolerance)


def example_call(program: Program) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as the model takes it: canonical (args, kwargs), constants included."""
    tensors = iter(program.inputs)
    leaves = [next(tensors) if isinstance(i, TensorSpec) else i.value for i in program.signature.inputs]
    args, kwargs = pytree.tree_unflatten(leaves, program.signature.in_spec)
    return args, kwargs


def original_call(program: Program, model: nn.Module | None) -> Callable[[], Any]:
    """The original on a copy of the example; without the model the program."""
    if model is None:
        inputs = clone_inputs(program.inputs)
        return lambda: program.graph(*inputs)
    args, kwargs = clone_inputs(example_call(program))
    return lambda: model(*args, **kwargs)


def output_name(program: Program, index: int) -> str:
    """What the report calls an output."""
    signature = program.signature
    leaves = pytree.tree_unflatten(list(range(len(signature.outputs))), signature.out_spec)
    for (path, _), place in zip(pytree.tree_flatten_with_path(leaves)[0], signature.outputs, strict=True):
        if place == index:
            return f"output{pytree.keystr(path)}"
    return f"output {index}"


def first_line(error: BaseException) -> str:
    """For a note."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _graph_order(program: Program, output: Any) -> list[Any]:
    leaves = pytree.tree_leaves(output)
    placed: dict[int, Any] = {}
    for leaf, place in zip(leaves, program.signature.outputs, strict=True):
        if not isinstance(place, Constant):
            placed.setdefault(place, leaf)
    return [placed[i] for i in range(len(placed))]


def _plain_in(dtype: torch.dtype, program: Program, model: nn.Module | None, notes: list[str]) -> list[Any] | None:
    """The outputs of the model cast to `dtype` as users do it by hand (`model.to(dtype)`), or None where that fails."""
    if model is None:
        return None
    cast: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        narrow = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        cast[id(tensor)] = nn.Parameter(narrow, requires_grad=False) if isinstance(tensor, nn.Parameter) else narrow
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
        clone_inputs(example_call(program)),
    )
    try:
        narrow_model = copy.deepcopy(model, cast)
        with torch.no_grad(), no_fused_multi_head_attention():
            return _graph_order(program, narrow_model(*args, **kwargs))
    except Exception as error:  # noqa: BLE001 - a dtype baked into the model's own code may raise anything
        notes.append(
            f"plain PyTorch cannot run this model in {dtype} ({first_line(error)}); the error has a fixed bound instead"
        )
        return None
