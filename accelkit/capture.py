"""The only file that knows how a graph is obtained.

    nn.Module --torch.export (non-strict, no_grad, eval)--> ATen graph --flattened--> Program

Composite operators (`linear`, `layer_norm`, `gelu`, `dropout`, `scaled_dot_product_attention`) stay one node; parameters are
attributes that share the model's own tensors. In-place operators on intermediates are made functional; writes to the model's
buffers or inputs are left as one `copy_` at the end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.dims import Dim
from accelkit.dynamic_shapes import dims_by_leaf, exported_shapes, widened
from accelkit.errors import CaptureError
from accelkit.functionalize import remove_in_place_operators
from accelkit.signature import Binder, Constant, Signature, TensorSpec, leaf_names
from accelkit.twin import clone_inputs, eval_twin, no_fused_multi_head_attention, quiet, require_usable

aten = torch.ops.aten
_LOGGERS = ("torch.export", "torch.fx.experimental", "torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class Program:
    """A captured model: the flat graph, and how calls map to it.

    Attributes:
        graph: the accelkit graph (see accelkit.graph); parameters are shared with the model.
        signature: how arguments become the graph's inputs, and its outputs the model's.
        exported: the torch.export program that it came from, for artifacts.
        inputs: copies of the example inputs' tensors, in the graph's order.
    """

    graph: fx.GraphModule
    signature: Signature
    exported: torch.export.ExportedProgram
    inputs: tuple[torch.Tensor, ...]

    def exported_with_weights(self) -> torch.export.ExportedProgram:
        """`exported` with the graph's present weights, which a refit may have replaced."""
        current = {str(node.target): tensor for node, tensor in graphs.tensor_attributes(self.graph)}
        state = {name: current.get(name, tensor) for name, tensor in self.exported.state_dict.items()}
        if all(state[name] is tensor for name, tensor in self.exported.state_dict.items()):
            return self.exported
        exported = copy.copy(self.exported)
        exported._state_dict = state
        return exported


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    *,
    dropout: bool = False,
) -> Program:
    """Capture `model` for a call with these arguments.

    Args:
        model: any module; it is not changed, and its parameters are shared.
        args, kwargs: an example call.
        dynamic_shapes: per input (by the name of forward's parameter, or in their order) and dimension, a Dim:
            `{"input_ids": {0: Dim("batch", max=64)}}`. Dimensions that are not named are fixed to the example's sizes.
        dropout: capture what training runs, dropout included, but for batch norms, which stay as in eval mode.

    Raises:
        InputError: arguments or dynamic_shapes that do not fit the model's forward.
        CaptureError: torch.export refuses the model; the message says where and why.
    """
    twin = eval_twin(require_usable(model))
    if dropout:
        for module in twin.modules():
            module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
    binder = Binder.of(twin)
    args, kwargs = clone_inputs(binder.bind(args, kwargs))  # the caller may go on to change the example
    dims = dims_by_leaf(binder, args, kwargs, dynamic_shapes)
    example = widened((args, kwargs), dims)
    exported = _export(twin, example, dims, binder)
    tensors = tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
    return from_exported(exported, binder, (args, kwargs), dims, tensors)


def from_exported(
    exported: torch.export.ExportedProgram,
    binder: Binder,
    canonical: Any,
    dims: dict[int, dict[int, Dim]],
    tensors: tuple[torch.Tensor, ...],
) -> Program:
    """The Program of a torch.export program whose example call was `canonical` (args, kwargs)."""
    has_guards = "check_guards" in inspect.signature(exported.module).parameters
    graph = exported.module(check_guards=False) if has_guards else exported.module()  # the router checks inputs
    assert isinstance(graph, fx.GraphModule)
    _erase_checks(graph)
    for node in graph.graph.find_nodes(op="call_function", target=aten.copy_.default):
        node.meta.setdefault("val", graphs.val(node.args[0]))  # export appends these writes without metadata
    leaves, in_spec = pytree.tree_flatten(canonical)
    out_spec = _out_spec(graph)
    inputs = _flatten_inputs(graph, leaves, leaf_names(canonical, binder))
    outputs, results = _flatten_outputs(graph)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph = fx.GraphModule(
        graph, graph.graph, type(graph).__name__
    )  # without export's input hooks and unused attributes
    graph.graph.lint()
    ranges = {str(symbol): _bounds(r) for symbol, r in exported.range_constraints.items()}
    named = _symbol_names(inputs, dims)
    for symbol, dim in named.items():
        ranges[symbol] = (dim.min, dim.max)
    signature = Signature(
        binder, in_spec, inputs, out_spec, outputs, results, ranges, {s: d.name for s, d in named.items()}
    )  # fmt: skip
    return Program(graph, signature, exported, tensors)


def specialise(program: Program, tensors: tuple[torch.Tensor, ...]) -> Program:
    """The same program for inputs of exactly these shapes: what was symbolic becomes a number.

    Raises:
        CaptureError: torch.export refuses the graph at these shapes.
    """
    try:
        with torch.no_grad(), no_fused_multi_head_attention(), quiet(*_LOGGERS):
            exported = torch.export.export(program.graph, clone_inputs(tensors), strict=False)
    except Exception as error:
        raise CaptureError(_refusal(program.graph, error)) from error
    flat = from_exported(exported, program.signature.binder, (tensors, {}), {}, tensors)
    shapes = iter(flat.signature.tensors)
    inputs = tuple(
        dataclasses.replace(i, shape=next(shapes).shape) if isinstance(i, TensorSpec) else i
        for i in program.signature.inputs
    )
    # a size among the outputs has become a number
    outputs = tuple(o if isinstance(o, Constant) else flat.signature.outputs[o] for o in program.signature.outputs)
    signature = dataclasses.replace(
        program.signature, inputs=inputs, outputs=outputs, results=flat.signature.results, ranges={}, dims={}
    )
    return dataclasses.replace(flat, signature=signature)


