"""gelu(linear(x, w, b)) -> accelkit.linear_activation(x, w, b, "gelu"), likewise gelu_tanh, relu and silu

The activation is computed before the product leaves the chip: one kernel, and one write and one read of the widest
tensor of a transformer less. Users spell activations in many ways:

    x * 0.5 * (1 + erf(x / sqrt(2)))    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))    x * sigmoid(x)

and in half precisions set_precision leaves casts among them. So what follows a linear layer is not compared with a list
of patterns but evaluated, in float64, at some 5000 numbers from -1e38 to 1e38, and compared with the activations: what
float32 could not tell from GELU is GELU, however it is spelled; the "quick" GELU, x * sigmoid(1.702 x), is not (it is
0.02 off), and is refused. Casts count as nothing: the fused operator rounds once, the spelled-out form many times.

The operator's `residual` stays empty: which additions a kernel takes along is its backend's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.ops.linear_activation import ACTIVATIONS, OPERATOR
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._fusion import (
    add_fused,
    bound,
    constant,
    erase_unused,
    is_cast,
    is_floating,
    nothing_used_outside,
    nothing_written_between,
    outside_users,
    require,
)  # fmt: skip

aten = torch.ops.aten

# Of one tensor and numbers, each element on its own.
ARITHMETIC = frozenset({
    aten.mul, aten.add, aten.sub, aten.rsub, aten.div, aten.neg, aten.pow, aten.square, aten.reciprocal,
})  # fmt: skip
CURVES = frozenset({
    aten.gelu, aten.relu, aten.silu, aten.erf, aten.erfc, aten.tanh, aten.sigmoid, aten.special_ndtr, aten.exp,
    aten.clamp, aten.clamp_min, aten.hardtanh, aten.relu6, aten.leaky_relu, aten.elu, aten.selu, aten.celu,
    aten.softplus, aten.mish, aten.hardswish, aten.hardsigmoid, aten.log_sigmoid,
})  # fmt: skip

_LARGE = torch.logspace(-30, 38, 137, dtype=torch.float64)
PROBES = torch.cat([torch.linspace(-12, 12, 4801, dtype=torch.float64), _LARGE, -_LARGE])
"""Where functions are compared: finely where activations bend, and out to the ends of float32."""

TOLERANCE = 2e-8
"""Of |x|: a third of float32's rounding (6e-8), and room for constants such as 0.7978846 for sqrt(2 / pi)."""
TOLERANCE_FLOAT64 = 1e-14
"""The same where the graph computes in float64: room for the spelled-out form's own rounding, 1e-16 a step."""


@dataclass(frozen=True)
class FuseLinearActivation(GraphPass):
    """activation(linear(x, w, b)) -> accelkit.linear_activation(x, w, b, activation)"""

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for linear in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
            values = _elementwise(graph, linear)
            if not any(_packet(node) in CURVES for node in values):
                continue
            try:
                result.rewrote(_fuse(graph, linear, values))
            except Refused as refusal:
                result.refused(linear, str(refusal))
        return result


def _fuse(graph: fx.GraphModule, linear: fx.Node, values: dict[fx.Node, torch.Tensor]) -> str:
    last, activation = _activation(linear, values)
    inside = _between(linear, last, values)
    nothing_used_outside(graph, inside, last)
    nothing_written_between(graph, linear, last)
    x, weight, bias = (bound(linear)[name] for name in ("input", "weight", "bias"))
    _check_operands(x, weight, bias)
    fused = add_fused(graph, OPERATOR, (x, weight, bias, activation), last)
    last.replace_all_uses_with(fused)
    erase_unused(graph, inside)
    return f"{activation} ({last.name}) into {linear.name}"


