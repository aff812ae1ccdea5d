"""set_precision at float16's limit: what lies beyond it, or reads such values, stays in float32; masks do not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision_modules import LAYERS, LOWEST, MASKS, Block, Function, x
from torch import nn

from accelkit import Dim
from accelkit.overflow import measure
from accelkit.testing import apply, float64_reference, graph_text, relative_error, run, trace
from accelkit_passes.set_precision import SetPrecision

F = nn.functional


def beyond(function, *inputs: torch.Tensor, batches: object = None, **options: object):  # type: ignore[no-untyped-def]
    """(model, graph after the pass, its record): with the ranges that `optimize` would have measured."""
    model = function if isinstance(function, nn.Module) else Function(function)
    graph, one = trace(model, *inputs, **options), SetPrecision("fp16")
    measure(graph, one.wants_ranges(graph), batches or [inputs])
    return model, graph, apply(one, graph)


def reasons_of(record) -> dict[str, str]:  # type: ignore[no-untyped-def]
    return {r.node: r.reason for r in record.refusals}


def test_graph_before_and_after_an_overflow() -> None:
    def large(m: Function, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(F.linear(x, m.weight) * 1e5, [8]) @ m.weight

    _, graph, record = beyond(large, x())
    assert graph_text(graph).splitlines()[6:] == [
        "%0: f16[2, 8] = aten.to.dtype(%inputs_0, torch.float16)",
        "%1: f16[8, 8] = aten.to.dtype(%weight, torch.float16)",
        "%2: f16[2, 8] = aten.linear(%0, %1)",
        "%3: f32[2, 8] = aten.to.dtype(%2, torch.float32)",
        "%4: f32[2, 8] = aten.mul.Tensor(%3, 100000.0)",
        "%5: f32[2, 8] = aten.layer_norm(%4, [8], None, None, 1e-05, False)",
        "%6: f16[2, 8] = aten.to.dtype(%5, torch.float16)",
        "%7: f16[2, 8] = aten.matmul(%6, %1)",
        "%8: f32[2, 8] = aten.to.dtype(%7, torch.float32)",
        "return (%8)",
    ]
    assert [reason.partition(" is ")[0] for reason in reasons_of(record).values()] == [
        "its largest value on the inputs tried", "it reads mul, whose largest value on the inputs tried",
    ]  # fmt: skip


class CastBack(nn.Module):
    """The author computes in float32 and casts back to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        y = (x.float() * 1e5).to(x.dtype)
        return torch.tanh(y * 1e-5)


BEYOND = {
    "residual chain": (
        lambda m, x: F.relu(F.layer_norm((F.linear(x, m.weight) + 1e5) + x, [8])), ("add", "add_1", "layer_norm"),
    ),
    "softmax": (lambda m, x: torch.softmax((x @ m.weight) * 3e4, -1) @ m.weight, ("mul", "softmax")),
    "input": (lambda m, x: torch.tanh(F.linear(x * 1e6 - x * 1e6 + 7e4, m.weight)), ("mul", "linear", "tanh")),
    "cast back": (CastBack(), ("to_1", "mul_1")),
    "several results": (lambda m, x: sum(torch.tanh(p) for p in (x * 1e5).chunk(2, -1)), ("chunk", "tanh", "tanh_1")),
    "back in range": (lambda m, x: F.linear((x @ m.weight) * 1e6 * 1e-6, m.weight), ("mul", "mul_1")),
    "batch norm": (
        lambda m, x: F.batch_norm(x @ m.weight * 1e5, m.frequencies.repeat(2), m.scale, m.scale), ("mul", "batch_norm"),
    ),
    "scale in a buffer": (lambda m, x: F.linear(x, m.weight) * 1e-3 * m.large, ("mul_1",)),
    "comparison": (lambda m, x: (x @ m.weight * 1e5 > 7e4) * x, ("mul", "gt")),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND)
