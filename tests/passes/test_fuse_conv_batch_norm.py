"""fuse_conv_batch_norm: every kind of convolution takes the norm, and what only looks alike is left alone with its
reason."""

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
    assert_same_numbers,
    graph_text,
    relative_error,
    run,
    trace,
)  # fmt: skip
from accelkit_passes.fuse_conv_batch_norm import FuseConvBatchNorm

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}  # fmt: skip


def used(norm: nn.Module) -> nn.Module:
    """A norm as training leaves it: no statistic or weight is 0 or 1."""
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.eval()


class Wired(nn.Module):
    """conv and norm, put together by `wiring`."""

    def __init__(self, wiring, conv=None, norm=None) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(3, 4, 3), norm or used(nn.BatchNorm2d(4))
        self.wiring = wiring

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wiring(self, x)


def plain(**options: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), used(nn.BatchNorm2d(4))).eval()


def test_graph_before_and_after() -> None:
    graph = trace(plain(bias=False), torch.randn(2, 3, 8, 8))
    record = apply(FuseConvBatchNorm(), graph)
    assert graph_text(graph).splitlines()[1:] == [
        "%input: f32[2, 3, 8, 8] = input",
        "%0_weight_folded: f32[4, 3, 3, 3] = attribute",
        "%0_bias_folded: f32[4] = attribute",
        "%0: f32[2, 4, 6, 6] = aten.conv2d(%input, %0_weight_folded, %0_bias_folded)",
        "return (%0)",
    ]
    assert record.rewrites == ("batch_norm into conv2d (new weights of 448 bytes)",)


def written(module: Wired, x: torch.Tensor) -> torch.Tensor:
    y = module.norm(module.conv(x))
    module.norm.running_mean.add_(1.0)
    return y


def batch_statistics() -> nn.Module:
    return nn.BatchNorm2d(4, track_running_stats=False)


def zero_variance() -> nn.Module:
    norm = used(nn.BatchNorm2d(4, eps=1e-300))
    nn.init.zeros_(norm.running_var)
    return norm