def _activation(linear: fx.Node, values: dict[fx.Node, torch.Tensor]) -> tuple[fx.Node, str]:
    """The last node that is an activation of the linear layer's result, in its dtype; one that nothing else looks into
    where there is one."""
    dtype = graphs.val(linear).dtype
    named = [(node, name) for node, value in values.items() if (name := _name(value, dtype)) is not None]
    require(bool(named), _unknown(linear, values))
    fitting = [(node, name) for node, name in named if graphs.val(node).dtype == dtype]
    widened = f"the activation's result is {graphs.val(named[0][0]).dtype}, {linear.name}'s {dtype}"
    require(bool(fitting), widened)
    alone = [(node, name) for node, name in fitting if _is_closed(linear, node, values)]
    return max(alone or fitting[:1], key=lambda found: len(_between(linear, found[0], values)))


def _check_operands(x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    shape, dtype = graphs.val(weight).shape, graphs.val(x).dtype
    require(len(shape) == 2, f"the weight ({weight.name}) has {len(shape)} dimension(s), not 2")
    require(all(type(size) is int for size in shape), f"the weight's ({weight.name}) size is known only at run time")
    for operand in (weight, bias):
        if operand is not None:
            other = graphs.val(operand).dtype
            require(other == dtype, f"{operand.name} is {other}, the input ({x.name}) {dtype}")
    plain = bias is None or list(graphs.val(bias).shape) == [shape[0]]
    require(plain, f"the bias is not one number for each of the {shape[0]} features")


# --- what follows a linear layer, as numbers


def _elementwise(graph: fx.GraphModule, linear: fx.Node) -> dict[fx.Node, torch.Tensor]:
    """What is computed of the linear layer's result alone, element by element: each node's values at PROBES."""
    values = {linear: PROBES}
    waiting = list(linear.users)
    while waiting:
        node = waiting.pop(0)
        if node not in values and (value := _evaluated(graph, node, values)) is not None:
            values[node] = value
            waiting += node.users
    del values[linear]
    return values


def _evaluated(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    if is_cast(node):
        return values.get(node.args[0])  # type: ignore[arg-type]
    if _packet(node) not in ARITHMETIC | CURVES or not is_floating(node):
        return None
    operands = {i: values[i] if i in values else _number(graph, i) for i in node.all_input_nodes}
    if any(operand is None for operand in operands.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
    target: Any = node.target
    evaluated = target(*args, **kwargs)
    return evaluated if isinstance(evaluated, torch.Tensor) else None


def _number(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """A constant that is one number, such as a folded sqrt(2 / pi)."""
    if node.op != "get_attr" or not is_floating(node) or graphs.val(node).dim() != 0:
        return None
    try:
        return constant(graph, node, "a number").double().cpu()
    except Refused:
        return None


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _name(value: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The activation that these values are those of."""
    allowed = (TOLERANCE_FLOAT64 if dtype is torch.float64 else TOLERANCE) * PROBES.abs()
    for name, activation in ACTIVATIONS.items():
        if name != "none" and bool(((value - activation(PROBES)).abs() <= allowed).all()):
            return name
    return None


def _unknown(linear: fx.Node, values: dict[fx.Node, torch.Tensor]) -> str:
    names = [name for name in ACTIVATIONS if name != "none"]
    curve = next(node for node in values if _packet(node) in CURVES)
    reason = f"what follows {linear.name} ({curve.target}) is none of {', '.join(names)}"
    near = PROBES.abs() <= 12
    errors = {
        name: float((value - ACTIVATIONS[name](PROBES))[near].abs().max())
        for name in names
        for value in values.values()
    }
    nearest = min(errors, key=errors.__getitem__)
    return f"{reason}; it differs from {nearest} by up to {errors[nearest]:.2g}" if errors[nearest] < 0.1 else reason


# --- the nodes between a linear layer and its activation's last


def _between(linear: fx.Node, last: fx.Node, values: dict[fx.Node, torch.Tensor]) -> set[fx.Node]:
    inside, stack = {linear}, [last]
    while stack:
        node = stack.pop()
        if node not in inside and node in values:
            inside.add(node)
            stack += node.all_input_nodes
    return inside


def _is_closed(linear: fx.Node, last: fx.Node, values: dict[fx.Node, torch.Tensor]) -> bool:
    inside = _between(linear, last, values)
    return not any(outside_users(node, inside) for node in inside - {last})
