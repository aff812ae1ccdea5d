"""fuse_linear_activation: every spelling of an activation, and what only looks like one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import graph_of, quick, reasons, write_before
from torch import Tensor, nn
from torch.nn import functional as F

from accelkit import Dim
from accelkit.testing import apply, assert_idempotent, assert_left_alone, assert_same_numbers, graph_text, run, trace
from accelkit_passes.canonicalise import Canonicalise
from accelkit_passes.fold_constants import FoldConstants
from accelkit_passes.fuse_linear_activation import FuseLinearActivation
from accelkit_passes.remove_no_ops import RemoveNoOps
from accelkit_passes.set_precision import SetPrecision

aten = torch.ops.aten


class Layer(nn.Module):
    """A linear layer, and what follows it."""

    def __init__(self, then: Callable[[Tensor], Any], bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(4, 6, bias=bias, **options), then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.linear(x))


GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "operator": F.gelu,
    "half times x": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "seven digits": lambda x: 0.5 * x * (1.0 + torch.erf(x * 0.7071068)),
    "distribution": lambda x: x * torch.special.ndtr(x),
    "complement": lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2)),
    "upcast": lambda x: F.gelu(x.float()).to(x.dtype),
}
GELU_TANH: dict[str, Callable[[Tensor], Tensor]] = {
    "operator": lambda x: F.gelu(x, approximate="tanh"),
    "transformers' new": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3.0)))),
    "transformers' fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "folded constant": lambda x: (
        0.5 * x * (1 + torch.tanh(torch.sqrt(torch.tensor(2 / math.pi)) * (x + 0.044715 * x * x * x)))
    ),
    "by sigmoid": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))),
}
SPELLINGS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "silu": {"operator": F.silu, "sigmoid": lambda x: x * x.sigmoid(), "exp": lambda x: x / (1 + torch.exp(-x))},
    "relu": {
        "operator": F.relu,
        "in place": F.relu_,
        "clamp": lambda x: x.clamp(min=0),
        "twice": lambda x: x.relu().relu(),
    },
}
CASES = [(name, spelling) for name, spellings in SPELLINGS.items() for spelling in spellings]


def test_graph_before_and_after() -> None:
    graph = trace(Layer(F.gelu), torch.randn(2, 5, 4))
    record = apply(FuseLinearActivation(), graph)
    assert graph_text(graph).splitlines() == [
        "%linear.weight: f32[6, 4] = attribute",
        "%linear.bias: f32[6] = attribute",
        "%x: f32[2, 5, 4] = input",
        "%0: f32[2, 5, 6] = accelkit.linear_activation(%x, %linear.weight, %linear.bias, gelu)",
        "return (%0)",
    ]
    assert record.rewrites == ("gelu (gelu) into linear",)


IN_PRECISIONS = [
    (name, spelling, precision)
    for name, spelling in CASES
    for precision in ("fp32", "fp16", "bf16")
    if spelling != "folded constant" or precision == "fp32"
]


@pytest.mark.parametrize(("name", "spelling", "precision"), IN_PRECISIONS)
def test_every_spelling_is_recognised_in_every_precision(name: str, spelling: str, precision: str) -> None:
    graph = trace(Layer(SPELLINGS[name][spelling], bias=False), torch.randn(2, 4))
    low = (SetPrecision(precision=precision),) if precision != "fp32" else ()
    apply((Canonicalise(), *low, RemoveNoOps(), FoldConstants(), FuseLinearActivation()), graph)
    (fused,) = (n for n in graph.graph.nodes if n.target is torch.ops.accelkit.linear_activation.default)
    assert fused.args[2:] == (None, name)
    left = [n.target for n in graph.graph.nodes if n.op == "call_function" and n is not fused]
    assert set(left) <= {aten.to.dtype}


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


NONE = "is none of gelu, gelu_tanh, relu, silu"
LEFT_ALONE: dict[str, tuple[Callable[[Tensor], Any], str | None]] = {
    "quick gelu": (quick_gelu, f"(aten.sigmoid.default) {NONE}; it differs from gelu by up to 0.02"),
    "four digits": (lambda x: 0.5 * x * (1 + torch.erf(x / 1.414)), "it differs from gelu by up to 4.4e-05"),
    "clipped relu": (F.relu6, NONE),
    "leaky": (lambda x: F.leaky_relu(x, 1e-3), NONE),
    "tanh": (torch.tanh, f"what follows linear (aten.tanh.default) {NONE}"),
    "linear used elsewhere": (lambda x: (F.gelu(x), x.sum()), "linear is also used by sum_1"),
    "inside used elsewhere": (lambda x: (x * (s := x.sigmoid()), s), "sigmoid is also used by output"),
    "wider result": (lambda x: F.relu(x.double()), "the activation's result is torch.float64, linear's torch.float32"),
    "scaled only": (lambda x: x * 0.125, None),
    "of two tensors": (lambda x: F.gelu(x + x.sum()), None),
    "gated by its own sum": (lambda x: x * x.sum().sigmoid(), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    then, reason = LEFT_ALONE[case]
    assert_left_alone(FuseLinearActivation(), Layer(then), torch.randn(3, 4), reason=reason)


def test_what_bends_only_far_out_stays_behind_the_activation() -> None:
    graph = trace(Layer(lambda x: F.gelu(x).clamp(max=1e4)), torch.randn(3, 4))
    assert apply(FuseLinearActivation(), graph).rewrites == ("gelu (gelu) into linear",)
    assert graph.graph.find_nodes(op="call_function", target=aten.clamp.default)


def test_constants_of_few_digits_are_refused_in_float64() -> None:
    layer = Layer(GELU["seven digits"], dtype=torch.float64)
    assert_left_alone(FuseLinearActivation(), layer, torch.randn(3, 4).double(), reason=NONE)
    layer = Layer(GELU["half times x"], dtype=torch.float64)
    assert_same_numbers(FuseLinearActivation(), layer, torch.randn(3, 4).double(), times=2, floor=1e-15)


def test_number_that_the_graph_writes_to_is_no_constant() -> None:
    def scaled_silu(self: Any, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y * torch.sigmoid(y * self.one)

    def counting(self: Any, x: Tensor) -> Tensor:
        y = scaled_silu(self, x)
        self.one.add_(1)
        return y

    tensors = {"weight": torch.randn(6, 4), "one": torch.ones(())}
    graph = graph_of(scaled_silu, torch.randn(3, 4), **tensors)
    assert apply(FuseLinearActivation(), graph).rewrites == ("silu (mul_1) into linear",)
    assert reasons(FuseLinearActivation(), graph_of(counting, torch.randn(3, 4), **tensors)) == []


def test_constant_that_the_precision_has_rounded_is_refused() -> None:
    graph = trace(Layer(GELU_TANH["folded constant"]), torch.randn(2, 4))
    low = SetPrecision(precision="fp16")
    record = apply((Canonicalise(), low, RemoveNoOps(), FoldConstants(), FuseLinearActivation()), graph)
    assert record.rewrites == ()
    assert "it differs from gelu_tanh by up to" in record.refusals[0].reason


def test_weight_of_another_dtype_is_refused() -> None:
    for name in ("weight", "bias"):
        graph = trace(Layer(F.relu), torch.randn(3, 4))
        (node,) = (n for n in graph.graph.nodes if n.target == f"linear.{name}")
        node.meta["val"] = node.meta["val"].to(torch.bfloat16)
        assert reasons(FuseLinearActivation(), graph) == [
            f"linear_{name} is torch.bfloat16, the input (x) torch.float32"
        ]


OPERANDS: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any] | None, str]] = {
    "vector": (
        lambda self, x, w: F.linear(x, w).relu(),
        (torch.randn(3, 4), torch.randn(4)),
        None,
        "the weight (w) has 1 dimension(s), not 2",
    ),
    "dynamic weight": (
        lambda self, x, w: F.linear(x, w).relu(),
        (torch.randn(3, 4), torch.randn(6, 4)),
        {"x": {}, "w": {0: Dim("features", max=64)}},
        "the weight's (w) size is known only at run time",
    ),
    "one bias for all": (
        lambda self, x, w, b: F.linear(x, w, b).relu(),
        (torch.randn(3, 4), torch.randn(6, 4), torch.randn(1)),
        None,
        "the bias is not one number for each of the 6 features",
    ),
}


@pytest.mark.parametrize("case", OPERANDS)
def test_operands_that_no_kernel_takes_are_refused(case: str) -> None:
    function, inputs, dims, reason = OPERANDS[case]
    model = type("Case", (nn.Module,), {"forward": function})()
    assert_left_alone(FuseLinearActivation(), model, *inputs, reason=reason, dynamic_shapes=dims)


def test_write_in_between_is_refused() -> None:
    graph = trace(Layer(F.relu), torch.randn(3, 4))
    write_before(graph, "relu")
    assert reasons(FuseLinearActivation(), graph) == ["add__tensor writes to memory between linear and relu"]


@pytest.mark.parametrize("spelling", ["operator", "half times x"])
def test_second_run_finds_nothing_and_sizes_stay_dynamic(spelling: str) -> None:
    dims = {"x": {0: Dim("batch", max=64), 1: Dim("length", max=99)}}
    assert_idempotent(FuseLinearActivation(), Layer(GELU[spelling]), torch.randn(3, 5, 4), dynamic_shapes=dims)


def test_each_of_several_layers_is_fused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 2), nn.SiLU())
    graph = trace(model, torch.randn(2, 4))
    assert len(apply(FuseLinearActivation(), graph).rewrites) == 3


@quick
@given(
    case=st.sampled_from(CASES),
    shape=st.lists(st.integers(1, 5), max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_numbers(
    case: tuple[str, str], shape: list[int], bias: bool, dtype: torch.dtype, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    name, spelling = case
    model, x = Layer(SPELLINGS[name][spelling], bias, dtype=dtype), scale * torch.randn(*shape, 4, dtype=dtype)
    if spelling in ("operator", "in place", "clamp", "twice"):
        return assert_same_numbers(FuseLinearActivation(), model, x)
    # the spelled-out form is the yardstick; it can be exact by luck, the fused one rounds to the dtype once
    wide = (Canonicalise(), FoldConstants(), FuseLinearActivation())
    return assert_same_numbers(wide, model, x, times=2, floor=2 * torch.finfo(dtype).eps)


def test_fused_is_its_meaning_to_the_bit() -> None:
    layer, x = Layer(GELU_TANH["transformers' new"]), torch.randn(7, 4)
    graph = trace(layer, x)
    apply(FuseLinearActivation(), graph)
    with torch.no_grad():
        assert torch.equal(run(graph, x)[0], F.gelu(layer.linear(x), approximate="tanh"))
