"""The places of a graph that a scheme may quantise: linear layers, convolutions, attention, residual sums.

    linear(x, weight, bias)       ->  Site("encoder.layer.0.output.dense", tensors input, weight, aftergemm)
    attention(q, k, v)            ->  Site("encoder.layer.0.attention.self", matmul_q_input, ..., softmax_input)
    residual_layer_norm(x, r)     ->  Site("encoder.layer.0.output", residual_input)

A site is named by its weight (`encoder.layer.0.output.dense.weight` without the last part), or by the module whose forward
made it: the same in every process, on every target, so that calibrations and `keep` patterns can name it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops

aten = torch.ops.aten

LINEAR = (aten.linear.default, ops.linear_activation.OPERATOR.overload)
CONVOLUTION = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
PATCHES = ops.patch_embedding.OPERATOR.overload
ATTENTION = ops.attention.OPERATOR.overload
RESIDUAL = (ops.residual_layer_norm.OPERATOR.overload, ops.residual_rms_norm.OPERATOR.overload)
_FLOAT32 = (torch.float32,)


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        name: of the layer; unique in its graph.
        kind: linear, convolution, attention or residual.
        node: what computes it.
        final: a linear layer behind the last residual sum: pooler, classifier.
        refusal: why it cannot be quantised at all; empty where it can.
    """

    name: str
    kind: str
    node: fx.Node
    final: bool = False
    refusal: str = ""

    def argument(self, name: str) -> Any:
        return (graphs.bound_arguments(self.node) or {}).get(name)

    @property
    def bound(self) -> dict[str, Any]:
        return graphs.bound_arguments(self.node) or {}

    def matches(self, pattern: str) -> bool:
        """Whether an fnmatch pattern names the site: by its name, its node, its operator, or a module it lies in.

        `encoder.layer.0.attention` is all that lies in this module, `encoder.layer.0.attention:attention` its products alone.
        """
        full = str(self.node.target)
        names = [
            self.name,
            f"{self.name}:{self.kind}",
            self.node.name,
            full,
            full.rpartition(".")[0],
            *_module_paths(self.node),
        ]
        return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def find_sites(graph: fx.GraphModule) -> list[Site]:
    """All sites of an accelkit graph, in its order."""
    sums = [n for n in graph.graph.nodes if n.target in RESIDUAL or _is_sum(n)]
    before_sums = _ancestors(sums)
    names: dict[str, int] = {}
    found = []
    for node in graph.graph.nodes:
        kind = _kind(node)
        if kind is None:
            continue
        base = _name(graph, node)
        names[base] = names.get(base, 0) + 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        final = kind == "linear" and node not in before_sums and bool(sums)
        found.append(Site(name, kind, node, final, _refusal(graph, node, kind)))
    return found


def family_of(graph: fx.GraphModule) -> str:
    """`vit` where layers normalise before their sublayers, so that residual sums are read on beside their norm; `bert` where
    norms come last and nothing else reads a sum."""
    for node in graph.graph.nodes:
        if node.target in RESIDUAL and any(user.args[1] == 1 and user.users for user in node.users):
            return "vit"
    return "bert" if any(node.target in RESIDUAL for node in graph.graph.nodes) else "vit"


def _kind(node: fx.Node) -> str | None:
    if node.target in LINEAR:
        return "linear"
    if node.target in CONVOLUTION or node.target is PATCHES:
        return "convolution"
    if node.target is ATTENTION:
        return "attention"
    return "residual" if node.target in RESIDUAL else None


def _refusal(graph: fx.GraphModule, node: fx.Node, kind: str) -> str:
    bound = graphs.bound_arguments(node) or {}
    floats = [graphs.val(i) for i in node.all_input_nodes if isinstance(graphs.val(i), torch.Tensor)]
    if any(v.is_floating_point() and v.dtype not in _FLOAT32 for v in floats):
        kinds = sorted({str(v.dtype).removeprefix("torch.") for v in floats if v.is_floating_point()})
        return f"computes in {', '.join(kinds)}; only float32 layers are quantised"
    if bound.get("rows") is not None:
        return "its rows beyond a count known at run time only hold anything, and would be calibrated on"
    if kind in ("linear", "convolution") and bound["weight"].op != "get_attr":
        return f"its weight ({bound['weight'].name}) is computed at run time"
    if kind in ("linear", "convolution") and bound["weight"] in graphs.written_roots(graph.graph):
        return f"its weight ({bound['weight'].target}) is written to"
    if kind == "attention" and _grouped(bound):
        return "its heads are grouped: keys and values have fewer than queries"
    return ""


def _grouped(bound: dict[str, Any]) -> bool:
    query, key = (graphs.val(bound[name]).shape[2] for name in ("query", "key"))
    return not (isinstance(query, int) and isinstance(key, int) and query == key)


def _is_sum(node: fx.Node) -> bool:
    """x + y of two activations of one shape: a residual sum that no norm was fused with."""
    if node.target is not aten.add.Tensor or len(node.all_input_nodes) != 2:
        return False
    values = [graphs.val(n) for n in node.all_input_nodes]
    return all(
        n.op == "call_function" and isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() >= 2
        for n, v in zip(node.all_input_nodes, values, strict=True)
    ) and list(map(str, values[0].shape)) == list(map(str, values[1].shape))


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _name(graph: fx.GraphModule, node: fx.Node) -> str:
    paths = [path for path in _module_paths(node) if path]
    weight = (graphs.bound_arguments(node) or {}).get("weight")
    if node.target not in RESIDUAL and isinstance(weight, fx.Node) and weight.op == "get_attr":
        target = str(weight.target)
        if isinstance(graphs.attribute(graph, target), torch.nn.Parameter):
            return re.sub(r"[._]?weight$", "", target) or target
        if paths and node.target in LINEAR:  # made by a pass: several layers' weights in one
            parent = paths[-1].rpartition(".")[0]
            return f"{parent}.qkv" if parent else "qkv"
    return paths[-1] if paths else node.name


def _module_paths(node: fx.Node) -> Iterator[str]:
    """All modules the node lies in, from the outermost."""
    return (str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values())


def input_name(site: Site) -> str:
    """What the operator of a linear or convolution site calls its input."""
    return next(name for name in ("input", "x", "image") if name in site.bound)
