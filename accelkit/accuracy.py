"""How wrong a result is: relative error against a float64 run of the captured program.

    error(output) = |output - reference| / |reference|   (Frobenius norm, per output)
    right         = error <= 2 * error of plain PyTorch in the same precision + floor

Twice plain PyTorch's own error is the bound that flash-attention's tests use (Dao et al., 2022). The floor is for outputs that
plain PyTorch happens to hit exactly: 8 epsilon of float32; in a narrower precision (1 + 7 / sqrt(n)) epsilon for n elements, since
the chance to hit all of them shrinks so. `tolerance=` replaces the bound by a fixed one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.precision import Precision

YARDSTICK_FACTOR = 2.0
FLOOR_EPSILONS = 8.0
_WIDE_EPSILON = float(torch.finfo(torch.float64).eps)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OutputError:
    """One output's error.

    Attributes:
        name: the output.
        error: relative error against float64 (share of differing elements for integers and booleans).
        yardstick: the same of plain PyTorch in the same precision; None where it could not run, or overflowed throughout.
        allowed: the largest error that counts as right.
    """

    name: str
    error: float
    yardstick: float | None
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """|result - reference| / |reference| in float64; where both are NaN, or the same infinity, they agree.

    For integers and booleans: the share of elements that differ. A NaN on one side only, or another shape, is infinitely wrong.
    """
    if result.shape != reference.shape:
        return math.inf
    if not (reference.is_floating_point() or reference.is_complex()):
        return float((result.cpu() != reference.cpu()).double().mean()) if reference.numel() else 0.0
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = result.detach().to("cpu", wide), reference.detach().to("cpu", wide)
    agree = (a == b) | (a.isnan() & b.isnan())
    a, b = a[~agree], b[~agree]
    if not a.numel():
        return 0.0
    difference = float((a - b).abs().square().sum().sqrt())
    scale_values = reference.detach().to("cpu", wide).abs()
    scale = float(scale_values[scale_values.isfinite()].square().sum().sqrt())
    if math.isnan(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


def check_outputs(
    results: Sequence[Any],
    references: Sequence[Any],
    plain: Sequence[Any] | None,
    names: Sequence[str],
    precision: Precision,
    tolerance: float | None,
) -> list[OutputError]:
    """Each tensor output's error, beside plain PyTorch's own and what is allowed."""
    checked = []
    for index, (result, reference, name) in enumerate(zip(results, references, names, strict=True)):
        if not isinstance(result, torch.Tensor) or not isinstance(reference, torch.Tensor):
            same = result == reference
            checked.append(OutputError(name, 0.0 if same else math.inf, None, 0.0))
            continue
        yardstick, truth = None, reference
        if plain is not None:
            yardstick = _yardstick(plain[index], reference)
            truth = _overflowed(result, plain[index], reference)
        error = relative_error(result, truth)
        allowed = tolerance if tolerance is not None else _allowed(yardstick, precision, result, reference)
        checked.append(OutputError(name, error, yardstick, allowed))
    return checked


def _yardstick(plain: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Plain PyTorch's error where it does not overflow; None where it overflows throughout."""
    lost = _lost(plain, reference)
    if lost is None or not bool(lost.any()):
        return relative_error(plain, reference)
    return None if bool(lost.all()) else relative_error(plain[~lost], reference[~lost])


def _overflowed(result: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The reference, with plain PyTorch's infinity or NaN where that does not fit its dtype and the result has the same."""
    lost = _lost(plain, reference)
    if lost is None or result.shape != plain.shape or not result.is_floating_point() or not bool(lost.any()):
        return reference
    same = (result == plain) | (result.isnan() & plain.isnan())
    return torch.where(lost & same, plain.to(reference.dtype), reference)


def _lost(plain: torch.Tensor, reference: torch.Tensor) -> torch.Tensor | None:
    """Where plain PyTorch has infinity or NaN for a finite value; None for what is not floating point."""
    if not reference.is_floating_point() or not plain.is_floating_point() or plain.shape != reference.shape:
        return None
    return reference.isfinite() & ~plain.isfinite()


def _allowed(yardstick: float | None, precision: Precision, result: torch.Tensor, reference: torch.Tensor) -> float:
    if not (reference.is_floating_point() or reference.is_complex()):
        return YARDSTICK_FACTOR * (yardstick or 0.0)
    epsilon = precision.epsilon
    if result.dtype in (torch.float64, torch.complex128) and yardstick is not None and yardstick < _WIDE_EPSILON * 64:
        epsilon = _WIDE_EPSILON  # plain PyTorch computed it in float64 throughout, so accelkit must as well
    narrow = epsilon > torch.finfo(torch.float32).eps
    if yardstick is None or not math.isfinite(yardstick):
        # Rounding errors of a deep network accumulate about as the square root of its length: 64 roundings' worth of float32's
        # epsilon; narrow precisions accumulate in float32, so that 8 are enough.
        return (FLOOR_EPSILONS if narrow else 64.0) * epsilon
    floor = (1.0 + (FLOOR_EPSILONS - 1.0) / math.sqrt(max(1, reference.numel()))) if narrow else FLOOR_EPSILONS
    return YARDSTICK_FACTOR * yardstick + floor * epsilon


def reference_outputs(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The graph's outputs computed in float64, node by node: weights are widened one operator at a time and let go again.

    Peak memory is the activations' plus one operator's weights in float64. Nothing of the model is written to.
    """
    return _WideRun(graph).run(inputs)


class _WideRun:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        nodes = list(graph.graph.nodes)
        self.last_use = {used: node for node in nodes for used in node.all_input_nodes}
        self.written = graphs.written_roots(graph.graph)

    @torch.no_grad()
    def run(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = _widen(next(given).detach(), copy=node in self.written)
            elif node.op == "get_attr":
                value = graphs.attribute(self.graph, str(node.target))
                # left narrow until an operator reads it; one that is written to becomes a copy now
                values[node] = _widen(value, copy=True) if node in self.written else value
            elif node.op == "output":
                (returned,) = node.args
                return tuple(_widen(values[r]) if isinstance(r, fx.Node) else r for r in _as_tuple(returned))
            else:
                values[node] = self._call(node, values)
            for used in node.all_input_nodes:
                if self.last_use[used] is node:
                    del values[used]
        raise AssertionError("a graph without an output node")  # fx graphs always have one

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.target is torch.ops.aten.view.dtype:
            raise NotImplementedError(
                f"{node.name} ({node.target}) reads the bits of a tensor, which are others in float64"
            )
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _widen(values[n]))
        args, kwargs = _wide_dtypes(args), _wide_dtypes(kwargs)
        target: Any = node.target
        if node.op == "call_module":
            target = graphs.attribute(self.graph, str(node.target))
        return target(*args, **kwargs)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _widen(value: Any, copy: bool = False) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype in _FLOATS:
            return value.double()
        if value.dtype == torch.complex64:
            return value.to(torch.complex128)
        return value.clone() if copy else value
    return value


def _wide_dtypes(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FLOATS else torch.complex128 if value == torch.complex64 else value
    if isinstance(value, (tuple, list)):
        return type(value)(_wide_dtypes(v) for v in value)
    if isinstance(value, dict):
        return {k: _wide_dtypes(v) for k, v in value.items()}
    return value
