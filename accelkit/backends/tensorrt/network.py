"""fx graph -> what TensorRT's parser reads: an ONNX file, its weights in one file beside it, and what each name stands for.

    graph --forms.py--> ONNX --the pipeline's ONNX passes--> operator set 17 --write()--> model.onnx, weights.bin

The weights go from PyTorch's memory into the file one tensor at a time: models above protobuf's 2 GB work, and at no time are
there two copies of all of them in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt.forms import FORMS, MODEL_REWRITES
from accelkit.backends.tensorrt.job import Shapes
from accelkit.backends.tensorrt.opset import EXPORTED, to_opset_17
from accelkit.backends.tensorrt.products import half_products, holds_products, summed_in_float32
from accelkit.culprits import culprits
from accelkit.errors import LoweringError
from accelkit.onnx_export import EXTERNAL_BYTES, export_onnx, external_weights
from accelkit.onnx_weights import all_nodes
from accelkit.pass_runner import run_onnx_passes

if TYPE_CHECKING:
    import onnx

MODEL, WEIGHTS = "model.onnx", "weights.bin"
ALIGNMENT = 4096  # of tensors in the weights' file: ONNX's advice, for readers that map it into memory
IR_VERSION = 8  # of files in operator set 17; newer ones make the parser of 8.6 warn
LARGEST = torch.iinfo(torch.int32).max
_FLOAT = 1  # TensorProto.FLOAT; below, all floating-point types
_FLOATING = (_FLOAT, 10, 11, 16)


@dataclass
class Network:
    """A network to build.

    Attributes:
        model: the ONNX model; weights of a kilobyte and more are outside.
        weights: those, by the initializer's name.
        origins: fx node's name by ONNX node's name, and by the names of ONNX nodes' results.
        profile: by input, its smallest, tuned and largest shape.
        precision: the lowest precision that the graph computes in, or `tf32`.
        keep_fp32: names of the ONNX nodes that compute in float32 in a network of a lower precision: 8.6 has to be told, and
            the proof allows them.
        wide: names of the products that are summed in float32 for accuracy.
        demanded: names of the products that 8.6 is told to run in `precision`, which it is only allowed to otherwise.
    """

    model: onnx.ModelProto
    weights: dict[str, torch.Tensor]
    origins: Mapping[str, str]
    profile: dict[str, Shapes]
    precision: str
    keep_fp32: tuple[str, ...]
    wide: tuple[str, ...] = ()
    demanded: tuple[str, ...] = ()

    @property
    def tf32(self) -> bool:
        """Whether float32 products may run in tf32: those that are wide for accuracy alone may, what the graph keeps not."""
        return bool(self.wide) and not holds_products(self.model, self.keep_fp32)

    def with_wide(self, nodes: tuple[str, ...], typed: bool) -> Network:
        """The same with these products summed in float32: by casts in strongly typed networks, by name in others."""
        model = summed_in_float32(self.model, nodes) if typed and nodes else self.model
        return replace(self, model=model, wide=nodes)

    def demanding(self) -> Network:
        """The same with all products that are not in float32 on purpose told to run in the precision that was asked for."""
        return replace(self, demanded=half_products(self.model, {*self.keep_fp32, *self.wide}))

    @property
    def weight_bytes(self) -> int:
        """Of the weights outside the model."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    def write(self, folder: Path | str) -> Path:
        """The model's path in `folder`; its weights lie beside it.

        Raises:
            OSError: no room.
        """
        places: dict[Any, tuple[int, int]] = {}
        with open(Path(folder, WEIGHTS), "wb") as file:
            for initializer in self.model.graph.initializer:
                if initializer.data_location != initializer.EXTERNAL:
                    continue
                tensor = self.weights[initializer.name]
                memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                if memory not in places:  # tied weights are written once
                    places[memory] = _append(file, tensor)
                offset, length = places[memory]
                del initializer.external_data[:]
                for key, text in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
                    initializer.external_data.add(key=key, value=text)
        path = Path(folder, MODEL)
        path.write_bytes(self.model.SerializeToString(deterministic=True))
        return path

    def in_graph(self, reasons: Mapping[str, str]) -> dict[str, str]:
        """The fx nodes that ONNX nodes were written for, with the reasons given for these."""
        found: dict[str, str] = {}
        for name, reason in reasons.items():
            if (origin := self.origins.get(name)) is not None:
                found.setdefault(origin, reason)
        return found


def network_of(
    graph: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    context: CompileContext,
    *,
    external_bytes: int = EXTERNAL_BYTES,
) -> Network:
    """The network of `graph`, tuned for the shapes of `inputs`.

    Args:
        graph: an accelkit graph.
        inputs: examples of its inputs.
        context: the precision, and the ONNX passes, whose records are added to the ledger.
        external_bytes: floating-point tensors from this size on are weights, the others part of the model.

    Raises:
        LoweringError: the exporter cannot take a node (`nodes` names it), or a dynamic dimension has no largest size.
    """
    profile = profile_of(graph, inputs)
    model = exported(graph, external_bytes)
    origins = origins_of(model)
    if context.onnx_passes:
        model, records = run_onnx_passes(model, context.onnx_passes, lambda one: context.progress(str(one)))
        context.records.extend(records)
    for rewrite in MODEL_REWRITES:
        rewrite(model)
    _renew_origins(model, origins)
    to_opset_17(model)  # what it cannot bring there is for the parser to judge
    model.ir_version = min(model.ir_version, IR_VERSION)
    _strip(model)
    precision = precision_of(graph, context.precision.name)
    kept = float32_nodes(model) if precision in ("fp16", "bf16") else ()
    return Network(model, external_weights(model, graph), origins, profile, precision, kept)


