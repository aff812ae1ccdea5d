"""reorder_rows: a linear layer changes places with a permutation of its rows where that saves a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_modules import BEFORE, LENGTH, WIDTH, MultiheadAttention
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import graph_of, guards, quick, reasons
from torch import Tensor, nn

from accelkit import Dim
from accelkit.pass_runner import run_passes
from accelkit.testing import apply, graph_text, relative_error, run, trace
from accelkit_passes.recognise_attention import RecogniseAttention
from accelkit_passes.reorder_rows import ReorderRows

PASS = ReorderRows()


class Rows(nn.Module):
    """[a, b, 4] -> permuted -> linear -> `after`"""

    def __init__(self, after: Callable[[Tensor], object], before: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.linear, self.after, self.before = nn.Linear(4, 6), after, before or (lambda x: x.transpose(0, 1))

    def forward(self, x: Tensor) -> object:
        return self.after(self.linear(self.before(x)))


def test_graph_before_and_after() -> None:
    graph = trace(MultiheadAttention(), torch.randn(2, LENGTH, WIDTH))
    run_passes(graph, [*BEFORE, RecogniseAttention()])
    record = apply(PASS, graph)
    assert record.rewrites == ("linear", "linear_1")
    lines = [line for line in graph_text(graph).splitlines() if "attribute" not in line]
    assert lines == [
        "%x: f32[2, 10, 64] = input",
        "%0: f32[2, 10, 192] = aten.linear(%x, %attention.in_proj_weight, %attention.in_proj_bias)",
        "%1: f32[2, 10, 3, 4, 16] = aten.reshape(%0, [2, 10, 3, 4, 16])",
        "%2: f32[2, 10, 4, 16] = aten.select.int(%1, 2, 0)",
        "%3: f32[2, 10, 3, 4, 16] = aten.reshape(%0, [2, 10, 3, 4, 16])",
        "%4: f32[2, 10, 4, 16] = aten.select.int(%3, 2, 1)",
        "%5: f32[2, 10, 3, 4, 16] = aten.reshape(%0, [2, 10, 3, 4, 16])",
        "%6: f32[2, 10, 4, 16] = aten.select.int(%5, 2, 2)",
        "%7: f32[2, 10, 4, 16] = accelkit.attention(%2, %4, %6)",
        "%8: f32[2, 10, 64] = aten.reshape(%7, [2, 10, 64])",
        "%9: f32[2, 10, 64] = aten.linear(%8, %attention.out_proj.weight, %attention.out_proj.bias)",
        "return (%9)",
    ]


LEFT_ALONE: dict[str, tuple[Rows, str | None]] = {
    "rows in order": (Rows(torch.relu, lambda x: x.reshape(-1, 4)), None),
    "features moved alone": (Rows(torch.relu, lambda x: x[:, :4].transpose(1, 2)), None),
    "features moved too": (
        Rows(torch.relu, lambda x: x[:, :4].permute(2, 0, 1)),
        "features of linear's input are moved",
    ),
    "rows left out": (
        Rows(torch.relu, lambda x: x.reshape(5, 2, 3, 4).transpose(0, 2)[0]),
        "taken in part or repeated",
    ),
    "rows repeated": (
        Rows(torch.relu, lambda x: x.transpose(0, 1)[None].expand(2, -1, -1, -1)),
        "taken in part or repeated",
    ),
    "read in the old order": (Rows(torch.relu), "relu reads linear in the order it has now"),
    "an output": (Rows(lambda y: y), "output reads linear in the order it has now"),
    "cut through the rows": (Rows(lambda y: y.reshape(4, -1)), "needs linear in the order it has now"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, reason = LEFT_ALONE[case]
    graph = trace(model, torch.randn(5, 6, 4))
    before = graph_text(graph)
    found = reasons(PASS, graph)
    assert graph_text(graph) == before
    assert found == [] if reason is None else any(reason in one for one in found), found


def test_permuted_weights_are_no_rows() -> None:
    """A constant that is permuted is folded, not a reason to move the layer."""

    def product(self, x):
        return x + nn.functional.linear(self.table.T, self.weight).sum()

    graph = graph_of(product, torch.randn(3), weight=torch.randn(2, 3), table=torch.randn(3, 5))
    assert reasons(PASS, graph) == []


def test_second_run_finds_nothing_and_sizes_stay_dynamic() -> None:
    model = Rows(lambda y: y.transpose(0, 1) * 2)
    dims = {"x": {0: Dim("batch", max=64), 1: Dim("length", min=2, max=99)}}
    graph = trace(model, torch.randn(5, 6, 4), dynamic_shapes=dims)
    guards_before = guards(graph)
    assert len(apply(PASS, graph).rewrites) == 1
    assert apply(PASS, graph).rewrites == ()
    assert guards(graph) == guards_before
    x = torch.randn(2, 3, 4)
    assert relative_error(run(graph, x)[0], model(x)) < 1e-6


@quick
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    order=st.permutations([0, 1, 2]),
    flat=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_numbers(sizes: tuple[int, ...], order: list[int], flat: bool, seed: int) -> None:
    """Rows of any order, taken apart and put back; with rows of more than one order something is rewritten."""
    torch.manual_seed(seed)
    back = [order.index(d) for d in range(3)]

    def before(x: Tensor) -> Tensor:
        y = x.permute(*order, 3)
        return y.reshape(-1, 4) if flat else y

    def after(y: Tensor) -> Tensor:
        return y.reshape(*(sizes[d] for d in order), 6).permute(*back, 3).sigmoid()

    x = torch.randn(*sizes, 4)
    graph = trace(Rows(after, before), x)
    expected = run(graph, x)[0]
    record = apply(PASS, graph)
    permuted = [d for d in order if sizes[d] > 1]
    assert len(record.rewrites) == (permuted != sorted(permuted)), record
    assert relative_error(run(graph, x)[0], expected) < 1e-6
