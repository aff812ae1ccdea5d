"""Weights that are not in an ONNX model, and libraries that want to read them: public helpers for OnnxPass authors.

hidden = hide_weights(model)      external initializers become inputs
...                               a library's pass: it folds no value, and takes no two weights for equal
restore_weights(model, hidden)    and are initializers again
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def hide_weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Turn the external initializers of `model` into inputs, in place; returns them for `restore_weights`.

    For passes built on libraries that would read the values that are not there: they would fold them, or take two
    weights for equal because both look empty.
    """
    from onnx import helper

    graph = model.graph
    hidden = [i for i in graph.initializer if i.data_location == i.EXTERNAL]
    kept = [i for i in graph.initializer if i.data_location != i.EXTERNAL]
    hidden = [type(i).FromString(i.SerializeToString()) for i in hidden]
    kept = [type(i).FromString(i.SerializeToString()) for i in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in hidden)
    return hidden


def restore_weights(model: onnx.ModelProto, hidden: list[onnx.TensorProto]) -> None:
    """Turn the inputs that `hide_weights` made back into initializers, in place; those that nothing reads any more
    go."""
    graph = model.graph
    names = {i.name for i in hidden}
    used = {name for node in all_nodes(graph) for name in node.input} | {o.name for o in graph.output}
    inputs = [i for i in graph.input if i.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)
    graph.initializer.extend(i for i in hidden if i.name in used)


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside them (If, Loop, Scan)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else ():  # GRAPH, GRAPHS
                yield from all_nodes(inner)
