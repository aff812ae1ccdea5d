"""The forms that TensorRT fuses, where they differ from the ones in accelkit.onnx_fused: three tables, empty where no other
form measured faster.

    fx graph --REWRITES--> fx graph --FORMS, one operator at a time--> ONNX --(the pipeline's ONNX passes)--> MODEL_REWRITES

One function a form, so that a better one is a change of one line. Each says which of TensorRT's fusions it is for and what
measured it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    import onnx

REWRITES: tuple[Callable[[fx.GraphModule], fx.GraphModule], ...] = ()
"""Over the graph; each gives a copy, or the graph itself where there is nothing to do."""

FORMS: Mapping[Callable[..., Any], Callable[..., Any]] = {}
"""ONNX forms by operator overload, as `export_onnx(translations=...)` takes them: see accelkit.onnx_translations."""

MODEL_REWRITES: tuple[Callable[[onnx.ModelProto], None], ...] = ()
"""Over the ONNX model, in place, after the pipeline's ONNX passes."""


def rewritten(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph that the network is written from, and whose weights it has; `graph` is not changed."""
    for rewrite in REWRITES:
        graph = rewrite(graph)
    return graph
