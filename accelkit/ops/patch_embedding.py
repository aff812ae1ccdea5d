"""conv2d(image, weight, bias, stride=patch) -> flatten(2) -> transpose(1, 2)

How vision transformers begin: patches do not overlap, so the convolution is one matrix product over rows that the
kernel gathers from the image, and the transposed copy afterwards is never made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define, without_triton

SCHEMA = "patch_embedding(Tensor image, Tensor weight, Tensor? bias) -> Tensor"


def meaning(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose stride is its kernel size, as rows.

    Args:
        image: [batch, channels, height, width]; what the patches do not cover at the right and lower edge is ignored.
        weight: [features, channels, patch height, patch width], of image's dtype. bias: [features] or None.

    Returns:
        [batch, patches, features], patches row by row.
    """
    patch = (weight.shape[2], weight.shape[3])
    return F.conv2d(image, weight, bias, stride=patch).flatten(2).transpose(1, 2).contiguous()


def fake(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = image.shape
    features, _, patch_height, patch_width = weight.shape
    return image.new_empty((batch, (height // patch_height) * (width // patch_width), features))


def refusal(image: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if reason := without_triton():
        return reason
    if image.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels multiply float16 and bfloat16, not {image.dtype}"
    return None


def kernel(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from accelkit.kernels import linear

    return linear.patch_embedding(image, weight, bias)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
