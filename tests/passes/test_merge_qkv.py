"""merge_qkv: linear layers of one input become one, and what keeps its own weights."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from attention_modules import BEFORE, LENGTH, WIDTH, Jeonsworld, SelfAttention
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import guards, quick, reasons
from torch import Tensor, nn
from torch.nn import functional as F

import accelkit
from accelkit import Dim
from accelkit.pass_runner import run_passes
from accelkit.testing import apply, assert_same_numbers, graph_text, relative_error, run, trace
from accelkit_passes.merge_qkv import MergeQkv
from accelkit_passes.recognise_attention import RecogniseAttention

PASS = MergeQkv()


class Layers(nn.Module):
    """Two linear layers, and what is done with them."""

    def __init__(self, forward: Callable[..., object], biases: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, bias=biases[0]), nn.Linear(4, 3, bias=biases[1])
        self.do = forward

    def forward(self, x: Tensor) -> object:
        return self.do(self, x)


def both(module: Layers, x: Tensor) -> Tensor:
    return torch.cat([module.a(x).relu(), module.b(x).tanh()], -1)


def test_graph_before_and_after() -> None:
    graph = trace(Jeonsworld().eval(), torch.randn(2, LENGTH, WIDTH))
    run_passes(graph, [*BEFORE, RecogniseAttention()])
    record = apply(PASS, graph)
    assert record.rewrites == ("linear, linear_1, linear_2 into one (new weights of 49920 bytes)",)
    assert graph_text(graph).splitlines()[2:] == [
        "%x: f32[2, 10, 64] = input",
        "%query_weight_merged: f32[192, 64] = attribute",
        "%query_weight_bias_merged: f32[192] = attribute",
        "%0: f32[2, 10, 192] = aten.linear(%x, %query_weight_merged, %query_weight_bias_merged)",
        "%1: f32[2, 10, 64] = aten.slice.Tensor(%0, 2, 0, 64)",
        "%2: f32[2, 10, 64] = aten.slice.Tensor(%0, 2, 64, 128)",
        "%3: f32[2, 10, 64] = aten.slice.Tensor(%0, 2, 128)",
        "%4: f32[2, 10, 4, 16] = aten.reshape(%1, [2, 10, 4, 16])",
        "%5: f32[2, 10, 4, 16] = aten.reshape(%2, [2, 10, 4, 16])",
        "%6: f32[2, 10, 4, 16] = aten.reshape(%3, [2, 10, 4, 16])",
        "%7: f32[2, 10, 4, 16] = accelkit.attention(%4, %5, %6, None, False, 0.25)",
        "%8: f32[2, 10, 64] = aten.reshape(%7, [2, 10, 64])",
        "%9: f32[2, 10, 64] = aten.linear(%8, %out.weight, %out.bias)",
        "return (%9)",
    ]


def test_the_order_is_query_key_value_whatever_the_graph_says() -> None:
    class ValueFirst(SelfAttention):
        def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
            v, gate = self.split(self.value(x)), self.out(x).sigmoid()
            k, q = self.split(self.key(x)), self.split(self.query(x))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape) * gate

    graph = trace(ValueFirst(torch.add), torch.randn(2, LENGTH, WIDTH))
    run_passes(graph, [*BEFORE, RecogniseAttention()])
    (record,) = apply(PASS, graph).rewrites
    assert record.startswith("linear_3, linear_2, linear, linear_1 into one")


def tied(module: Layers, x: Tensor) -> Tensor:
    return torch.cat([module.a(x).relu(), module.b(x) @ module.b.weight], -1)


def computed(module: Layers, x: Tensor) -> Tensor:
    return torch.cat([module.a(x).relu(), F.linear(x, module.b.weight * x.mean(), module.b.bias).relu()], -1)


def computed_bias(module: Layers, x: Tensor) -> Tensor:
    return torch.cat([module.a(x).relu(), F.linear(x, module.b.weight, module.b.bias * x.mean()).relu()], -1)


def written(module: Layers, x: Tensor) -> Tensor:
    y = torch.cat([module.a(x).relu(), F.linear(x, module.table).relu()], -1)
    module.table.add_(1.0)
    return y


class Written(Layers):
    def __init__(self) -> None:
        super().__init__(written)
        self.register_buffer("table", torch.randn(2, 4))


LEFT_ALONE: dict[str, tuple[Layers, str | None]] = {
    "weight tied": (Layers(tied), "its weight (b_weight) is also used by matmul"),
    "weight computed": (Layers(computed), "its weight (mul) is computed at run time"),
    "bias computed": (Layers(computed_bias), "its bias (mul) is computed at run time"),
    "weight written to": (Written(), "its weight (table) is computed at run time or written to"),
    "results are outputs": (Layers(lambda m, x: (m.a(x), m.b(x).mT)), "its result is an output"),
    "two inputs": (Layers(lambda m, x: (m.a(x).relu(), m.b(x + 1).relu())), None),
    "one is dead": (Layers(lambda m, x: (m.a(x).relu(), (m.b(x).relu(), m.a.bias * 2)[1])), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, reason = LEFT_ALONE[case]
    graph = trace(model, torch.randn(5, 4))
    before = graph_text(graph)
    found = reasons(PASS, graph)
    assert graph_text(graph) == before
    assert found == [] if reason is None else any(reason in one for one in found), found


def test_dtypes_that_differ_are_refused() -> None:
    graph = trace(Layers(both), torch.randn(5, 4))
    weight = next(node for node in graph.graph.nodes if node.target == "b.weight")
    graph.b.weight = nn.Parameter(graph.b.weight.double())
    assert "its weight is torch.float64, that of linear differs" in reasons(PASS, graph)
    assert weight.users


def test_an_input_that_is_written_to_is_refused() -> None:
    graph = trace(Layers(both), torch.randn(5, 4))
    (x,) = graph.graph.find_nodes(op="placeholder")
    second = next(node for node in graph.graph.nodes if node.name == "linear_1")
    with graph.graph.inserting_before(second):
        graph.graph.call_function(torch.ops.aten.add_.Tensor, (x, 1)).meta["val"] = x.meta["val"]
    assert any("its input (x) is written to" in reason for reason in reasons(PASS, graph))


def test_second_run_finds_nothing_and_sizes_stay_dynamic() -> None:
    graph = trace(Layers(both), torch.randn(5, 4), dynamic_shapes={"x": {0: Dim("batch", max=64)}})
    guards_before = guards(graph)
    assert len(apply(PASS, graph).rewrites) == 1
    assert apply(PASS, graph).rewrites == ()
    assert guards(graph) == guards_before


@quick
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    biases=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_numbers(lead: list[int], biases: tuple[bool, bool], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Layers(both, biases).to(dtype), torch.randn(*lead, 4).to(dtype)
    assert_same_numbers(PASS, model, x, times=2, floor=2 * torch.finfo(dtype).eps)


def test_weights_that_lie_side_by_side_cost_nothing() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.weight.split([4, 2])
            return torch.cat([F.linear(x, first).relu(), F.linear(x, second).tanh()], -1)

    model, x = Packed(), torch.randn(5, 4)
    graph = trace(model, x)
    run_passes(graph, BEFORE)
    assert apply(PASS, graph).rewrites == ("linear, linear_1 into one (new weights of 0 bytes)",)
    (merged,) = (b for name, b in graph.named_buffers() if name.endswith("_merged"))
    assert merged.untyped_storage().data_ptr() == model.weight.untyped_storage().data_ptr()
    assert relative_error(run(graph, x)[0], model(x).detach()) < 1e-6


@pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")
def test_refit_merges_the_new_weights() -> None:
    model, other, x = Layers(both), Layers(both), torch.randn(5, 4)
    fast = accelkit.optimize(model, x, target="eager", passes=("merge_qkv",))
    assert re.search(r"merge_qkv +1 +0 ", str(fast.report()))
    fast.refit(other.state_dict())
    assert relative_error(fast(x), other(x).detach()) < 1e-6