def test_beyond_the_range(case: str) -> None:
    function, kept = BEYOND[case]
    model = function if isinstance(function, nn.Module) else Function(function)
    model.register_buffer("large", torch.full((), 3e5))
    data = torch.randn(3, 8)
    before = run(trace(model, data), data)[0]
    _, graph, record = beyond(model, data)
    assert set(kept) <= set(reasons_of(record)), record.refusals
    result = run(graph, data)[0]
    assert result.isfinite().all()
    assert relative_error(result, before) < 0.01
    assert not any("became" in rewrite for rewrite in record.rewrites)


def test_an_input_beyond_the_range() -> None:
    _, graph, record = beyond(lambda m, x: F.linear(F.layer_norm(x, [8]), m.weight), data := x() * 1e5)
    assert list(reasons_of(record)) == ["inputs_0", "layer_norm"]
    assert "aten.layer_norm(%inputs_0" in graph_text(graph)
    assert run(graph, data)[0].isfinite().all()


def attention_with(m: Function, x: torch.Tensor, bias: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    query = F.linear(x, m.weight)
    return torch.softmax(query @ x.transpose(-1, -2) * gain + bias, -1) @ x


@pytest.mark.parametrize("form", MASKS)
def test_masks_are_no_overflow(form: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()[None].expand(2, 3, 3)
    data = torch.randn(2, 3, 8)
    model = Function(lambda m, x, mask: attention_with(m, x, MASKS[form](mask)))
    graph = trace(model, data, mask)
    apply(SetPrecision("fp16"), graph)
    _, measured, record = beyond(model, data, mask)
    assert graph_text(measured) == graph_text(graph)
    assert not any("inputs tried" in reason for reason in reasons_of(record).values())


# a mask of -1e6 does not mask scores of -1e5 in float32 either
@pytest.mark.parametrize("form", [form for form in MASKS if form not in ("a million", "two masks added")])
def test_masks_beside_scores_beyond_the_range(form: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0]]).bool()[None].expand(2, 3, 3)
    data = torch.randn(2, 3, 8)

    def two_layers(m: Function, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = MASKS[form](mask)
        x = attention_with(m, x, bias)  # clamps the mask, if it may
        return attention_with(m, x, bias, 3e4)

    model = Function(two_layers)
    truth = run(trace(model, data, mask), data, mask)[0]
    _, graph, record = beyond(model, data, mask)
    kept = reasons_of(record)
    assert "softmax_1" in kept
    assert "softmax" not in kept
    result = run(graph, data, mask)[0]
    assert relative_error(result, truth) < 0.1  # one score in two may win by less than its rounding


def test_a_mask_added_to_an_activation_stays_too_where_large_scores_read_it() -> None:
    """T5: position bias + mask, shared by all layers; -65504 would not mask scores of 1e5."""

    def two_layers(m: Function, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = m.table(torch.arange(3))[:, :3] + torch.where(mask, 0.0, LOWEST)
        return attention_with(m, attention_with(m, x, bias), bias, 3e4)

    data, mask = torch.randn(2, 3, 8), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    model = Function(two_layers)
    truth = run(trace(model, data, mask), data, mask)[0]
    _, graph, record = beyond(model, data, mask)
    kept = reasons_of(record)
    assert kept["add"] == "it holds a mask, which add_2 reads beside values beyond the range: stays in float32"
    assert kept["add_1"] == "it reads add, which holds a mask in float32: stays in float32"
    assert relative_error(run(graph, data, mask)[0], truth) < 0.1


def test_a_mask_that_is_an_input_saturates() -> None:
    bias = torch.where(torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool(), 0.0, LOWEST)
    model = Function(
        lambda m, x, bias: attention_with(m, x, bias[None]) + F.scaled_dot_product_attention(x, x, x, bias)
    )
    data = torch.randn(2, 3, 8)
    truth = run(trace(model, data, bias), data, bias)[0]
    _, graph, record = beyond(model, data, bias)
    assert not any("inputs tried" in reason for reason in reasons_of(record).values())
    assert "aten.clamp(%inputs_1, -65504.0, 65504.0)" in graph_text(graph)
    result = run(graph, data, bias)[0]
    assert result.isfinite().all()
    assert relative_error(result[:, :2], truth[:, :2]) < 0.01  # the last row is masked everywhere
    bias[0, 2] = -math.inf
    _, graph, _ = beyond(model, data, bias)
    assert "clamp" not in graph_text(graph)  # which would make a number of the infinity


NO_MASKS = {
    "used otherwise": (lambda m, x, bias: attention_with(m, x, bias) + bias.mean(), "inputs_1"),
    "added to an input": (lambda m, x, bias: torch.softmax(x[..., :3] + bias, -1), "inputs_1"),
    "not for softmax": (lambda m, x, bias: torch.tanh(x @ x.transpose(-1, -2) + bias), "inputs_1"),
    "several large values": (lambda m, x, bias: torch.softmax(x @ m.weight + m.levels, -1) + bias.sum(), "add"),
}


@pytest.mark.parametrize("case", NO_MASKS)
def test_large_values_that_are_no_mask(case: str) -> None:
    function, kept = NO_MASKS[case]
    model = Function(function)
    model.register_buffer("levels", torch.arange(8) * 1e5)
    _, _, record = beyond(model, torch.randn(2, 3, 8), torch.full((3, 3), -1e9))
    assert kept in reasons_of(record)


@pytest.mark.parametrize("scale", [lambda s: s * 0.125, lambda s: s / 8, lambda s: s - s.amax(-1, keepdim=True)])
def test_a_mask_that_is_scaled_or_selected_is_no_overflow(scale) -> None:  # type: ignore[no-untyped-def]
    def masked(m: Function, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = (F.linear(x, m.weight) @ x.transpose(-1, -2)).masked_fill(mask, LOWEST)
        return torch.softmax(scale(scores), -1) @ x

    _, _, record = beyond(masked, torch.randn(2, 3, 8), torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool())
    assert reasons_of(record) == {}


def test_second_run_after_an_overflow_and_dynamic_sizes() -> None:
    model = Block().eval()
    with torch.no_grad():
        model.layers[0].bias[2] = 1e5
    _, graph, record = beyond(model, x(), dynamic_shapes={"x": {0: Dim("batch", max=64)}})
    assert {"linear", "add_1", "add_3"} <= set(reasons_of(record))  # the chain of residual sums
    text = graph_text(graph)
    assert "[s" in text
    again = apply(SetPrecision("fp16"), graph)
    assert again.rewrites == ()
    assert graph_text(graph) == text


def test_what_wants_no_ranges() -> None:
    graph = trace(nn.Linear(8, 8), x())
    assert SetPrecision("bf16").wants_ranges(graph) == {}
    assert SetPrecision("fp32").wants_ranges(graph) == {}
    branch = trace(Function(lambda m, x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))), x())
    assert SetPrecision("fp16").wants_ranges(branch) == {}


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(
        st.sampled_from(["linear", "layer_norm", "gelu", "softmax", "norm", "tanh"]), min_size=2, max_size=5
    ),
    scale=st.sampled_from([1.0, 300.0, 1e5, 1e7]),
    seed=st.integers(0, 2**31),
)
def test_finite_and_right_at_any_scale(names: list[str], scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    first = nn.Linear(8, 8)
    with torch.no_grad():
        first.weight.mul_(scale)
    model, data = nn.Sequential(first, *(LAYERS[n]() for n in names)).eval(), torch.randn(3, 6, 8)
    truth = float64_reference(model, data)[0]
    _, graph, _ = beyond(model, data)
    # as far from the truth as the model with its weights and its input rounded to float16 is, within a factor
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.half().float() if parameter.half().isfinite().all() else parameter)
    shifted = relative_error(float64_reference(rounded, data.half().float())[0], truth)
    assert relative_error(run(graph, data)[0], truth) <= 10 * shifted + 16 * torch.finfo(torch.float16).eps
