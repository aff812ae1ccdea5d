"""fuse_patch_embedding: a convolution of patches that do not overlap, and the two ways to make rows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import quick, reasons, write_before
from torch import nn

from accelkit import Dim
from accelkit.testing import apply, assert_idempotent, assert_left_alone, assert_same_numbers, graph_text, trace
from accelkit_passes.fuse_patch_embedding import FusePatchEmbedding


class Patches(nn.Module):
    """A convolution, and what makes rows of its result."""

    def __init__(self, rows: Any = lambda y: y.flatten(2).permute(0, 2, 1), features: int = 5, **conv: Any) -> None:
        super().__init__()
        options = {"kernel_size": (2, 3), "stride": (2, 3), **conv}
        self.conv, self.rows = nn.Conv2d(4, features, **options), rows

    def forward(self, image: torch.Tensor) -> Any:
        return self.rows(self.conv(image))


def channels_last(y: torch.Tensor) -> torch.Tensor:
    return y.permute(0, 2, 3, 1).flatten(1, 2)


def test_graph_before_and_after() -> None:
    graph = trace(Patches(), torch.randn(2, 4, 6, 6))
    record = apply(FusePatchEmbedding(), graph)
    assert graph_text(graph).splitlines() == [
        "%conv.weight: f32[5, 4, 2, 3] = attribute",
        "%conv.bias: f32[5] = attribute",
        "%image: f32[2, 4, 6, 6] = input",
        "%0: f32[2, 6, 5] = accelkit.patch_embedding(%image, %conv.weight, %conv.bias)",
        "return (%0)",
    ]
    assert record.rewrites == ("conv2d with flatten and permute",)


LEFT_ALONE: dict[str, tuple[nn.Module, str | None]] = {
    "patches overlap": (Patches(stride=(1, 3)), "the stride [1, 3] is not the kernel's size [2, 3]"),
    "padded": (Patches(padding=1), "the image is padded by [1, 1]"),
    "padded to the same size": (Patches(kernel_size=1, stride=1, padding="same"), "the image is padded by same"),
    "dilated": (Patches(kernel_size=3, stride=3, dilation=2), "the kernel is dilated by [2, 2]"),
    "grouped": (Patches(groups=2, features=6), "the convolution has 2 groups"),
    "image used elsewhere": (
        Patches(lambda y: (y.flatten(2).permute(0, 2, 1), y.relu())),
        "conv2d is also used by relu",
    ),
    "columns used elsewhere": (
        Patches(lambda y: ((z := y.flatten(2)).permute(0, 2, 1), z.relu())),
        "flatten is also used by relu",
    ),
    "not transposed": (Patches(lambda y: y.flatten(2)), None),
    "batch and channels mixed": (Patches(lambda y: y.reshape(5, 2, -1).permute(0, 2, 1)), None),
    "batch flattened": (Patches(lambda y: y.permute(0, 2, 3, 1).reshape(6, 2, 5)), None),
    "width before height": (Patches(lambda y: y.permute(0, 1, 3, 2).flatten(2).permute(0, 2, 1)), None),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model, reason = LEFT_ALONE[case]
    assert_left_alone(FusePatchEmbedding(), model, torch.randn(2, 4, 6, 6), reason=reason)


def test_kernel_that_is_computed_with_a_dynamic_size_is_refused() -> None:
    class Computed(nn.Module):
        def forward(self, image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(image, weight, stride=2).flatten(2).permute(0, 2, 1)

    dims = {"image": {}, "weight": {3: Dim("width", min=2, max=4)}}
    inputs = (torch.randn(2, 4, 6, 6), torch.randn(5, 4, 2, 3))
    reason = "the kernel's size [2, s"
    assert_left_alone(FusePatchEmbedding(), Computed(), *inputs, reason=reason, dynamic_shapes=dims)


def test_write_in_between_is_refused() -> None:
    graph = trace(Patches(), torch.randn(2, 4, 6, 6))
    write_before(graph, "flatten")
    assert reasons(FusePatchEmbedding(), graph) == ["add__tensor writes to memory between conv2d and permute"]


def test_second_run_finds_nothing_and_batch_stays_dynamic() -> None:
    for rows in (lambda y: y.flatten(2).permute(0, 2, 1), channels_last):
        dims = {"image": {0: Dim("batch", max=64)}}
        assert_idempotent(FusePatchEmbedding(), Patches(rows), torch.randn(3, 4, 6, 6), dynamic_shapes=dims)


def test_number_of_patches_is_proved_or_refused() -> None:
    dims = {"image": {2: Dim("height", min=2, max=64), 3: Dim("width", min=3, max=64)}}
    assert_idempotent(FusePatchEmbedding(), Patches(), torch.randn(3, 4, 6, 6), dynamic_shapes=dims)
    graph = trace(Patches(), torch.randn(3, 4, 6, 6), dynamic_shapes=dims)
    (rows,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    rows.meta["val"] = rows.meta["val"].new_empty(3, 7, 5)  # as if PyTorch had another formula for it
    assert "is known only at run time" in reasons(FusePatchEmbedding(), graph)[0]


@quick
@given(
    batch=st.integers(1, 3),
    height=st.integers(2, 9),
    width=st.integers(3, 9),
    bias=st.booleans(),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_numbers(batch: int, height: int, width: int, bias: bool, last: bool, dtype: torch.dtype) -> None:
    model = Patches(*[channels_last] * last, bias=bias).to(dtype)
    assert_same_numbers(FusePatchEmbedding(), model, torch.randn(batch, 4, height, width, dtype=dtype))
