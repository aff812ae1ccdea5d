"""The forms that TensorRT fuses, where they differ from the ones in accelkit.onnx_fused: three tables.

    fx graph --REWRITES--> fx graph --FORMS, one operator at a time--> ONNX --(the pipeline's ONNX passes)--> MODEL_REWRITES

One function a form, so that a better one is a change of one line. What was tried, and what it did, is in docs/tensorrt.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from accelkit import onnx_fused, ops
from accelkit.backends.tensorrt.masks import finite_masks
from accelkit.backends.tensorrt.outputs import name_outputs
from accelkit.backends.tensorrt.patches import patches_as_rows
from accelkit.onnx_split import split_linears
from accelkit.onnx_translations import operators

if TYPE_CHECKING:
    import onnx

REWRITES: tuple[Callable[[fx.GraphModule], fx.GraphModule], ...] = (
    split_linears,  # a piece of a merged product is a copy, with a kernel of its own
    patches_as_rows,  # the convolution is slow, and has its operands permuted first
    finite_masks,  # what guards rows that see nothing stands between attention's operators, and keeps them from being fused
)
"""Over the graph; each gives a copy, or the graph itself where there is nothing to do."""

MODEL_REWRITES: tuple[Callable[[onnx.ModelProto], None], ...] = (name_outputs,)
"""Over the ONNX model, in place, after the pipeline's ONNX passes."""


def rewritten(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph that the network is written from, and whose weights it has; `graph` is not changed."""
    for rewrite in REWRITES:
        graph = rewrite(graph)
    return graph


# --- operator by operator


def attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Any:
    """Of `rewritten` graphs: a mask of numbers is finite, and added to the scores as it is."""
    if mask is None or causal or mask.dtype != query.dtype:
        return onnx_fused.attention(query, key, value, mask, causal, scale)
    result = onnx_fused.attended(query, key, value, mask, False, scale)
    return operators().Transpose(result, perm=[0, 2, 1, 3])


def patch_embedding(image: Any, weight: Any, bias: Any) -> Any:
    """Of an image whose size is known at run time only: a convolution."""
    op = operators()
    features, _, *patch = weight.shape
    y = op.Conv(image, weight, bias, kernel_shape=patch, strides=patch)
    return op.Transpose(op.Reshape(y, op.Constant(value_ints=[0, features, -1])), perm=[0, 2, 1])


def gelu(self: Any, approximate: str = "none") -> Any:
    """Spelled out: the operator Gelu came with operator set 20."""
    return onnx_fused.ACTIVATIONS["gelu" if approximate == "none" else "gelu_tanh"](self, self.dtype)


FORMS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    ops.attention.OPERATOR.overload: attention,
    ops.patch_embedding.OPERATOR.overload: patch_embedding,
    torch.ops.aten.gelu.default: gelu,
}
"""ONNX forms by operator overload, as `export_onnx(translations=...)` takes them: see accelkit.onnx_translations."""
