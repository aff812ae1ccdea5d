"""From an accelkit graph to an ONNX model that holds the graph but not the weights.

    fx graph --weights become inputs--> ExportedProgram --torch.onnx.export--> ModelProto
       --inputs become initializers--> small ModelProto

The weights travel beside the model: each floating-point or int8 tensor of EXTERNAL_BYTES or more is an initializer
`@<attribute>` with external data at a place that does not exist, and whoever runs the model supplies the live tensor
(`external_weights`). While the exporter and its optimiser run, weights are plain inputs, so no value of theirs can be
folded into the graph: one model serves every set of weights, and models above protobuf's 2 GB limit are small.
Other integer and boolean tensors, and small floating-point ones, are part of the model: shapes, indices and tables that the
graph's meaning depends on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.backend_api import EMBEDS_BELOW_BYTES
from accelkit.errors import LoweringError
from accelkit.onnx_weights import all_nodes
from accelkit.twin import no_fused_multi_head_attention

if TYPE_CHECKING:
    import onnx

EXTERNAL_BYTES = EMBEDS_BELOW_BYTES
"""Floating-point tensors from this size on stay outside; the cache's key hashes the contents of all others."""

_EXPORTING = threading.Lock()  # torch.onnx keeps "an export is going on" in a global


def is_external(tensor: torch.Tensor, external_bytes: int = EXTERNAL_BYTES) -> bool:
    """Whether a graph's tensor stays outside the ONNX model: weights, quantised ones (int8) included."""
    weight = tensor.is_floating_point() or tensor.dtype is torch.int8
    return weight and tensor.nbytes >= external_bytes


def initializer_name(target: str) -> str:
    """The name in the ONNX model of the graph attribute `target`; no fx node's name starts with `@`."""
    return f"@{target}"


def export_onnx(
    graph: fx.GraphModule,
    *,
    opset: int | None = None,
    dialect: str = "standard",
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    external_bytes: int = EXTERNAL_BYTES,
) -> onnx.ModelProto:
    """The ONNX model of `graph`, without its weights (see the module's text); `graph` is not changed.

    Inputs have the placeholders' names, outputs are `output_0`, `output_1`, ...; dimensions that are symbolic in the
    graph's metadata are symbolic in the model, one name a symbol.

    Args:
        graph: an accelkit graph whose outputs are all tensors.
        opset: version of the ONNX operator set; None for the exporter's own.
        dialect: of the fused operators' forms, "standard" or "com.microsoft" (accelkit.onnx_translations).
        translations: ONNX forms for operators, as `torch.onnx.export(custom_translation_table=...)` takes them, beside
            accelkit's own.
        external_bytes: floating-point tensors from this size on stay outside; a backend whose `embeds_below_bytes` is other
            than the default exports with that.

    Raises:
        LoweringError: the exporter cannot take the graph; the message has its reason. `nodes` is empty: see
            accelkit.culprits.
    """
    from accelkit.onnx_translations import translations as known

    for kind, nodes in (("input", graph.graph.find_nodes(op="placeholder")), ("output", _results(graph))):
        for node in nodes:
            if not isinstance(node, fx.Node) or not isinstance(graphs.val(node), torch.Tensor):
                raise LoweringError(f"{kind} {node} is not a tensor; ONNX takes and gives tensors only")
    program, attributes = _lifted(graph)
    inputs = [str(n.name) for n in graph.graph.find_nodes(op="placeholder")] + [initializer_name(a) for a in attributes]
    outputs = [f"output_{i}" for i in range(len(_results(graph)))]
    try:
        with _EXPORTING, torch.no_grad(), no_fused_multi_head_attention(), _quiet():
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, optimize=True, opset_version=opset,
                input_names=inputs, output_names=outputs,
                custom_translation_table={**known(dialect), **(translations or {})},
            )  # fmt: skip
            assert exported is not None
            model: onnx.ModelProto = exported.model_proto
    except Exception as error:
        raise LoweringError(f"torch.onnx.export cannot take the graph: {_reason(error)}") from error
    _fill_in_initializers(model, {initializer_name(t): v for t, v in attributes.items()}, external_bytes)
    _check_dynamic(graph, model)
    return model