# --- exporting


def _export(
    twin: nn.Module, example: Any, dims: dict[int, dict[int, Dim]], binder: Binder
) -> torch.export.ExportedProgram:
    args, kwargs = clone_inputs(example)
    shapes = exported_shapes(example, dims, binder)
    printed = io.StringIO()  # a refused export prints its half-made graph; the error says what matters of it
    try:
        with contextlib.redirect_stderr(printed), torch.no_grad(), no_fused_multi_head_attention(), quiet(*_LOGGERS):
            exported = _exported(twin, args, kwargs, shapes)
            if not remove_in_place_operators(exported.graph_module.graph):
                exported = _exported(twin, args, kwargs, shapes).run_decompositions({})
    except Exception as error:
        raise CaptureError(_refusal(twin, error)) from error
    sys.stderr.write(printed.getvalue())
    return exported


def _exported(twin: nn.Module, args: Any, kwargs: Any, shapes: Any) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(twin, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if shapes is None or "Constraints violated" not in str(error):
            raise
    # A guard that is not proved over the whole range (PyTorch 2.11 asks `min(n, 4 * n) == n` of BERT's token types)
    # becomes a check in the graph; a size that really has to be one number fails here as well.
    return torch.export.export(
        twin, args, kwargs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )


def _refusal(twin: nn.Module, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = _user_frame(error)
    return (
        f"torch.export cannot capture {type(twin).__name__}{where}: {type(error).__name__}: {lines[0] if lines else ''}"
        f"{' ' + lines[1] if len(lines) > 1 else ''}"
    )


def _user_frame(error: BaseException) -> str:
    # The innermost frame outside torch is the user's line that export could not follow.
    trace, found = error.__traceback__, None
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        ours = module == "torch" or module.startswith(("torch.", "accelkit.", "contextlib", "sympy"))
        if not ours and not trace.tb_frame.f_code.co_filename.startswith("<"):
            found = trace
        trace = trace.tb_next
    return f" at {found.tb_frame.f_code.co_filename}:{found.tb_lineno}" if found else ""


# --- flattening


def _erase_checks(graph: fx.GraphModule) -> None:
    """Input guards and metadata assertions go: accelkit's own router checks inputs before the graph runs."""
    for node in reversed(list(graph.graph.nodes)):
        is_guard = node.op == "call_module" and node.target == "_guards_fn"
        is_check = node.op == "call_function" and node.target in (
            aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default,
        )  # fmt: skip
        if (is_guard or is_check) and not node.users:
            graph.graph.erase_node(node)
    if hasattr(graph, "_guards_fn"):
        delattr(graph, "_guards_fn")


def _out_spec(graph: fx.GraphModule) -> pytree.TreeSpec:
    spec = graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    assert isinstance(spec, pytree.TreeSpec)
    return spec


def _flatten_inputs(graph: fx.GraphModule, leaves: list[Any], names: list[str]) -> tuple[TensorSpec | Constant, ...]:
    placeholders = graph.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(leaves):
        raise CaptureError(
            f"torch.export gave {len(placeholders)} inputs for {len(leaves)} leaves ({', '.join(names)})"
        )
    specs: list[TensorSpec | Constant] = []
    for node, leaf, name in zip(placeholders, leaves, names, strict=True):
        if isinstance(leaf, torch.Tensor):
            specs.append(_tensor_spec(name, graphs.val(node)))
            continue
        if node.users:
            node.replace_all_uses_with(leaf)
        graph.graph.erase_node(node)
        specs.append(Constant(name, leaf))
    return tuple(specs)


def _tensor_spec(name: str, fake: Any) -> TensorSpec:
    shape = tuple(int(s) if isinstance(s, int) else str(s) for s in fake.shape)
    return TensorSpec(name, fake.dtype, shape, fake.device.type)


def _flatten_outputs(graph: fx.GraphModule) -> tuple[tuple[int | Constant, ...], tuple[TensorSpec, ...]]:
    output = graph.graph.output_node()
    (returned,) = output.args
    leaves = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    nodes: list[fx.Node] = []
    places: list[int | Constant] = []
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, fx.Node):
            places.append(Constant(f"output {position}", leaf))
            continue
        if leaf not in nodes:
            nodes.append(leaf)
        places.append(nodes.index(leaf))
    output.args = (tuple(nodes),)
    results = []
    for index, node in enumerate(nodes):
        fake = graphs.val(node)
        if isinstance(fake, torch.Tensor):
            results.append(_tensor_spec(f"output {index}", fake))
        else:  # a size that the model returns: an integer computed at run time
            results.append(TensorSpec(f"output {index} (a size)", torch.int64, (), "cpu"))
    return tuple(places), tuple(results)


def _bounds(value_range: Any) -> tuple[int, int | None]:
    import sympy

    low, high = value_range.lower, value_range.upper
    return (
        int(low) if isinstance(low, (int, sympy.Integer)) else 0,
        int(high) if isinstance(high, (int, sympy.Integer)) and int(high) < 2**62 else None,
    )


def _symbol_names(inputs: tuple[TensorSpec | Constant, ...], dims: dict[int, dict[int, Dim]]) -> dict[str, Dim]:
    named: dict[str, Dim] = {}
    for index, dimensions in dims.items():
        spec = inputs[index]
        for position, dim in dimensions.items():
            if (
                isinstance(spec, TensorSpec)
                and isinstance(symbol := spec.shape[position], str)
                and symbol.isidentifier()
            ):
                named.setdefault(symbol, dim)
    return named


__all__ = ["Program", "capture", "from_exported"]
