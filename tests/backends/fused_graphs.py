"""Graphs as the fastertransformer target gets them: a small model after the default passes, every linear layer fused.

On a CPU no kernel takes the operators; what is rewritten does not depend on that, so that the rewrites are tested here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from accelkit import graph as graphs
from accelkit.ops import OPERATORS
from accelkit.pass_api import GraphPass
from accelkit.testing import apply, trace
from accelkit_passes import default_passes


class Layer(nn.Module):
    """An encoder layer, [batch, length, width] in and out; post-norm as in BERT, or pre-norm as in vision transformers."""

    def __init__(self, width: int = 128, heads: int = 2, pre_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.pre_norm = heads, pre_norm
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result

    def feed_forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attend(self.first(x))
            return x + self.feed_forward(self.second(x))
        x = self.first(x + self.attend(x))
        result: Tensor = self.second(x + self.feed_forward(x))
        return result


class Case(nn.Module):
    """Three linear layers and two norms, put together by the test's `function(self, ...)`."""

    def __init__(self, function: Callable[..., Any], width: int = 128, affine: bool = True) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.other = (nn.LayerNorm(width, elementwise_affine=affine) for _ in range(2))

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)

    def normalised(self, x: Tensor, residual: Tensor, norm: nn.LayerNorm | None = None, **options: Any) -> Any:
        """(layer_norm(x + residual), x + residual)"""
        norm = norm or self.norm
        return torch.ops.accelkit.residual_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, **options)


def encoder(layers: int = 2, width: int = 128, pre_norm: bool = False) -> nn.Module:
    """Layers, and after pre-norm ones the norm that ends them; every weight random, biases and norms' included."""
    model = nn.Sequential(*(Layer(width, pre_norm=pre_norm) for _ in range(layers)))
    if pre_norm:
        model.append(nn.LayerNorm(width))
    return with_random_vectors(model)


def with_random_vectors(model: nn.Module) -> nn.Module:
    """The model in eval mode, its biases and norms moved away from zeros and ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def fused_graph(model: nn.Module, *inputs: Any, precision: str = "fp32", **options: Any) -> fx.GraphModule:
    """The graph after the default passes, with every linear layer as `accelkit.linear_activation`."""
    graph = trace(model, *inputs, **options)
    apply([one for one in default_passes(precision) if isinstance(one, GraphPass)], graph)
    return with_fused_linears(graph)


def with_fused_linears(graph: fx.GraphModule) -> fx.GraphModule:
    """What `prepare` does on a GPU, for every dtype."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        bound = graphs.bound_arguments(node) or {}
        arguments = (bound["input"], bound["weight"], bound["bias"], "none")
        with graph.graph.inserting_before(node):
            fused = graph.graph.call_function(OPERATORS["linear_activation"].overload, arguments)
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that a rewrite may change; tensors are shared."""
    return fx.GraphModule(graph, copy.deepcopy(graph.graph))


def operators(graph: fx.GraphModule) -> list[str]:
    """The fused operators and layer norms of a graph, in order, by their short names."""
    names = [
        str(node.target).split(".")[1]
        for node in graph.graph.nodes
        if node.op == "call_function" and "." in str(node.target)
    ]
    return [name for name in names if name in OPERATORS or name == "layer_norm"]


def body(graph: fx.GraphModule, first: int = 0) -> list[str]:
    """The lines of a graph's text, from value number `first` on, without inputs and weights."""
    lines = [line for line in graphs.graph_text(graph).splitlines() if not line.endswith((" = attribute", " = input"))]
    return lines[first:]
