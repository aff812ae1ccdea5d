"""set_precision: what PyTorch's own model.bfloat16() computes, with the graph's inputs and outputs as they were."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelkit import Dim
from accelkit.errors import InputError
from accelkit.overflow import measure
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


class Function(nn.Module):
    """`function(module, *inputs)`, with a weight [8, 8], a scale [8], an embedding and a buffer to use."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8) + 0.5)
        self.table = nn.Embedding(50, 8)
        self.register_buffer("frequencies", torch.rand(4))
        self.register_buffer("state", torch.zeros(2, 8))

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.function(self, *inputs)


def lines(function, *inputs: torch.Tensor, precision: str = "bf16", **options: object) -> list[str]:  # type: ignore[no-untyped-def]
    """The graph after the pass, inputs and attributes left out."""
    graph = trace(Function(function), *inputs)
    apply(SetPrecision(precision, **options), graph)
    return [line for line in graph_text(graph).splitlines() if not line.endswith(("= attribute", "= input"))]


def x() -> torch.Tensor:
    return torch.randn(2, 8)


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


class Norm(nn.Module):
    """RMSNorm as transformers' Llama writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + 1e-6)
        return self.weight * hidden.to(input_dtype)


class Block(nn.Module):
    """Two residual layers after each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.layers = nn.ModuleList([Norm(), Norm()]), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


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


LOWEST = torch.finfo(torch.float32).min
MASKS = {
    "where": lambda mask: torch.where(mask, 0.0, LOWEST),
    "masked_fill": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, LOWEST),
    "full": lambda mask: torch.full(mask.shape, LOWEST).masked_fill(mask, 0.0),
    "one minus": lambda mask: (1.0 - mask.float()) * LOWEST,
    "tensor": lambda mask: torch.where(mask, torch.tensor(0.0), torch.tensor(LOWEST)),
    "a million": lambda mask: torch.where(mask, 0.0, -1e6),
    "two masks added": lambda mask: torch.where(mask, 0.0, -1e9) + torch.where(mask, 0.0, -1e9),
    "compared": lambda mask: (lowest := torch.where(mask, 0.0, LOWEST)) * ~(lowest == LOWEST).all(-1, keepdim=True),
}


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


LAYERS = {
    "linear": lambda: nn.Linear(8, 8),
    "layer_norm": lambda: nn.LayerNorm(8),
    "gelu": nn.GELU,
    "softmax": lambda: nn.Softmax(-1),
    "norm": Norm,
    "lstm": lambda: First(nn.LSTM(8, 8, batch_first=True)),
    "gru": lambda: First(nn.GRU(8, 8, batch_first=True)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    "conv": lambda: nn.Conv1d(6, 6, 3, padding=1),
    "batch_norm": lambda: nn.BatchNorm1d(6),
    "group_norm": lambda: nn.GroupNorm(2, 6),
    "tanh": nn.Tanh,
    "up": lambda: nn.Upsample(size=8, mode="linear"),
}


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


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


# --- float16's range: what lies beyond it, or reads such values, stays in float32


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
