"""recognise_attention: what it writes, what it leaves alone and why; all the forms are in test_attention_forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_modules import BEFORE, HEAD, HEADS, LENGTH, WIDTH, SelfAttention, Timm
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import graph_of, guards, quick, reasons
from torch import Tensor
from torch.nn import functional as F

from accelkit import Dim
from accelkit.pass_runner import run_passes
from accelkit.testing import apply, assert_idempotent, assert_same_numbers, graph_text, relative_error, run, trace
from accelkit_passes.recognise_attention import RecogniseAttention

PASS = RecogniseAttention()
SHAPE = (2, HEADS, LENGTH, HEAD)


def operands(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape or SHAPE) for _ in range(3))
    return q, k, v


def test_graph_before_and_after() -> None:
    graph = trace(Timm(fused=False), torch.randn(2, LENGTH, WIDTH))
    run_passes(graph, BEFORE)
    record = apply(PASS, graph)
    assert record.rewrites == ("matmul_1 into attention_default",)
    assert graph_text(graph).splitlines()[5:] == [
        "%0: f32[2, 10, 192] = aten.linear(%x, %qkv.weight, %qkv.bias)",
        "%1: f32[2, 10, 3, 4, 16] = aten.reshape(%0, [2, 10, 3, 4, 16])",
        "%2: f32[2, 10, 4, 16] = aten.select.int(%1, 2, 0)",
        "%3: f32[2, 10, 3, 4, 16] = aten.reshape(%0, [2, 10, 3, 4, 16])",
        "%4: f32[2, 10, 4, 16] = aten.select.int(%3, 2, 1)",
        "%5: f32[2, 10, 3, 4, 16] = aten.reshape(%0, [2, 10, 3, 4, 16])",
        "%6: f32[2, 10, 4, 16] = aten.select.int(%5, 2, 2)",
        "%7: f32[2, 10, 4, 16] = accelkit.attention(%2, %4, %6, None, False, 0.25)",
        "%8: f32[2, 10, 64] = aten.reshape(%7, [2, 10, 64])",
        "%9: f32[2, 10, 64] = aten.linear(%8, %proj.weight, %proj.bias)",
        "return (%9)",
    ]


def weights_returned(self, q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def scores_returned(self, q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


LEFT_ALONE: dict[str, tuple[Callable[..., object], str | None]] = {
    "dropout": (lambda self, q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, True) @ v, "dropout is on (dropout)"),
    "dropout in sdpa": (
        lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        "dropout is on (dropout_p=0.5)",
    ),
    "weights returned": (weights_returned, "the attention weights (softmax) are also used by output"),
    "scores returned": (scores_returned, "the scores (matmul) are also used by output"),
    "weights changed": (
        lambda self, q, k, v: ((q @ k.mT).softmax(-1) * 2 * v.mean()) @ v,
        None,
    ),
    "weights scaled": (lambda self, q, k, v: ((q @ k.mT).softmax(-1) + 1) @ v, "the attention weights are changed by"),
    "weights transposed": (
        lambda self, q, k, v: (q @ k.mT).softmax(-1).transpose(0, 1) @ v.transpose(0, 1),
        "the attention weights are transposed, cut or repeated",
    ),
    "weights cut": (lambda self, q, k, v: (q @ k.mT).softmax(-1)[..., :5] @ v[:, :, :5], "transposed, cut or repeated"),
    "over the queries": (lambda self, q, k, v: (q @ k.mT).softmax(-2) @ v, "softmax is over dimension 2 of 4"),
    "scale a tensor": (
        lambda self, q, k, v: ((q @ k.mT) * v.mean((2, 3), True)).softmax(-1) @ v,
        "the scores are scaled by a tensor (mul), not by one number",
    ),
    "soft cap": (lambda self, q, k, v: (q @ k.mT).tanh().softmax(-1) @ v, "the scores come from tanh"),
    "soft cap and mask": (
        lambda self, q, k, v: ((q @ k.mT).tanh() + v[..., :1].mT).softmax(-1) @ v,
        "the scores come from tanh",
    ),
    "scores transposed": (
        lambda self, q, k, v: (k @ q.mT).transpose(-1, -2).contiguous().softmax(-1) @ v,
        "the scores are transposed, cut or repeated before softmax",
    ),
    "scores cut": (
        lambda self, q, k, v: (q @ k.mT)[..., :5].softmax(-1) @ v[:, :, :5],
        "the scores are transposed, cut or repeated before softmax",
    ),
    "filled with -5": (
        lambda self, q, k, v: (q @ k.mT).masked_fill(q[..., :1] > 0, -5.0).softmax(-1) @ v,
        "replaces scores by -5.0, which is not at most -10000",
    ),
    "filled with a tensor": (
        lambda self, q, k, v: torch.where(q[..., :1] > 0, q @ k.mT, v.mean() - 1e9).softmax(-1) @ v,
        "replaces scores by",
    ),
    "scores broadcast": (
        lambda self, q, k, v: (q @ k.mT + torch.ones(3, 1, 1, 1, 1)).softmax(-1) @ v,
        "the scores are broadcast by add",
    ),
    "added to": (
        lambda self, q, k, v: torch.baddbmm(v[0], (q @ k.mT).softmax(-1)[0], v[0]),
        "adds to the product with the values",
    ),
    "several dtypes": (
        lambda self, q, k, v: (q @ k.mT).softmax(-1).double() @ v.double(),
        "queries, keys and values differ in dtype: torch.float32, torch.float64",
    ),
    "result of another dtype": (
        lambda self, q, k, v: (q.double() @ k.double().mT).softmax(-1).to(v.dtype) @ v,
        "queries, keys and values differ in dtype",
    ),
    "sdpa broadcast over the batch": (
        lambda self, q, k, v: F.scaled_dot_product_attention(q, k[:1], v),
        "differ in their leading dimensions",
    ),
    "classifier": (lambda self, q, k, v: q.mean((1, 2)).softmax(-1), None),
    "linear after softmax": (lambda self, q, k, v: (q + k).softmax(-1) @ v.mT, "the scores come from add"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, reason = LEFT_ALONE[case]
    graph = graph_of(function, *operands())
    before = graph_text(graph)
    found = reasons(PASS, graph)
    assert graph_text(graph) == before
    if reason is None:
        assert found == []
    else:
        assert any(reason in one for one in found), found


def test_second_run_finds_nothing_and_sizes_stay_dynamic() -> None:
    dims = {"x": {0: Dim("batch", max=64), 1: Dim("length", min=2, max=99)}}
    x = torch.randn(2, LENGTH, WIDTH)
    assert_idempotent(PASS, Timm(True), x, dynamic_shapes=dims)
    model = SelfAttention(lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v)
    graph = trace(model, x, dynamic_shapes=dims)
    run_passes(graph, BEFORE)
    guards_before = guards(graph)
    assert len(apply(PASS, graph).rewrites) == 1
    assert apply(PASS, graph).rewrites == ()
    assert guards(graph) == guards_before
    for batch, length in ((1, 5), (3, 17)):
        x = torch.randn(batch, length, WIDTH)
        assert relative_error(run(graph, x)[0], model(x).detach()) < 1e-6


def test_queries_without_keys_stay_finite() -> None:
    """NaN in a row of padding would reach every row through the next layer's keys and values."""
    keep = torch.rand(2, 1, LENGTH, LENGTH) > 0.5
    keep[:, :, 3] = False

    def fill(self, q, k, v, keep):
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    inputs = (*operands(), keep)
    graph = graph_of(fill, *inputs)
    before = run(graph, *inputs)[0]
    assert len(apply(PASS, graph).rewrites) == 1
    after = run(graph, *inputs)[0]
    rows = [row for row in range(LENGTH) if row != 3]
    assert relative_error(after[:, :, rows], before[:, :, rows]) < 1e-6
    assert before[:, :, 3].isnan().all()
    assert after.isfinite().all()