def external_weights(model: onnx.ModelProto, graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The live tensors that `model` (from `export_onnx` of the same graph, perhaps with other weights) leaves outside.

    Raises:
        LoweringError: the graph has no such tensor, or one of another shape.
    """
    found = {}
    for initializer in model.graph.initializer:
        if initializer.data_location != initializer.EXTERNAL:
            continue
        target = initializer.name.removeprefix("@")
        try:
            tensor = graphs.attribute(graph, target)
        except AttributeError as error:
            raise LoweringError(f"the stored model needs {target}, which the graph does not have") from error
        if tuple(tensor.shape) != tuple(initializer.dims):
            raise LoweringError(
                f"{target} has shape {list(tensor.shape)}, the stored model expects {list(initializer.dims)}"
            )
        found[initializer.name] = tensor.detach()
    return found


# --- fx graph -> ExportedProgram


def _results(graph: fx.GraphModule) -> list[Any]:
    (returned,) = graph.graph.output_node().args
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _lifted(graph: fx.GraphModule) -> tuple[torch.export.ExportedProgram, dict[str, torch.Tensor]]:
    """The graph as an ExportedProgram whose weights are inputs, and those by attribute, in order.

    Built directly: tracing the graph once more costs as much as capturing it, and the metadata is already here.
    """
    lifted, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.graph.find_nodes(op="placeholder"):
        copies[node] = lifted.placeholder(node.name)
        copies[node].meta = {"val": graphs.val(node)}
    attributes: dict[str, torch.Tensor] = {}
    by_target: dict[str, fx.Node] = {}
    returned: tuple[fx.Node, ...] = ()
    # One input a target, even where two name one tensor: another model with this graph may not tie its weights.
    for node, tensor in graphs.tensor_attributes(graph):
        target = str(node.target)
        if target not in by_target:
            by_target[target] = lifted.placeholder(f"attribute_{len(attributes)}")
            by_target[target].meta = {"val": graphs.val(node)}
            attributes[target] = tensor.detach()
        copies[node] = by_target[target]
    for node in graph.graph.nodes:
        if node in copies:
            continue
        if node.op == "output":
            returned = tuple(copies[r] for r in _results(graph))
            copies[node] = lifted.output(returned)
        else:
            copies[node] = lifted.node_copy(node, lambda n: copies[n])
            # stack_trace is what torch.onnx keeps with each ONNX node: here, where it came from in this graph
            copies[node].meta = {"val": graphs.val(node), "stack_trace": node.name}
    names = [str(n.name) for n in lifted.find_nodes(op="placeholder")]
    results = [str(n.name) for n in returned]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(n), None, None) for n in names],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n), None) for n in results],
    )
    in_spec = pytree.tree_flatten((tuple(range(len(names))), {}))[1]
    out_spec = pytree.tree_flatten(tuple(range(len(results))))[1]
    call = ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec, names))
    program = torch.export.ExportedProgram(
        torch.nn.Module(), lifted, signature, {}, _ranges(graph), [call], constants={}
    )
    return program, attributes


def _ranges(graph: fx.GraphModule) -> dict[Any, Any]:
    ranges: dict[Any, Any] = {}
    for node in graph.graph.nodes:
        value = graphs.val(node)
        sizes: tuple[Any, ...] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        for size in sizes:
            if isinstance(size, torch.SymInt):
                known = size.node.shape_env.var_to_range
                ranges.update({s: known[s] for s in size.node.expr.free_symbols if s in known})
    return ranges


# --- silence, reasons


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The exporter warns about packages that are not installed and about folding attempts; what matters is raised.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The innermost cause says what; the ones around it are advice on reporting bugs to PyTorch."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:500] if lines else '(no message)'}"


# --- initializers


def _fill_in_initializers(model: onnx.ModelProto, tensors: Mapping[str, torch.Tensor], external_bytes: int) -> None:
    graph = model.graph
    used = {name for node in all_nodes(graph) for name in node.input} | {o.name for o in graph.output}
    kept = [i for i in graph.input if i.name not in tensors]
    for value in graph.input:
        if value.name not in tensors or value.name not in used:
            continue
        tensor = tensors[value.name]
        initializer = graph.initializer.add(
            name=value.name, data_type=value.type.tensor_type.elem_type, dims=list(tensor.shape)
        )
        if is_external(tensor, external_bytes):
            initializer.data_location = initializer.EXTERNAL
            for key, text in (("location", "supplied-by-accelkit"), ("offset", "0"), ("length", str(tensor.nbytes))):
                initializer.external_data.add(key=key, value=text)
        else:
            initializer.raw_data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    del graph.input[:]
    graph.input.extend(kept)


def _check_dynamic(graph: fx.GraphModule, model: onnx.ModelProto) -> None:
    """A dynamic dimension that the exporter froze would be a model that is wrong at other sizes: refuse it."""
    values = {v.name: v for v in [*model.graph.input, *model.graph.output]}
    wanted = {str(n.name): n for n in graph.graph.find_nodes(op="placeholder")}
    wanted |= {f"output_{i}": n for i, n in enumerate(_results(graph))}
    for name, node in wanted.items():
        tensor = values[name].type.tensor_type
        if not tensor.HasField("shape"):
            continue
        for index, (size, dim) in enumerate(zip(graphs.val(node).shape, tensor.shape.dim, strict=True)):
            if isinstance(size, torch.SymInt) and dim.HasField("dim_value"):
                raise LoweringError(
                    f"the ONNX exporter fixed dimension {index} of {node.name} at {dim.dim_value}, "
                    f"but it is dynamic ({size})"
                )


__all__ = ["EXTERNAL_BYTES", "export_onnx", "external_weights", "initializer_name", "is_external"]
