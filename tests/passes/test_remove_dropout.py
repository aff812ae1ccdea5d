"""RemoveDropout: off, it goes; on, it stays."""

from __future__ import annotations

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from pass_checks import check, floats, graph_of, guards, quick, shapes, values

from accelkit.testing import apply, graph_text
from accelkit_passes.remove_dropout import RemoveDropout

aten = torch.ops.aten
ON = "it is on (p=0.5) in the captured model; RemoveDropout(even_active=True) removes it all the same"


def attention(self, x):
    y = F.dropout(x * 2, 0.1, training=False)
    z = F.dropout2d(y, 0.5, training=True)[None]
    return F.scaled_dot_product_attention(z, z, z, dropout_p=0.5), F.alpha_dropout(y, 0.0, training=True)


def test_golden() -> None:
    graph = graph_of(attention, torch.randn(2, 3, 4))
    before = graph_text(graph)
    record = apply(RemoveDropout(), graph)
    assert (
        before
        == """\
%x: f32[2, 3, 4] = input
%0: f32[2, 3, 4] = aten.mul.Tensor(%x, 2)
%1: f32[2, 3, 4] = aten.dropout(%0, 0.1, False)
%2: f32[2, 3, 4] = aten.feature_dropout(%1, 0.5, True)
%3: f32[1, 2, 3, 4] = aten.unsqueeze(%2, 0)
%4: f32[1, 2, 3, 4] = aten.scaled_dot_product_attention(%3, %3, %3, None, 0.5)
%5: f32[2, 3, 4] = aten.alpha_dropout(%1, 0.0, True)
return (%4, %5)"""
    )
    assert (
        graph_text(graph)
        == """\
%x: f32[2, 3, 4] = input
%0: f32[2, 3, 4] = aten.mul.Tensor(%x, 2)
%1: f32[2, 3, 4] = aten.feature_dropout(%0, 0.5, True)
%2: f32[1, 2, 3, 4] = aten.unsqueeze(%1, 0)
%3: f32[1, 2, 3, 4] = aten.scaled_dot_product_attention(%2, %2, %2, None, 0.5)
return (%3, %0)"""
    )
    assert [(r.node, r.reason) for r in record.refusals] == [
        ("feature_dropout", ON),
        ("scaled_dot_product_attention", ON),
    ]


def test_even_active() -> None:
    graph = graph_of(attention, torch.randn(2, 3, 4))
    assert str(RemoveDropout(even_active=True)) == "remove_dropout(even_active=True)"
    record = apply(RemoveDropout(even_active=True), graph)
    assert len(record.rewrites) == 4
    assert record.refusals == ()
    assert "dropout" not in graph_text(graph)
    assert "aten.scaled_dot_product_attention(%1, %1, %1, None, 0.0)" in graph_text(graph)


LEFT_ALONE = {
    "on": (lambda self, x: F.dropout(x, 0.5, training=True), RemoveDropout(), ON),
    "native, on by default": (lambda self, x: aten.native_dropout.default(x, 0.5, None)[0], RemoveDropout(), ON),
    "all of it": (lambda self, x: F.dropout(x * 2, 1.0, training=True), RemoveDropout(), ON.replace("0.5", "1.0")),
    "mask": (lambda self, x: aten.native_dropout.default(x + 1, 0.5, False), RemoveDropout(), "its mask is used"),
    "output of input": (
        lambda self, x: F.dropout(x, 0.5, True), RemoveDropout(even_active=True), "share memory with x",
    ),
    "native copies": (
        lambda self, x: aten.native_dropout.default(x, 0.5, False)[0], RemoveDropout(), "share memory with x",
    ),
    "attention, off": (lambda self, x: F.scaled_dot_product_attention(x, x, x), RemoveDropout(), None),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, one, reason = LEFT_ALONE[case]
    graph = graph_of(function, torch.randn(1, 3, 3))
    text = graph_text(graph)
    record = apply(one, graph)
    assert graph_text(graph) == text
    assert record.rewrites == ()
    reasons = [r.reason for r in record.refusals]
    assert (reasons == []) if reason is None else (len(reasons) == 1 and reason in reasons[0]), reasons


def test_native_dropout_that_is_off() -> None:
    x = torch.randn(4, 5)
    graph = graph_of(lambda self, x: aten.native_dropout.default(x.exp(), 0.5, False)[0] * 2, x)
    check(RemoveDropout(), graph, x, rewrites=1)
    assert "dropout" not in graph_text(graph)


def test_dynamic_batch() -> None:
    x = torch.randn(3, 5)
    graph = graph_of(lambda self, x: F.dropout(x.exp(), 0.5, False).relu(), x, batch=True)
    check(RemoveDropout(), graph, x, rewrites=1)
    assert "f32[s" in graph_text(graph)


def test_a_kept_dropout_stays_random() -> None:
    x = torch.randn(64, 64)
    graph = graph_of(lambda self, x: F.dropout(x, 0.5, True), x)
    before = guards(graph)
    apply(RemoveDropout(), graph)
    first, second = graph(x)[0], graph(x)[0]
    assert not torch.equal(first, second)
    assert (first == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert guards(graph) == before


@quick
@hypothesis.given(
    shapes, floats, st.sampled_from([F.dropout, F.alpha_dropout, F.feature_alpha_dropout]), st.floats(0, 1)
)
def test_numbers(shape: list[int], dtype: torch.dtype, dropout, p: float) -> None:
    x = values([2, *shape], dtype)
    check(RemoveDropout(), graph_of(lambda self, x: dropout(x.abs(), p, False).sqrt(), x), x, rewrites=1)
