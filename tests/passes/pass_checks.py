"""What every pass's tests need, kept out of them so that the four lines that matter are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import fx, nn

from accelkit import Dim
from accelkit.pass_api import GraphPass
from accelkit.pass_runner import PassRecord, fake_mode_of
from accelkit.testing import apply, run, trace

BATCH = Dim("batch", min=1, max=64)
quick = hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
floats = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def graph_of(
    function: Callable[..., Any], *inputs: torch.Tensor, batch: bool = False, **tensors: Any
) -> fx.GraphModule:
    """The captured graph of `function(self, x, ...)`; self has `tensors`; batch=True makes dimension 0 dynamic."""
    module = type("Case", (nn.Module,), {"forward": function})()
    for name, value in tensors.items():
        if isinstance(value, (nn.Parameter, nn.Module)):
            setattr(module, name, value)
        else:
            module.register_buffer(name, value)
    return trace(module, *inputs, dynamic_shapes=tuple({0: BATCH} for _ in inputs) if batch else None)


def values(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Random values, among them -0.0, infinities and NaN where the dtype has them."""
    if not dtype.is_floating_point:
        return torch.randint(0, 100, shape).to(dtype)
    x = torch.randn(shape).to(dtype)
    for special in (-0.0, 0.0, float("inf"), float("nan"), torch.finfo(dtype).tiny):
        x = torch.where(torch.rand(shape) < 0.1, torch.tensor(special, dtype=dtype), x)
    return x


def strides(value: torch.Tensor) -> list[int | None]:
    """The strides that matter: not those of dimensions of size 1."""
    return [stride if size > 1 else None for size, stride in zip(value.shape, value.stride(), strict=True)]


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal bit for bit (-0.0 is not 0.0), laid out alike; a NaN equals a NaN."""
    assert (left.dtype, left.shape, strides(left)) == (right.dtype, right.shape, strides(right))
    assert torch.equal(left.isnan(), right.isnan())
    if left.is_floating_point():
        left, right = (t.nan_to_num(nan=1.0, posinf=float("inf"), neginf=float("-inf")) for t in (left, right))
        assert torch.equal(left.signbit(), right.signbit())
    assert torch.equal(left, right)


def guards(graph: fx.GraphModule) -> int:
    shape_env = fake_mode_of(graph).shape_env
    return len(shape_env.guards) if shape_env is not None else 0


def check(one: GraphPass, graph: fx.GraphModule, *inputs: torch.Tensor, rewrites: int | None = None) -> PassRecord:
    """Run a pass: the same bits, no new guard, and a second run that does nothing. Returns the first run's record."""
    before, guards_before = run(graph, *inputs), guards(graph)
    record = apply(one, graph)
    for old, new in zip(before, run(graph, *inputs), strict=True):
        assert_same_bits(old, new)
    assert guards(graph) == guards_before
    assert apply(one, graph).rewrites == ()
    if rewrites is not None:
        assert len(record.rewrites) == rewrites, record
    return record


def refused(one: GraphPass, graph: fx.GraphModule, *inputs: torch.Tensor) -> list[str]:
    """The reasons of a pass that must leave a graph alone."""
    text = str(graph.graph)
    record = check(one, graph, *inputs, rewrites=0)
    assert str(graph.graph) == text
    return [refusal.reason for refusal in record.refusals]


def write_before(graph: fx.GraphModule, name: str) -> None:
    """Put an operator that writes to a buffer in front of a node: capture itself moves writes to the end."""
    node = next(n for n in graph.graph.nodes if n.name == name)
    buffer = torch.zeros(())
    graph.register_buffer("written", buffer)
    with graph.graph.inserting_before(node):
        read = graph.graph.get_attr("written")
        write = graph.graph.call_function(torch.ops.aten.add_.Tensor, (read, 1))
    for one in (read, write):
        one.meta["val"] = fake_mode_of(graph).from_tensor(buffer)


def reasons(one: GraphPass, graph: fx.GraphModule) -> list[str]:
    """The reasons of a pass that rewrites nothing of a graph (also one that was tampered with)."""
    record = apply(one, graph)
    assert record.rewrites == ()
    return [refusal.reason for refusal in record.refusals]