def native(module: Wired, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    n = module.norm
    return torch.ops.aten.native_batch_norm(
        module.conv(x), n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, 1e-5
    )


LEFT_ALONE = {
    "training": (Wired(lambda m, x: m.norm(m.conv(x)), norm=batch_statistics()), "the batch's own statistics"),
    "conv used elsewhere": (Wired(lambda m, x: m.norm(y := m.conv(x)) + y), "conv2d is also used by add"),
    "weight computed": (
        Wired(lambda m, x: m.norm(nn.functional.conv2d(x, m.conv.weight * x.mean(), m.conv.bias))),
        "is computed at run time",
    ),
    "bias computed": (
        Wired(lambda m, x: m.norm(nn.functional.conv2d(x, m.conv.weight, m.conv.bias * x.mean()))),
        "the bias (mul) is computed",
    ),
    "statistics written": (Wired(written), "is written to by the graph"),
    "no batch dimension": (  # the norm's channels are the rows, of which there are as many as channels
        Wired(lambda m, x: m.norm(m.conv(x[0])), nn.Conv2d(3, 6, 3), used(nn.BatchNorm1d(6))),
        "has no batch dimension",
    ),
    "variance 0": (Wired(lambda m, x: m.norm(m.conv(x)), norm=zero_variance()), "folded weight is not finite"),
    "saved statistics used": (
        Wired(lambda m, x: (lambda y: y[0] + y[1].sum())(native(m, x))),
        "saved statistics are used by",
    ),
    "dtypes differ": (
        Wired(lambda m, x: m.norm(m.conv(x)), nn.Conv2d(3, 4, 3).bfloat16(), used(nn.BatchNorm2d(4))),
        "the weight is torch.bfloat16",
    ),
    "no convolution": (Wired(lambda m, x: m.norm(x.repeat(1, 2, 1, 1)[:, :4])), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, reason = LEFT_ALONE[case]
    x = torch.randn(2, 3, 8, 8)
    assert_left_alone(FuseConvBatchNorm(), model, x.to(model.conv.weight.dtype), reason=reason)


def test_what_torch_does_not_even_export_is_refused() -> None:
    # Graphs come from elsewhere, too.
    graph = trace(plain(), torch.randn(2, 3, 8, 8))
    norm = next(n for n in graph.graph.nodes if n.name == "batch_norm")
    graph.register_buffer("low_weight", torch.ones(4, dtype=torch.float16))
    with graph.graph.inserting_before(norm):
        norm.update_arg(1, graph.graph.get_attr("low_weight"))
    assert "mixes torch.float16 and torch.float32" in FuseConvBatchNorm().run(graph).refusals[0].reason
    norm.update_arg(3, None)
    assert "has no running statistics" in FuseConvBatchNorm().run(graph).refusals[0].reason


def test_result_read_twice_is_refused() -> None:
    graph = trace(Wired(lambda m, x: native(m, x)[0].relu()), torch.randn(2, 3, 8, 8))
    relu, item = (next(n for n in graph.graph.nodes if n.name == name) for name in ("relu", "getitem"))
    with graph.graph.inserting_before(relu):
        again = graph.graph.call_function(item.target, item.args)
        sum_of_both = graph.graph.call_function(torch.ops.aten.add.Tensor, (item, again))
    relu.replace_input_with(item, sum_of_both)
    assert "result is read 2 times" in FuseConvBatchNorm().run(graph).refusals[0].reason


def test_bias_that_overflows_is_refused() -> None:
    model = plain()
    nn.init.constant_(model[1].running_mean, 1e38)
    nn.init.constant_(model[1].running_var, 1e-5)
    nn.init.constant_(model[1].weight, 0.1)
    assert_left_alone(FuseConvBatchNorm(), model, torch.randn(1, 3, 8, 8), reason="folded bias is not finite")


def test_second_run_finds_nothing_and_sizes_stay_dynamic() -> None:
    sizes = {"input": {0: Dim("batch", max=64), 2: Dim("height", min=4, max=64)}}
    assert_idempotent(FuseConvBatchNorm(), plain(), torch.randn(2, 3, 8, 8), dynamic_shapes=sizes)


def test_shared_weight_stays_for_the_other() -> None:
    model = Wired(lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1))
    record = assert_idempotent(FuseConvBatchNorm(), model, torch.randn(2, 3, 8, 8))
    assert record.rewrites == ("batch_norm into conv2d (new weights of 448 bytes; conv_weight stays for conv2d_1)",)
    assert_same_numbers(FuseConvBatchNorm(), model, torch.randn(2, 3, 8, 8), times=2, floor=1e-6)


@pytest.mark.parametrize("functional", ["native_batch_norm", "_native_batch_norm_legit_no_training"])
def test_functionalised_forms(functional: str) -> None:
    operator = getattr(torch.ops.aten, functional)
    flags = (False,) if functional == "native_batch_norm" else ()
    model = Wired(
        lambda m, x: operator(
            m.conv(x), m.norm.weight, m.norm.bias, m.norm.running_mean, m.norm.running_var, *flags, 0.1, 1e-5
        )[0]
    )
    assert_same_numbers(FuseConvBatchNorm(), model, torch.randn(2, 3, 8, 8), times=2, floor=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 3]),
    width=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    same=st.booleans(),
    low_level=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_numbers(
    rank: int, transposed: bool, groups: int, width: int, bias: bool, affine: bool, same: bool, low_level: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kind, channels_in, channels_out = CONVOLUTIONS[rank][transposed], 2 * groups, width * groups
    padding = {} if transposed else {"padding": "same" if same else 1}
    conv = kind(channels_in, channels_out, 3, groups=groups, bias=bias, **padding)
    model = nn.Sequential(conv, used(CONVOLUTIONS[rank][2](channels_out, affine=affine))).eval().to(dtype)
    x = torch.randn(2, channels_in, *[5] * rank, dtype=dtype)
    if low_level and not same:
        options = conv.stride, conv.padding, conv.dilation, transposed, conv.output_padding, groups
        model = Wired(lambda m, x: m.norm(torch.convolution(x, m.conv.weight, m.conv.bias, *options)), conv, model[1])

    graph = trace(model, x)
    unfused = run(graph, x)[0]
    assert len(apply(FuseConvBatchNorm(), graph).rewrites) == 1
    fused = run(graph, x)[0]

    # The truth, from the same (rounded) weights. A folded weight and bias are rounded once: the output moves by at most
    # epsilon / 2 of the sum of its terms' sizes.
    wide = model.double()
    with torch.no_grad():
        truth = wide(x.double())
        folded = trace(wide, x.double())
        apply(FuseConvBatchNorm(), folded)
        for name, buffer in folded.named_buffers():
            if name.endswith("_folded"):
                buffer.abs_()
        sizes = run(folded, x.double().abs())[0]
    floor = torch.finfo(dtype).eps / 2 * float(sizes.norm() / truth.norm())
    assert relative_error(fused, truth) <= 2 * relative_error(unfused, truth) + floor
