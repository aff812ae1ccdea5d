"""Public helpers for those who write passes and backends, and want to test them as accelkit tests its own.

The five tests of a pass, one line each (`graph` is `trace(MyModule(), torch.randn(2, 8))`):

    apply(MyPass(), graph); assert graph_text(graph) == '''...'''              what it does
    assert_left_alone(MyPass(), module, x, reason="is also used by")           what it refuses, and why
    assert_idempotent(MyPass(), module, x)                                     a second run finds nothing to do
    assert_idempotent(MyPass(), module, x, dynamic_shapes={"x": {0: Dim("batch")}})     dynamic sizes, no new guard
    assert_same_numbers(MyPass(), module, x)                                   bit for bit, or bounded by float64

All of them run the pass under the runner's own invariants (`accelkit.pass_runner`). Failures say what differs, not only
that it does.

Example:
    >>> from dataclasses import dataclass
    >>> from accelkit.pass_api import RewritePass
    >>> aten = torch.ops.aten
    >>> @dataclass(frozen=True)
    ... class NegativeOfSub(RewritePass):
    ...     '''-(x - y) -> y - x'''
    ...     def pattern(self, x, y):
    ...         return aten.neg.default(aten.sub.Tensor(x, y))
    ...     def replacement(self, x, y):
    ...         return aten.sub.Tensor(y, x)
    ...     def check(self, match):
    ...         match.require(match.value("x").is_floating_point(), "integers are left to others")
    >>> class Distance(torch.nn.Module):
    ...     def forward(self, x, y):
    ...         return -(x - y)
    >>> x, y = torch.randn(2, 3), torch.randn(2, 3)
    >>> graph = trace(Distance(), x, y)
    >>> apply(NegativeOfSub(), graph).rewrites
    ('neg',)
    >>> print(graph_text(graph))
    %x: f32[2, 3] = input
    %y: f32[2, 3] = input
    %0: f32[2, 3] = aten.sub.Tensor(%y, %x)
    return (%0)
    >>> assert_same_numbers(NegativeOfSub(), Distance(), x, y)
    >>> assert_left_alone(NegativeOfSub(), Distance(), x.long(), y.long(), reason="integers are left to others")
    >>> assert_idempotent(NegativeOfSub(), Distance(), x, y).nodes_after
    1
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from accelkit.capture import capture
from accelkit.graph import graph_text
from accelkit.pass_api import GraphPass
from accelkit.pass_runner import PassRecord, fake_mode_of, run_passes

__all__ = [
    "apply",
    "assert_idempotent",
    "assert_left_alone",
    "assert_same_numbers",
    "float64_reference",
    "graph_text",
    "relative_error",
    "run",
    "trace",
    "units_in_last_place",
]

Passes = GraphPass | Sequence[GraphPass]


def trace(model: nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> fx.GraphModule:
    """The accelkit graph of a module for these inputs, exactly as `optimize` captures it (no pass has run)."""
    return capture(model, args, kwargs, dynamic_shapes=dynamic_shapes).graph


def apply(one: Passes, graph: fx.GraphModule) -> PassRecord:
    """Run a pass (or several; the last one's record is returned) on `graph` in place, under all of the runner's
    invariants."""
    return run_passes(graph, [one] if isinstance(one, GraphPass) else one)[-1]


def run(graph: fx.GraphModule, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run a graph on real tensors, without gradients."""
    with torch.no_grad():
        return tuple(graph(*inputs))


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64; NaN never passes a comparison.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == 1 / 34**0.5
    True
    """
    from accelkit.accuracy import relative_error as measure

    return measure(result, reference)


def float64_reference(model: nn.Module, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """What a module gives for these inputs in float64: the truth that errors are measured against, as a flat tuple.

    Without PyTorch's fast path of nn.TransformerEncoderLayer: on a GPU it takes the tanh form of GELU, in float64 too, which
    is 4e-5 off in a layer 64 wide.
    """
    from accelkit.twin import no_fused_multi_head_attention

    truth = copy.deepcopy(model).eval().double()
    widened = [i.double() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in inputs]
    with torch.no_grad(), no_fused_multi_head_attention():
        leaves = torch.utils._pytree.tree_leaves(truth(*widened))
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def units_in_last_place(result: torch.Tensor, expected: torch.Tensor) -> int:
    """How many floating-point numbers lie between the two tensors, at the element where it is most.

    0 is bit for bit the same, but that 0.0 equals -0.0 and any NaN any NaN. Both must have the same shape and dtype.

    >>> one = torch.ones(2)
    >>> units_in_last_place(torch.nextafter(one, torch.zeros(())), one)
    1
    """
    if result.dtype != expected.dtype or result.shape != expected.shape:
        raise AssertionError(f"{result.dtype}{list(result.shape)} is not {expected.dtype}{list(expected.shape)}")
    if not result.is_floating_point():
        return int(0 if torch.equal(result, expected) else torch.iinfo(torch.int64).max)
    if not torch.equal(torch.isnan(result), torch.isnan(expected)):
        return int(torch.iinfo(torch.int64).max)
    distance = (_ordered(result) - _ordered(expected)).abs()
    return int(distance.max()) if distance.numel() else 0


def _ordered(value: torch.Tensor) -> torch.Tensor:
    # Floating-point numbers in their order are sign and magnitude integers in theirs.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    bits = (
        torch.nan_to_num(value, nan=0.0, posinf=float("inf"), neginf=float("-inf"))
        .contiguous()
        .view(integers)
        .to(torch.int64)
    )
    return torch.where(bits < 0, torch.iinfo(integers).min - bits, bits)


def assert_left_alone(one: Passes, model: nn.Module, *inputs: Any, reason: str | None, **options: Any) -> None:
    """The pass changes nothing in the model's graph, and says why: `reason` is part of a refusal's text.

    `reason=None` says that nothing looks like the pass's business, so that there is no refusal at all. `options` are
    `trace`'s.

    Raises:
        AssertionError: something was rewritten, or no refusal has this reason (the ones there are get listed).
    """
    graph = trace(model, *inputs, **options)
    before = graph_text(graph)
    record = apply(one, graph)
    reasons = [refusal.reason for refusal in record.refusals]
    if record.rewrites or graph_text(graph) != before:
        raise AssertionError(f"{record.name} rewrote {list(record.rewrites)} in\n{before}")
    if reason is None and reasons:
        raise AssertionError(f"{record.name} refuses with {reasons}; expected nothing to refuse in\n{before}")
    if reason is not None and not any(reason in one for one in reasons):
        raise AssertionError(f"{record.name} does not refuse with {reason!r}, but {reasons} in\n{before}")


def assert_idempotent(one: Passes, model: nn.Module, *inputs: Any, **options: Any) -> PassRecord:
    """The pass rewrites something, a second run of it nothing more, and no dynamic size is frozen by either.

    Returns:
        the first run's record. `options` are `trace`'s (`dynamic_shapes`).

    Raises:
        AssertionError: nothing was rewritten at first, or something was the second time.
        PassError: a shape guard was added (or any other of the runner's invariants broken).
    """
    graph = trace(model, *inputs, **options)
    symbols = _symbols(graph)
    first = apply(one, graph)
    if not first.rewrites:
        raise AssertionError(
            f"{first.name} finds nothing to do (refusals: {list(first.refusals)}) in\n{graph_text(graph)}"
        )
    after = graph_text(graph)
    second = apply(one, graph)
    if second.rewrites or graph_text(graph) != after:
        raise AssertionError(f"a second run of {first.name} rewrote {list(second.rewrites)} in\n{after}")
    if _symbols(graph) != symbols:
        raise AssertionError(f"{first.name} turned the inputs' sizes {symbols} into {_symbols(graph)}")
    return first


def _symbols(graph: fx.GraphModule) -> list[str]:
    shapes = [node.meta["val"].shape for node in graph.graph.find_nodes(op="placeholder")]
    env = fake_mode_of(graph).shape_env
    return [
        str(env.replace(s.node.expr)) if env is not None and isinstance(s, torch.SymInt) else str(s)
        for t in shapes
        for s in t
    ]


def assert_same_numbers(
    one: Passes,
    model: nn.Module,
    *inputs: Any,
    ulps: int = 0,
    times: float | None = None,
    floor: float = 0.0,
    **options: Any,
) -> None:
    """The graph gives after the pass what it gave before.

    By default bit for bit (with `ulps`, that many floating-point numbers apart at most): what reorders no arithmetic
    can hold to that. With `times`, the relative error against the module in float64 (see `relative_error`) is at most
    `times` that of the graph before the pass, plus `floor`: for what rounds differently, not worse. `options` are
    `trace`'s.

    Raises:
        AssertionError: the pass rewrote nothing (the comparison would prove nothing), or an output differs by more.
    """
    graph = trace(model, *inputs, **options)
    tensors = [i for i in torch.utils._pytree.tree_leaves(inputs) if isinstance(i, torch.Tensor)]
    before = run(graph, *(t.clone() for t in tensors))
    record = apply(one, graph)
    if not record.rewrites:
        raise AssertionError(
            f"{record.name} rewrote nothing (refusals: {list(record.refusals)}) in\n{graph_text(graph)}"
        )
    after = run(graph, *(t.clone() for t in tensors))
    truth = float64_reference(model, *inputs) if times is not None else before
    for index, (new, old, exact) in enumerate(zip(after, before, truth, strict=True)):
        if new.dtype != old.dtype or new.shape != old.shape:
            raise AssertionError(
                f"{record.name}: output {index} was {old.dtype}{list(old.shape)}, now {new.dtype}{list(new.shape)}"
            )
        if times is None:
            distance = units_in_last_place(new, old)
            if distance > ulps:
                raise AssertionError(
                    f"{record.name}: output {index} is {distance} units in the last place off, {ulps} allowed"
                )
            continue
        error, allowed = relative_error(new, exact), times * relative_error(old, exact) + floor
        if not error <= allowed:
            raise AssertionError(
                f"{record.name}: output {index} has a relative error of {error:.3g}, {allowed:.3g} allowed"
            )
