"""norm(x; w, b) -> linear(., W)    ->    norm(x; w / s, b / s) -> linear(., W s)        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

SmoothQuant (Xiao and others, arXiv 2211.10438, equation 4): channels that are large in every token make the one scale of
an activation coarse for all others; what they have too much is moved into the weights, where scales are per channel or
values are close together. The same function up to rounding. Only where a norm with weights of its own gives the input, and
nothing but linear layers that are quantised reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit import ops
from accelkit.quantization.sites import Site, input_name

_NORMS = {
    torch.ops.aten.layer_norm.default,
    ops.residual_layer_norm.OPERATOR.overload,
    ops.residual_rms_norm.OPERATOR.overload,
    ops.embedding_layer_norm.OPERATOR.overload,
}


@dataclass
class Smoothed:
    """What was done: the norms' nodes and factors [width], and where nothing was, with the reason."""

    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    refusals: list[tuple[str, str]] = field(default_factory=list)


def smooth(
    graph: fx.GraphModule, sites: Sequence[Site], channels: Mapping[str, torch.Tensor], alpha: float
) -> Smoothed:
    """Fold the factors into norms and linear layers of `graph`, in place.

    Args:
        sites: those that will be quantised. channels: largest magnitudes of their inputs' channels, by site name.
        alpha: 0 leaves the activations as they are, 1 moves all of their differences into the weights.
    """
    done = Smoothed()
    readers: dict[fx.Node, list[Site]] = {}
    for site in sites:
        if site.kind == "linear" and not site.refusal and site.name in channels:
            readers.setdefault(site.bound[input_name(site)], []).append(site)
    for value, linear in readers.items():
        if reason := _obstacle(graph, value, linear):
            done.refusals += [(site.name, f"not smoothed: {reason}") for site in linear]
            continue
        norm = _norm(value)
        assert norm is not None
        weights = [graphs.attribute(graph, str(site.bound["weight"].target)).detach() for site in linear]
        widest = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
        largest = torch.stack([channels[site.name] for site in linear]).amax(0).to(widest.device)
        factors = (largest.clamp(min=1e-5) ** alpha / widest.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
        factors = torch.where((largest > 0) & (widest > 0), factors, 1.0)
        for name in ("weight", "bias"):
            if isinstance(node := (graphs.bound_arguments(norm) or {}).get(name), fx.Node):
                _replace(graph, norm, name, node, graphs.attribute(graph, str(node.target)).detach() / factors)
        for site, weight in zip(linear, weights, strict=True):
            _replace(graph, site.node, "weight", site.bound["weight"], weight * factors)
        done.factors[norm.name] = factors.cpu()
    return done


def _norm(value: fx.Node) -> fx.Node | None:
    """The norm whose normalised result the value is."""
    if value.target is operator.getitem and value.args[1] == 0:
        value = value.args[0]  # type: ignore[assignment]
    return value if value.target in _NORMS else None


def _obstacle(graph: fx.GraphModule, value: fx.Node, linear: Sequence[Site]) -> str:
    """Why the value's channels cannot be scaled; empty where they can."""
    norm = _norm(value)
    if norm is None:
        return "its input is not the result of a norm"
    weight = (graphs.bound_arguments(norm) or {}).get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return f"the norm before it ({norm.name}) has no weight of its own"
    own = {site.node for site in linear}
    if others := [user.name for user in value.users if user not in own]:
        return f"the norm's result is also read by {', '.join(others[:3])}"
    if any(value in (a for k, a in site.bound.items() if k != input_name(site)) for site in linear):
        return "the norm's result is also the layer's residual"
    return ""


def _replace(graph: fx.GraphModule, node: fx.Node, name: str, old: fx.Node, tensor: torch.Tensor) -> None:
    """Give one argument of `node` a new constant; others may go on reading the old one."""
    target = graphs.set_attribute(graph, f"{old.target}_smoothed", tensor)
    with graph.graph.inserting_before(node):
        constant = graph.graph.get_attr(target)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, argument in enumerate(schema) if argument.name == name)
    if position < len(node.args):
        node.update_arg(position, constant)
    else:
        node.update_kwarg(name, constant)
