"""fuse_residual_rms_norm: the operator, transformers' spellings in every precision, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import floats, quick, reasons, write_before
from torch import Tensor, nn
from torch.nn import functional as F

from accelkit import Dim
from accelkit.testing import apply, assert_idempotent, assert_left_alone, assert_same_numbers, graph_text, trace
from accelkit_passes.canonicalise import Canonicalise
from accelkit_passes.fold_constants import FoldConstants
from accelkit_passes.fuse_residual_rms_norm import FuseResidualRmsNorm
from accelkit_passes.remove_no_ops import RemoveNoOps
from accelkit_passes.set_precision import SetPrecision

fused_op = torch.ops.accelkit.residual_rms_norm.default
EPS = 1e-6


def operator_form(self: Any, v: Tensor) -> Tensor:
    return F.rms_norm(v, (v.shape[-1],), self.weight, EPS)


def llama(self: Any, v: Tensor) -> Tensor:
    wide = v.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return self.weight * wide.to(v.dtype)


def t5(self: Any, v: Tensor) -> Tensor:
    variance = v.to(torch.float32).pow(2).mean(-1, keepdim=True)
    v = v * torch.rsqrt(variance + EPS)
    return self.weight * v.to(self.weight.dtype)


def gemma(self: Any, v: Tensor) -> Tensor:
    wide = v.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + self.weight.float())).type_as(v)


def plain(self: Any, v: Tensor) -> Tensor:
    return v * torch.rsqrt((v * v).mean(-1, keepdim=True) + EPS) * self.weight


def divided(self: Any, v: Tensor) -> Tensor:
    return self.weight * (v / torch.sqrt(v.square().mean(-1, keepdim=True) + EPS))


def power(self: Any, v: Tensor) -> Tensor:
    return v * torch.pow(v.pow(2).mean(-1, keepdim=True) + EPS, -0.5)


FORMS = [operator_form, llama, t5, gemma, plain, divided, power]


class Layer(nn.Module):
    """Pre-norm: the sum goes on, and so does its norm."""

    def __init__(self, norm: Callable[..., Any], width: int = 6, once: bool = False) -> None:
        super().__init__()
        self.weight, self.norm, self.once = nn.Parameter(torch.randn(width)), norm, once

    def forward(self, x: Tensor, y: Tensor) -> Any:
        x = x + y.relu()
        normalised = self.norm(self, x)
        return normalised if self.once else x + normalised.relu()


def prepared(model: nn.Module, precision: str = "fp32", *inputs: Tensor) -> Any:
    graph = trace(model, *(inputs or (torch.randn(2, 3, 6), torch.randn(2, 3, 6))))
    low = (SetPrecision(precision=precision),) if precision != "fp32" else ()
    apply((Canonicalise(), *low, RemoveNoOps(), FoldConstants()), graph)
    return graph


def test_graph_before_and_after() -> None:
    graph = prepared(Layer(llama))
    record = apply(FuseResidualRmsNorm(), graph)
    assert graph_text(graph).splitlines() == [
        "%weight: f32[6] = attribute",
        "%x: f32[2, 3, 6] = input",
        "%y: f32[2, 3, 6] = input",
        "%0: f32[2, 3, 6] = aten.relu(%y)",
        "%1: (f32[2, 3, 6], f32[2, 3, 6]) = accelkit.residual_rms_norm(%0, %x, %weight, 1e-06)",
        "%2: f32[2, 3, 6] = getitem(%1, 0)",
        "%3: f32[2, 3, 6] = getitem(%1, 1)",
        "%4: f32[2, 3, 6] = aten.relu(%2)",
        "%5: f32[2, 3, 6] = aten.add.Tensor(%4, %3)",
        "return (%5)",
    ]
    assert record.rewrites == ("add into mul_1",)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised_in_every_precision(form: Any, precision: str) -> None:
    graph = prepared(Layer(form), precision)
    assert len(apply(FuseResidualRmsNorm(), graph).rewrites) == 1
    fused = next(n for n in graph.graph.nodes if n.target is fused_op)
    assert (fused.args[2] is None) == (form is power)
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert not any(word in target for target in targets for word in ("pow", "sqrt", "mean", "mul", "div"))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_models(form: Any) -> None:
    inputs = torch.randn(2, 6).half(), torch.randn(2, 6).half()
    graph = prepared(Layer(form).half(), "fp32", *inputs)
    assert len(apply(FuseResidualRmsNorm(), graph).rewrites) == 1


def mean_square(v: Tensor, dim: Any = -1) -> Tensor:
    return v.pow(2).mean(dim, keepdim=True)


LEFT_ALONE: dict[str, tuple[Callable[[Any, Tensor], Any], str | None]] = {
    "no sum": (lambda self, v: llama(self, v * 2), "its input (mul) is no sum"),
    "two dimensions": (
        lambda self, v: F.rms_norm(v, (3, 6)),
        "it normalises the last 2 dimensions, not the last one alone",
    ),
    "over the length": (
        lambda self, v: v * torch.rsqrt(mean_square(v, 1) + EPS),
        "it normalises dimension 1, not the last one alone",
    ),
    "over all": (
        lambda self, v: v * torch.rsqrt(mean_square(v, (-2, -1)) + EPS),
        "it normalises dimension 1, 2, not the last one alone",
    ),
    "over all, none named": (
        lambda self, v: v * torch.rsqrt(v.pow(2).mean(dim=(), keepdim=True) + EPS),
        "it normalises dimension 0, 1, 2, not the last one alone",
    ),
    "scale used elsewhere": (
        lambda self, v: v * (s := torch.rsqrt(mean_square(v) + EPS)) + s,
        None,
    ),
    "mean used elsewhere": (
        lambda self, v: v * torch.rsqrt((m := mean_square(v)) + EPS) + m,
        "mean is also used by add_",
    ),
    "another value scaled": (lambda self, v: v.relu() * torch.rsqrt(mean_square(v) + EPS), None),
    "dimension dropped": (lambda self, v: v[0, 0] * torch.rsqrt(v[0, 0].pow(2).mean(-1) + EPS), None),
    "scale added": (lambda self, v: v + torch.rsqrt(mean_square(v) + EPS), None),
    "divided by": (lambda self, v: torch.sqrt(mean_square(v) + EPS) / v, None),
    "cubes": (lambda self, v: v * torch.rsqrt(v.pow(3).mean(-1, keepdim=True) + EPS), None),
    "sum of squares": (lambda self, v: v * torch.rsqrt(v.pow(2).sum(-1, keepdim=True) + EPS), None),
    "eps by another": (lambda self, v: v * torch.rsqrt(mean_square(v) + self.weight[0]), None),
    "another power": (lambda self, v: v * torch.pow(mean_square(v) + EPS, -0.25), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    form, reason = LEFT_ALONE[case]
    inputs = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    assert_left_alone(FuseResidualRmsNorm(), Layer(form, once=True), *inputs, reason=reason)


def test_roots_of_inputs_and_weights_are_no_norms() -> None:
    class Roots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * torch.rsqrt(x) + y / torch.sqrt(self.weight) + y * torch.pow(x, -0.5)

    assert_left_alone(FuseResidualRmsNorm(), Roots(), torch.rand(2, 6), torch.rand(2, 6), reason=None)


def test_weight_of_another_shape_stays_outside() -> None:
    def per_row(self: Any, v: Tensor) -> Tensor:
        return v * torch.rsqrt(mean_square(v) + EPS) * torch.ones(3, 1)

    graph = prepared(Layer(per_row))
    assert len(apply(FuseResidualRmsNorm(), graph).rewrites) == 1
    assert next(n for n in graph.graph.nodes if n.target is fused_op).args[2] is None
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)


def test_write_in_between_is_refused() -> None:
    graph = trace(Layer(operator_form), torch.randn(2, 6), torch.randn(2, 6))
    write_before(graph, "rms_norm")
    assert reasons(FuseResidualRmsNorm(), graph) == ["add__tensor writes to memory between add and rms_norm"]


@pytest.mark.parametrize("form", [operator_form, llama])
def test_second_run_finds_nothing_and_sizes_stay_dynamic(form: Any) -> None:
    dims = {0: Dim("batch", max=64), 1: Dim("length", max=99)}
    inputs = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    assert_idempotent(FuseResidualRmsNorm(), Layer(form), *inputs, dynamic_shapes={"x": dims, "y": dims})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_default_eps_is_pytorchs(dtype: torch.dtype) -> None:
    x, y = (3e-4 * torch.randn(2, 6, dtype=dtype) for _ in range(2))  # so small that eps decides
    model = Layer(lambda self, v: F.rms_norm(v, (6,), self.weight), once=True).to(dtype)
    assert_same_numbers(FuseResidualRmsNorm(), model, x, y)


@quick
@given(
    form=st.sampled_from(FORMS),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 9),
    dtype=floats,
    seed=st.integers(0, 2**31),
)
def test_numbers(form: Any, shape: list[int], width: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    if dtype is torch.float64 and form in (llama, t5, gemma):
        dtype = torch.float32  # they compute in float32 by themselves
    model = Layer(form, width).to(dtype)
    x, y = (torch.randn(*shape, width, dtype=dtype) for _ in range(2))
    floor = 0.0 if form is operator_form else torch.finfo(dtype).eps
    passes = (Canonicalise(), FoldConstants(), FuseResidualRmsNorm())
    assert_same_numbers(passes, model, x, y, times=2, floor=floor)
