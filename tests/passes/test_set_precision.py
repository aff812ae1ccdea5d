"""set_precision: what PyTorch's own model.bfloat16() computes, with the graph's inputs and outputs as they were."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision_modules import LAYERS, MASKS, Block, Function, x
from torch import nn

from accelkit import Dim
from accelkit.errors import InputError
from accelkit.testing import (
    apply,
    assert_idempotent,
    assert_left_alone,
    float64_reference,
    graph_text,
    relative_error,
    run,
    trace,
)  # fmt: skip
from accelkit_passes import set_precision
from accelkit_passes.eliminate_dead_code import EliminateDeadCode
from accelkit_passes.set_precision import SetPrecision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
F = nn.functional


def lines(function, *inputs: torch.Tensor, precision: str = "bf16", **options: object) -> list[str]:  # type: ignore[no-untyped-def]
    """The graph after the pass, inputs and attributes left out."""
    graph = trace(Function(function), *inputs)
    apply(SetPrecision(precision, **options), graph)
    return [line for line in graph_text(graph).splitlines() if not line.endswith(("= attribute", "= input"))]


def test_graph_before_and_after() -> None:
    assert lines(lambda m, x: F.gelu(F.linear(x, m.weight)) + m.scale, x()) == [
        "%0: bf16[2, 8] = aten.to.dtype(%inputs_0, torch.bfloat16)",
        "%1: bf16[8, 8] = aten.to.dtype(%weight, torch.bfloat16)",
        "%2: bf16[2, 8] = aten.linear(%0, %1)",
        "%3: bf16[2, 8] = aten.gelu(%2)",
        "%4: bf16[8] = aten.to.dtype(%scale, torch.bfloat16)",
        "%5: bf16[2, 8] = aten.add.Tensor(%3, %4)",
        "%6: f32[2, 8] = aten.to.dtype(%5, torch.float32)",
        "return (%6)",
    ]


def test_no_float32_copy_of_a_moved_weight_is_used() -> None:
    graph = trace(Function(lambda m, x: x @ m.weight.transpose(0, 1)), x())
    apply([SetPrecision(), EliminateDeadCode()], graph)
    weight = next(n for n in graph.graph.nodes if n.target == "weight")
    assert [user.args[1] for user in weight.users] == [torch.bfloat16]


def test_what_integers_make_stays_float32_until_it_meets_an_activation() -> None:
    def rotary(m: Function, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None].float() @ m.frequencies[None]
        return F.linear(x, m.weight) * torch.cat([angles.cos(), angles.sin()], -1)

    text = "\n".join(lines(rotary, x(), torch.tensor([4095, 4097])))
    assert "f32[2, 4] = aten.cos" in text
    assert "bf16[2, 8] = aten.mul" in text
    # 4097 has no bfloat16: had the positions been rounded, the angles would be off by up to a radian
    model, inputs = Function(rotary), (x(), torch.tensor([4095, 4097]))
    graph = trace(model, *inputs)
    apply(SetPrecision(), graph)
    assert relative_error(run(graph, *inputs)[0], run(trace(model, *inputs), *inputs)[0]) < 0.02


@pytest.mark.parametrize("sources_known", [True, False], ids=["with source lines", "without"])
def test_authors_upcast_holds_until_cast_back(sources_known: bool) -> None:
    graph = trace(Block().eval(), x())
    if not sources_known:
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)
    apply(SetPrecision(), graph)
    text = [line.partition(": ")[2] for line in graph_text(graph).splitlines() if "= aten." in line]
    norm = [line.partition(" = ")[::2] for line in text if "to.dtype" not in line]
    dtypes = {
        name.partition("(")[0]: {v.partition("[")[0] for v, n in norm if n.startswith(name.partition("(")[0])}
        for _, name in norm
    }
    assert dtypes["aten.pow.Tensor_Scalar"] == dtypes["aten.mean.dim"] == dtypes["aten.rsqrt"] == {"f32"}
    assert dtypes["aten.linear"] == {"bf16"}
    # x * rsqrt in float32 and weight * x in bfloat16; the residual sum in bfloat16, the epsilon's in float32
    assert sorted(v for v, n in norm if n.startswith("aten.mul")) == ["bf16[2, 8]"] * 2 + ["f32[2, 8]"] * 2
    assert sorted(v for v, n in norm if n.startswith("aten.add")) == ["bf16[2, 8]"] * 2 + ["f32[2, 1]"] * 2


def test_softmax_in_float32() -> None:
    text = "\n".join(lines(lambda m, x: F.softmax(x @ m.weight, -1, dtype=torch.float32).to(x.dtype) @ m.weight, x()))
    assert "f32[2, 8] = aten.softmax.int(%2, -1, torch.float32)" in text
    assert text.count("bf16[2, 8] = aten.matmul") == 2


def attention(m: Function, x: torch.Tensor, mask: torch.Tensor, fill: float) -> torch.Tensor:
    scores = F.linear(x, m.weight) @ x.transpose(-1, -2)
    return torch.softmax(scores + fill(mask), -1) @ x


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("form", MASKS)
def test_masks_stay_in_range(form: str, precision: str) -> None:
    mask = (
        torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool()[None].expand(2, 3, 3)
    )  # the last row is masked everywhere
    model, inputs = Function(lambda m, x, mask: attention(m, x, mask, MASKS[form])), (torch.randn(2, 3, 8), mask)
    graph = trace(model, *inputs)
    record = apply(SetPrecision(precision), graph)
    result, truth = run(graph, *inputs)[0], run(trace(model, *inputs), *inputs)[0]
    assert torch.isfinite(truth).all()
    assert torch.isfinite(result).all()
    assert relative_error(result[:, :2], truth[:, :2]) < 0.05
    clamped = any("became" in rewrite for rewrite in record.rewrites)
    assert clamped is (precision == "fp16" or "LOWEST" in form or form not in ("a million", "two masks added"))


def test_real_infinities_stay() -> None:
    def masked(m: Function, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.linear(x, m.weight) + torch.where(mask, 0.0, -math.inf)

    graph = trace(Function(masked), x(), mask := torch.tensor([True] * 7 + [False]))
    assert not any("became" in rewrite for rewrite in apply(SetPrecision("fp16"), graph).rewrites)
    assert torch.isneginf(run(graph, x(), mask)[0][:, 7]).all()


def test_large_numbers_that_are_no_mask_stay() -> None:
    def angles(m: Function, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return F.linear(x, m.weight) * torch.cos(positions / torch.pow(500000.0, m.frequencies[0]))[:, None]

    text = "\n".join(lines(angles, x(), torch.arange(2), precision="fp16"))
    assert "500000.0" in text
    assert "65504" not in text


@pytest.mark.parametrize("pattern", ["aten.gelu", "gelu*", "aten.gelu.default"])
def test_keep(pattern: str) -> None:
    text = "\n".join(lines(lambda m, x: F.gelu(F.linear(x, m.weight)) @ m.weight, x(), keep=(pattern,)))
    assert "f32[2, 8] = aten.gelu" in text
    assert "bf16[2, 8] = aten.matmul" in text


def test_keep_by_module_path_and_unused_patterns() -> None:
    graph = trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), x())
    record = apply(SetPrecision(keep=("1", "nothing.*")), graph)
    assert {(r.node, r.reason) for r in record.refusals} == {
        ("linear_1", "kept in float32 by '1'"), ("nothing.*", "keep names no node, operator or module of this graph"),
    }  # fmt: skip


REFUSED = {
    "cumulative": (lambda m, x: (x @ m.weight).cumsum(0), "bf16", "the error grows with the length"),
    "norm": (lambda m, x: torch.linalg.vector_norm(x @ m.weight, dim=-1), "bf16", "no low-precision CPU kernel"),
    "exponential": (lambda m, x: (x @ m.weight).exp(), "fp16", "float16's range"),
    "complex": (lambda m, x: torch.fft.rfft(x @ m.weight).abs(), "bf16", "no complex number"),
    "distance": (lambda m, x: torch.cdist(x @ m.weight, x), "bf16", "no low-precision CPU kernel"),
    "steep": (lambda m, x: (x @ m.weight).tanh().erfinv(), "bf16", "slope is unbounded"),
    "loss": (lambda m, x: F.mse_loss(x @ m.weight, x), "bf16", "sums many small terms"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_operators_that_stay_in_float32(case: str) -> None:
    function, precision, reason = REFUSED[case]
    model, inputs = Function(function), (x(),)
    graph = trace(model, *inputs)
    record = apply(SetPrecision(precision), graph)
    assert any(reason in refusal.reason for refusal in record.refusals), record.refusals
    run(graph, *inputs)  # it has a kernel


LEFT_ALONE = {
    "integers": (lambda m, i: i * 2 + i.argmax(), (torch.arange(8),)),
    "float64": (lambda m, d: d @ m.weight.double() + 1, (torch.randn(2, 8, dtype=torch.float64),)),
    "complex": (lambda m, c: c * 2, (torch.randn(2, 8, dtype=torch.complex64),)),
    "positions": (lambda m, i: (i.float() * m.frequencies).sin(), (torch.arange(4),)),
    "input that only moves": (lambda m, x: x.view(4, 4).transpose(0, 1), (torch.randn(2, 8),)),
    "bf16 already": (lambda m, b: b * 2 + 1, (torch.randn(2, 8).bfloat16(),)),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, inputs = LEFT_ALONE[case]
    model = Function(function)
    assert_left_alone(SetPrecision(), model, *inputs, reason=None)
    assert_left_alone(SetPrecision("fp32"), Block().eval(), x(), reason=None)


def test_control_flow_is_left_alone() -> None:
    def branch(m: Function, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    assert_left_alone(SetPrecision(), Function(branch), x(), reason="holds a graph of its own")


def test_operator_that_does_not_run_low_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_precision, "KEEP", ())
    model = Function(lambda m, x: torch.fft.rfft(x @ m.weight).abs() @ m.weight[:5])
    graph = trace(model, inputs := x())
    record = apply(SetPrecision(), graph)
    assert [r.reason for r in record.refusals] == ["it does not run in bf16: Unsupported dtype BFloat16"]
    assert relative_error(run(graph, inputs)[0], float64_reference(model, inputs)[0]) < 0.03


def test_custom_operator_stays() -> None:
    @torch.library.custom_op("set_precision_test::double_it", mutates_args=())
    def double_it(value: torch.Tensor) -> torch.Tensor:
        assert value.dtype == torch.float32
        return value * 2

    double_it.register_fake(lambda value: torch.empty_like(value))
    graph = trace(Function(lambda m, x: double_it(x @ m.weight) @ m.weight), x())
    record = apply(SetPrecision(), graph)
    assert record.refusals[0].reason.endswith("whether its kernel takes bf16 is unknown")
    assert torch.isfinite(run(graph, x())[0]).all()


def test_graph_that_reads_what_it_wrote_is_left_alone() -> None:
    graph = trace(Function(lambda m, x: (x @ m.weight) + m.state), x())
    product = next(n for n in graph.graph.nodes if "matmul" in n.name)
    state = next(n for n in graph.graph.nodes if n.target == "state")
    with graph.graph.inserting_after(product):
        graph.graph.call_function(torch.ops.aten.copy_.default, (state, product))
    result = SetPrecision().run(graph)
    assert "reads memory that the graph writes" in result.refusals[0].reason
    assert not result.rewrites


def test_buffer_keeps_its_dtype_when_written() -> None:
    def step(m: Function, x: torch.Tensor) -> torch.Tensor:
        m.state.copy_(x @ m.weight)
        return m.state + x

    model, inputs = Function(step), (x(),)
    graph = trace(model, *inputs)
    apply(SetPrecision(), graph)
    truth = inputs[0].double() @ model.weight.double()
    result = run(graph, *inputs)[0]
    assert dict(graph.named_buffers())["state"].dtype == torch.float32
    assert relative_error(result, truth + inputs[0].double()) < 0.02


def test_unknown_precision() -> None:
    with pytest.raises(InputError, match="Known precisions: bf16, fp16"):
        SetPrecision("bf17")


def test_second_run_finds_nothing_and_sizes_stay_dynamic() -> None:
    dims = {"x": {0: Dim("batch", max=64)}}
    for precision in DTYPES:
        assert_idempotent(SetPrecision(precision), Block().eval(), x(), dynamic_shapes=dims)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    precision=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_no_worse_than_pytorch_itself(names: list[str], precision: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*(LAYERS[name]() for name in names)).eval()
    data = torch.randn(3, 6, 8)
    truth = float64_reference(model, data)[0]
    with torch.no_grad():
        low = copy.deepcopy(model).to(DTYPES[precision])(data.to(DTYPES[precision]))
    graph = trace(model, data)
    assert apply(SetPrecision(precision), graph).rewrites
    result = run(graph, data)[0]
    assert result.dtype == torch.float32
    # twice what PyTorch's own cast of the whole model loses; the floor is one rounding of the result
    assert relative_error(result, truth) <= 2 * relative_error(low, truth) + torch.finfo(DTYPES[precision]).eps / 2
