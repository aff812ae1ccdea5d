"""Identity(x) -> y   ->   y is the name of x

TensorRT copies for an Identity: in front of a result it is a whole pass over the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelkit.onnx_weights import all_nodes

if TYPE_CHECKING:
    import onnx


def name_outputs(model: onnx.ModelProto) -> None:
    """Take out, in place, each Identity but those that make a result of an input, of a constant or of another result."""
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    results = {value.name for value in graph.output}
    for node in [n for n in graph.node if n.op_type == "Identity" and not n.domain]:
        source, result = node.input[0], node.output[0]
        if result in results and (source not in made or source in results):
            continue
        graph.node.remove(node)
        if result in results:
            _rename(model, source, result)
            made.add(result)
        else:
            _rename(model, result, source)


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in all_nodes(model.graph):
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
    for value in list(model.graph.value_info):
        if value.name == old:
            model.graph.value_info.remove(value)
