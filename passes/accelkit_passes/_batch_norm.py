"""What the two batch-norm fusions share: reading an inference-mode batch norm as `y = x * scale + shift` per channel.

    (x - mean) / sqrt(var + eps) * weight + bias  ->  scale = weight / sqrt(var + eps), shift = bias - mean * scale

Everything here is float64; the caller rounds once, to the dtype of the weight that takes the fold.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit_passes._fusion import constant, require

aten = torch.ops.aten

# Training-level and functionalised graphs write the same thing differently; the latter give a tuple whose item 0 is the
# result.
DIRECT = (aten.batch_norm.default,)
TUPLED = (
    aten._native_batch_norm_legit_no_training.default, aten._batch_norm_no_update.default,
    aten.native_batch_norm.default, aten.cudnn_batch_norm.default,
)  # fmt: skip


@dataclass(frozen=True)
class BatchNorm:
    """An inference-mode batch norm.

    Attributes:
        result: the node that its users use (the norm itself, or item 0 of the tuple it gives).
        input: what it normalises.
        scale, shift: per channel, float64: the result is `input * scale + shift`.
        dtype: of its weight, bias and statistics.
    """

    result: fx.Node
    input: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor
    dtype: torch.dtype


def is_batch_norm(node: fx.Node) -> bool:
    return node.target in DIRECT or node.target in TUPLED


def input_of(norm: fx.Node) -> Any:
    """What the norm is applied to."""
    return (graphs.bound_arguments(norm) or {})["input"]


def read(graph: fx.GraphModule, norm: fx.Node) -> BatchNorm:
    """The batch norm at node `norm`.

    Raises:
        Refused: it normalises with the batch's own statistics, or its tensors are not constants.
    """
    bound = graphs.bound_arguments(norm) or {}
    names = ("running_mean", "running_var")
    require(not bound.get("training", False), f"{norm.name} normalises with the batch's own statistics (training mode)")
    require(all(bound[n] is not None for n in names), f"{norm.name} has no running statistics")
    mean, var = (constant(graph, bound[n], n) for n in names)
    weight = None if bound["weight"] is None else constant(graph, bound["weight"], "its weight")
    bias = None if bound["bias"] is None else constant(graph, bound["bias"], "its bias")
    dtypes = {t.dtype for t in (mean, var, weight, bias) if t is not None}
    require(len(dtypes) == 1, f"{norm.name} mixes {' and '.join(sorted(str(d) for d in dtypes))}")
    epsilon = bound["eps"] if "eps" in bound else bound["epsilon"]
    scale = torch.rsqrt(var.double() + epsilon)
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return BatchNorm(_result(norm), bound["input"], scale, shift, dtypes.pop())


def _result(norm: fx.Node) -> fx.Node:
    if norm.target in DIRECT:
        return norm
    items = [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]
    others = [user.name for user in norm.users if user not in items and user.users]
    require(not others, f"{norm.name}'s saved statistics are used by {', '.join(others)}")
    require(len(items) == 1, f"{norm.name}'s result is read {len(items)} times")
    return items[0]


def rounded(value: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """`value` in `dtype`; refuses what does not fit (a variance of 0 with eps 0, an overflow, NaN in the weights)."""
    result = value.to(dtype)
    require(bool(torch.isfinite(result).all()), f"the folded {what} is not finite in {dtype}")
    return result


def take_fold(graph: fx.GraphModule, target: fx.Node, norm: BatchNorm, weight: torch.Tensor, bias: torch.Tensor) -> str:
    """Give `target` (a convolution or linear) the folded weight and bias, let it stand for the norm, and say what it
    costs."""
    bound = graphs.bound_arguments(target) or {}
    source = bound["weight"]
    shared = [u.name for u in source.users if u is not target]
    bias_source = (
        bound["bias"].target if bound["bias"] is not None else str(source.target).removesuffix("weight") + "bias"
    )
    with graph.graph.inserting_before(target):
        names = [
            graphs.set_attribute(graph, f"{hint}_folded", value)
            for hint, value in ((source.target, weight), (bias_source, bias))
        ]
        new_weight, new_bias = (graph.graph.get_attr(name) for name in names)
    target.args = (target.args[0], new_weight, new_bias, *target.args[3:])
    target.kwargs = {k: v for k, v in target.kwargs.items() if k not in ("weight", "bias")}
    head = norm.result if norm.result.target is not operator.getitem else norm.result.all_input_nodes[0]
    norm.result.replace_all_uses_with(norm.input)
    weights = [source] if bound["bias"] is None else [source, bound["bias"]]
    for node in dict.fromkeys([*head.users, head, *head.all_input_nodes, *weights]):
        if not node.users and (node is head or head in node.all_input_nodes or node.op == "get_attr"):
            graph.graph.erase_node(node)
    size_bytes = weight.nbytes + bias.nbytes
    kept = f"; {source.name} stays for {', '.join(shared)}" if shared else ""
    return f"{head.name} into {target.name} (new weights of {size_bytes} bytes{kept})"
