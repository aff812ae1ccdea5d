"""ONNX operator set 18 -> 17, the newest that TensorRT 8.6's parser is documented for.

    ReduceMean(x, axes=[-1] as an input)        ->  ReduceMean(x) with axes=[-1] as an attribute
    Pad(x, pads, value), Resize, Split, ...     ->  the same: what they use of 18 is in 17 too
    BitwiseAnd, Mish, Pad(x, pads, value, axes) ->  stays; the model stays at 18, and the parser names what it refuses

The exporter writes 18 and gives up on converting a model in which any axes are an initializer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from accelkit.onnx_weights import all_nodes

if TYPE_CHECKING:
    import onnx

EXPORTED, WANTED = 18, 17
_REDUCTIONS = frozenset(
    f"Reduce{name}" for name in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
_NEW = frozenset(
    ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "GroupNormalization", "Mish")
)
_NEW_ATTRIBUTES = {
    ("LpPool", "ceil_mode"): 0,
    ("LpPool", "dilations"): None,
    ("Resize", "antialias"): 0,
    ("Resize", "axes"): None,
    ("Resize", "keep_aspect_ratio_policy"): b"stretch",
}
"""With the values that mean what 17 does; None where only leaving it out does."""


def to_opset_17(model: onnx.ModelProto) -> str | None:
    """Bring `model` to operator set 17 in place; what keeps it from that, or None."""
    standard = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if standard.version <= WANTED:
        return None
    if standard.version != WANTED + 1:
        return f"is written in operator set {standard.version}"
    constants, uneven = _integer_constants(model), _uneven_splits(model)
    nodes = list(all_nodes(model.graph))
    for node in nodes:
        if (why := _obstacle(node, constants, uneven)) is not None:
            return f"{node.op_type} ({node.name}) {why}"
    for node in nodes:
        if node.op_type in _REDUCTIONS and not node.domain:
            _axes_as_attribute(node, constants)
        elif not node.domain:
            new = [name for kind, name in _NEW_ATTRIBUTES if kind == node.op_type]
            _drop(node, ["num_outputs"] if node.op_type == "Split" else new)
    standard.version = WANTED
    return None


def _obstacle(node: onnx.NodeProto, constants: dict[str, list[int]], uneven: Collection[str]) -> str | None:
    from onnx import helper

    if node.domain:
        return None
    if node.op_type in _NEW:
        return f"is new in operator set {WANTED + 1}"
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in _REDUCTIONS and len(node.input) > 1 and node.input[1] and node.input[1] not in constants:
        return "takes its axes from a computation"
    if node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
        return "names the axes that it pads"
    if node.op_type in ("ScatterElements", "ScatterND") and given.get("reduction") in (b"max", b"min"):
        return f"reduces by {given['reduction'].decode()}"
    if node.op_type == "Split" and len(node.input) < 2 and node.output[0] in uneven:
        return "cuts into parts that may differ in size"
    for (kind, name), old in _NEW_ATTRIBUTES.items():
        if kind == node.op_type and given.get(name, old) != old:
            return f"uses {name}, which is new in operator set {WANTED + 1}"
    return None


def _axes_as_attribute(node: onnx.NodeProto, constants: dict[str, list[int]]) -> None:
    axes = constants[node.input[1]] if len(node.input) > 1 and node.input[1] else []
    empty_means_none = any(a.name == "noop_with_empty_axes" and a.i for a in node.attribute)
    _drop(node, ("noop_with_empty_axes",))
    del node.input[1:]
    if axes:
        node.attribute.add(name="axes", type=7, ints=axes)  # AttributeProto.INTS
    elif empty_means_none:
        node.op_type = "Identity"
        del node.attribute[:]


def _drop(node: onnx.NodeProto, names: Collection[str]) -> None:
    kept = [type(a).FromString(a.SerializeToString()) for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _uneven_splits(model: onnx.ModelProto) -> set[str]:
    """First results of the Splits whose parts are not known to be of one size, which 17 makes of them."""
    from onnx import helper

    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    sizes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    found = set()
    for node in all_nodes(model.graph):
        if node.op_type == "Split":
            axis = next((int(helper.get_attribute_value(a)) for a in node.attribute if a.name == "axis"), 0)
            parts = {sizes[o][axis] if sizes.get(o) else 0 for o in node.output}
            if len(parts) > 1 or 0 in parts:
                found.add(node.output[0])
    return found


def _integer_constants(model: onnx.ModelProto) -> dict[str, list[int]]:
    """int64 values that the model holds, by name."""
    from onnx import numpy_helper

    found = {
        i.name: numpy_helper.to_array(i).reshape(-1).tolist()
        for i in model.graph.initializer
        if i.data_type == 7 and i.data_location != i.EXTERNAL  # TensorProto.INT64
    }
    for node in all_nodes(model.graph):
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value" and attribute.t.data_type == 7:
                found[node.output[0]] = numpy_helper.to_array(attribute.t).reshape(-1).tolist()
            elif attribute.name in ("value_int", "value_ints"):
                found[node.output[0]] = list(attribute.ints) or [attribute.i]
    return found