def exported(graph: fx.GraphModule, external_bytes: int = EXTERNAL_BYTES) -> onnx.ModelProto:
    """The graph in TensorRT's forms; an error names the nodes that fail alone."""

    def attempt(part: fx.GraphModule) -> str | None:
        try:
            export_onnx(part, opset=EXPORTED, translations=FORMS)
        except LoweringError as failure:
            return str(failure)
        return None

    try:
        return export_onnx(graph, opset=EXPORTED, translations=FORMS, external_bytes=external_bytes)
    except LoweringError as error:
        raise LoweringError(str(error), culprits(graph, attempt)) from error


# --- the profile


def profile_of(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> dict[str, Shapes]:
    """By input: its smallest shape, the example's, and its largest."""
    profile: dict[str, Shapes] = {}
    for node, example in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        name, sizes = str(node.name), list(graphs.val(node).shape)
        bounds = [_bounds(size, f"dimension {place} of {name}") for place, size in enumerate(sizes)]
        tuned = tuple(min(max(size, low), high) for size, (low, high) in zip(example.shape, bounds, strict=True))
        profile[name] = (tuple(low for low, _ in bounds), tuned, tuple(high for _, high in bounds))
    return profile


def _bounds(size: Any, what: str) -> tuple[int, int]:
    if not isinstance(size, torch.SymInt):
        return int(size), int(size)
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    if not bounds.upper.is_finite or bounds.upper > LARGEST:
        raise LoweringError(
            f"{what} has no largest size, and TensorRT plans an engine for a range: give its Dim a max in dynamic_shapes, such "
            "as Dim('batch', max=64)"
        )
    low = int(bounds.lower)
    # torch.export says 2 of a dimension that starts at 1: it traces with 2 and more
    return (low if low > 2 else 1), int(bounds.upper)


# --- precision


def precision_of(graph: fx.GraphModule, asked: str) -> str:
    """What the builder has to allow: a half precision where the graph computes in one, whatever was asked for."""
    dtypes = {v.dtype for v in map(graphs.val, graph.graph.nodes) if isinstance(v, torch.Tensor)}
    if torch.float16 in dtypes:
        return "fp16"
    if torch.bfloat16 in dtypes:
        return "bf16"
    return asked if asked in ("fp32", "tf32") else "fp32"


def float32_nodes(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the nodes whose floating-point arguments and results are all float32."""
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    types |= {i.name: i.data_type for i in inferred.initializer}
    kept = []
    for node in inferred.node:
        found = {types.get(name, 0) for name in [*node.input, *node.output] if name} & set(_FLOATING)
        result = {types.get(name, 0) for name in node.output if name}
        if found == {_FLOAT} and _FLOAT in result and node.op_type != "Constant":
            kept.append(node.name)
    return tuple(kept)


# --- names


_ORIGIN = "pkg.torch.onnx.stack_trace"  # where export_onnx leaves the fx node's name


def origins_of(model: onnx.ModelProto) -> dict[str, str]:
    """The fx node's name for each ONNX node's name and for the names of its results."""
    found: dict[str, str] = {}
    for node in all_nodes(model.graph):
        origin = next((entry.value for entry in node.metadata_props if entry.key == _ORIGIN), "")
        if origin:
            found.update(dict.fromkeys([node.name, *node.output], origin))
    found.pop("", None)
    return found


def _renew_origins(model: onnx.ModelProto, origins: dict[str, str]) -> None:
    """Give each node a name of its own, and find again what passes renamed, by the names of results."""
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        origin = origins.get(node.name) or next((origins[o] for o in node.output if o in origins), "")
        if not node.name or node.name in taken:
            node.name = _free(node.name or f"{node.op_type}_{number}", taken)
        taken.add(node.name)
        if origin:
            origins[node.name] = origin


def _free(name: str, taken: set[str]) -> str:
    base, number = re.sub(r"_again\d+$", "", name), 1
    while (candidate := f"{base}_again{number}") in taken:
        number += 1
    return candidate


def _strip(model: onnx.ModelProto) -> None:
    """Without the exporter's notes: each has a node's whole text, and older parsers do not know the field."""
    for node in all_nodes(model.graph):
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
        value.ClearField("doc_string")
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def _append(file: Any, tensor: torch.Tensor) -> tuple[int, int]:
    """Write a tensor's bytes; (offset, length)."""
    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset = file.tell()
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(values.numpy().data)
    return offset, values.numel()