def test_an_output_keeps_its_layout() -> None:
    q, k, v = operands()
    graph = graph_of(lambda self, q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v)
    strides = run(graph, q, k, v)[0].stride()
    assert len(apply(PASS, graph).rewrites) == 1
    assert run(graph, q, k, v)[0].stride() == strides


def test_memory_that_is_written_to() -> None:
    def write(self, q, k, v):
        y = (q @ k.mT).softmax(-1)
        q.add_(1)
        return y @ v

    assert "the graph writes to q" in reasons(PASS, graph_of(write, *operands()))


def test_other_ranks() -> None:
    for lead in ((), (3,), (2, 3, 4)):
        q, k, v = operands(*lead, LENGTH, HEAD)
        graph = graph_of(lambda self, q, k, v: ((q @ k.mT) * 0.3).softmax(-1) @ v, q, k, v)
        before = run(graph, q, k, v)[0]
        assert len(apply(PASS, graph).rewrites) == 1, lead
        assert relative_error(run(graph, q, k, v)[0], before) < 1e-6


@quick
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 7), keys=st.integers(1, 7),
    width=st.integers(1, 9), value_width=st.integers(1, 9), scale=st.sampled_from([1.0, 0.125, -0.7]),
    where=st.sampled_from(["q", "k", "scores", "both"]), mask=st.sampled_from(["none", "fill", "add"]),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_numbers(batch, heads, length, keys, width, value_width, scale, where, mask, dtype, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    q, k = (torch.randn(batch, heads, n, width, dtype=dtype) for n in (length, keys))
    v = torch.randn(batch, heads, keys, value_width, dtype=dtype)
    keep = torch.rand(batch, 1, length, keys) > 0.3
    keep[..., 0] = True
    root = math.sqrt(abs(scale))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        if where == "both":
            q, k = q * root, k * math.copysign(root, scale)
        scores = (q * scale if where == "q" else q) @ (k * scale if where == "k" else k).mT
        scores = scores * scale if where == "scores" else scores
        if mask == "fill":
            scores = scores.masked_fill(~keep, torch.finfo(dtype).min)
        elif mask == "add":
            scores = scores + keep.to(dtype)
        return scores.softmax(-1) @ v

    module = type("Case", (torch.nn.Module,), {"forward": attention})()
    assert_same_numbers(PASS, module, q, k, v, keep, times=2, floor=16 * torch.finfo(dtype).eps)
