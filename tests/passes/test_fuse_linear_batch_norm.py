"""fuse_linear_batch_norm: folds where the norm's channels are the layer's features, and proves it first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelkit import Dim
from accelkit.testing import (
    apply,
    assert_idempotent,
    assert_left_alone,
    graph_text,
    relative_error,
    run,
    trace,
)  # fmt: skip
from accelkit_passes.fuse_linear_batch_norm import FuseLinearBatchNorm

FEATURES = 6


class Wired(nn.Module):
    """A linear layer and a norm, put together by `wiring`."""

    def __init__(self, wiring, norm: nn.Module | None = None, bias: bool = True, features: int = FEATURES) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.linear, self.norm = nn.Linear(4, features, bias=bias), norm or nn.BatchNorm1d(features)
        if self.norm.running_mean is not None:
            nn.init.normal_(self.norm.running_mean)
            nn.init.uniform_(self.norm.running_var, 0.2, 3.0)
        if self.norm.affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.wiring = wiring
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wiring(self, x)


def straight(module: Wired, x: torch.Tensor) -> torch.Tensor:
    return module.norm(module.linear(x))


def transposed(module: Wired, x: torch.Tensor) -> torch.Tensor:
    return module.norm(module.linear(x).transpose(1, 2)).transpose(1, 2)


def permuted(module: Wired, x: torch.Tensor) -> torch.Tensor:
    return module.norm(module.linear(x).permute(0, -1, 1).contiguous())


def flattened(module: Wired, x: torch.Tensor) -> torch.Tensor:
    return module.norm(module.linear(x).reshape(-1, module.linear.out_features))


def swapped_others(module: Wired, x: torch.Tensor) -> torch.Tensor:
    return module.norm(module.linear(x).transpose(0, 1).flatten(0, 1))


WIRINGS = {
    "straight": straight,
    "transposed": transposed,
    "permuted": permuted,
    "flattened": flattened,
    "swapped": swapped_others,
}


def test_graph_before_and_after() -> None:
    graph = trace(Wired(transposed), torch.randn(2, 5, 4))
    record = apply(FuseLinearBatchNorm(), graph)
    assert graph_text(graph).splitlines()[1:] == [
        "%x: f32[2, 5, 4] = input",
        "%linear_weight_folded: f32[6, 4] = attribute",
        "%linear_bias_folded: f32[6] = attribute",
        "%0: f32[2, 5, 6] = aten.linear(%x, %linear_weight_folded, %linear_bias_folded)",
        "%1: f32[2, 6, 5] = aten.transpose.int(%0, 1, 2)",
        "%2: f32[2, 5, 6] = aten.transpose.int(%1, 1, 2)",
        "return (%2)",
    ]
    assert record.rewrites == ("batch_norm into linear (new weights of 120 bytes)",)


LONG = (2, 6, 4)  # as long as it has features, so that a wrong fold would fit
LEFT_ALONE = {
    "over the length": (Wired(straight), LONG, "but linear's features are dimension 2"),
    "transposed twice": (
        Wired(lambda m, x: m.norm(m.linear(x).transpose(1, 2).transpose(2, 1))),
        LONG,
        "but linear's features are dimension 2",
    ),
    "features split": (
        Wired(lambda m, x: m.norm(m.linear(x).view(12, 6, 1).view(2, 6, 6))),
        LONG,
        "not provably keep the features",
    ),
    "features moved by a view": (
        Wired(lambda m, x: m.norm(m.linear(x).transpose(1, 2).reshape(12, 6))),
        LONG,
        "not provably keep",
    ),
    "linear used elsewhere": (Wired(lambda m, x: m.norm(y := m.linear(x)) + y), (3, 4), "linear is also used by add"),
    "transpose used elsewhere": (
        Wired(lambda m, x: m.norm(y := m.linear(x).transpose(1, 2)) + y),
        LONG,
        "transpose is also used by add",
    ),
    "training": (Wired(straight, nn.BatchNorm1d(6, track_running_stats=False)), (3, 4), "the batch's own statistics"),
    "weight computed": (
        Wired(lambda m, x: m.norm(nn.functional.linear(x, m.linear.weight + x.sum()))),
        (3, 4),
        "the weight (add) is computed",
    ),
    "bias computed": (
        Wired(lambda m, x: m.norm(nn.functional.linear(x, m.linear.weight, x.sum() + m.linear.bias))),
        (3, 4),
        "the bias (add) is",
    ),
    "no linear": (Wired(lambda m, x: m.norm(torch.cat([x, x[:, :2]], 1))), (3, 4), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, shape, reason = LEFT_ALONE[case]
    assert_left_alone(FuseLinearBatchNorm(), model, torch.randn(shape), reason=reason)


def test_other_dtype_is_refused() -> None:
    model = Wired(straight)
    model.linear.bfloat16()
    assert_left_alone(FuseLinearBatchNorm(), model, torch.randn(3, 4).bfloat16(), reason="the weight is torch.bfloat16")


def test_result_that_overflows_is_refused() -> None:
    model = Wired(straight, nn.BatchNorm1d(6, eps=1e-300))
    nn.init.zeros_(model.norm.running_var)
    assert_left_alone(FuseLinearBatchNorm(), model, torch.randn(3, 4), reason="folded weight is not finite")


def test_bias_that_overflows_is_refused() -> None:
    model = Wired(straight)
    nn.init.constant_(model.norm.running_mean, 3e38)
    nn.init.constant_(model.norm.running_var, 1e-3)
    nn.init.constant_(model.norm.weight, 1.0)
    assert_left_alone(FuseLinearBatchNorm(), model, torch.randn(3, 4), reason="folded bias is not finite")


@pytest.mark.parametrize("wiring", ["straight", "transposed", "flattened"])
def test_second_run_finds_nothing_and_sizes_stay_dynamic(wiring: str) -> None:
    dims = {0: Dim("batch", max=64)} if wiring == "straight" else {0: Dim("batch", max=64), 1: Dim("length", max=99)}
    shape = (3, 4) if wiring == "straight" else (3, 5, 4)
    assert_idempotent(FuseLinearBatchNorm(), Wired(WIRINGS[wiring]), torch.randn(shape), dynamic_shapes={"x": dims})


@settings(max_examples=40, deadline=None)
@given(
    wiring=st.sampled_from(sorted(WIRINGS)),
    features=st.integers(1, 7),
    length=st.integers(1, 7),
    bias=st.booleans(),
    affine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_numbers(
    wiring: str, features: int, length: int, bias: bool, affine: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Wired(WIRINGS[wiring], nn.BatchNorm1d(features, affine=affine), bias, features).to(dtype)
    x = torch.randn((3, 4) if wiring == "straight" else (3, length, 4), dtype=dtype)
    graph = trace(model, x)
    unfused = run(graph, x)[0]
    assert len(apply(FuseLinearBatchNorm(), graph).rewrites) == 1
    fused = run(graph, x)[0]

    # A folded weight and bias are rounded once: the output moves by at most epsilon / 2 of the sum of its terms' sizes.
    wide = model.double()
    with torch.no_grad():
        truth = wide(x.double())
        folded = trace(wide, x.double())
        apply(FuseLinearBatchNorm(), folded)
        for name, buffer in folded.named_buffers():
            if name.endswith("_folded"):
                buffer.abs_()
    sizes = run(folded, x.double().abs())[0]
    floor = torch.finfo(dtype).eps / 2 * float(sizes.norm() / truth.norm())
    assert relative_error(fused, truth) <= 2 * relative_error(unfused, truth) + floor
