"""Networks in plain PyTorch: convolutional ones, and PyTorch's own attention blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .case import Case, batch_first
from .inputs import MakeInputs, normal, padding_mask, seeded, tensors


class Residual(nn.Module):
    """`inner(x) + shortcut(x)`, then ReLU if asked."""

    def __init__(self, inner: nn.Module, shortcut: nn.Module | None = None, *, relu: bool = True) -> None:
        super().__init__()
        self.inner = inner
        self.shortcut = shortcut or nn.Identity()
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x) + self.shortcut(x)
        return torch.relu(y) if self.relu else y


def conv_norm(channels_in: int, channels_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without a bias, then batch norm: what fuse_conv_batch_norm looks for."""
    convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))


def resnet() -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int) -> nn.Module:
        inner = nn.Sequential(
            conv_norm(channels_in, channels_out, 3, stride),
            nn.ReLU(inplace=True),
            conv_norm(channels_out, channels_out),
        )
        return Residual(inner, None if stride == 1 else conv_norm(channels_in, channels_out, 1, stride))

    stem = [conv_norm(3, 8, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    return nn.Sequential(
        *stem, block(8, 8, 1), block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate computed from their means (arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(gate)


def mobilenet() -> nn.Module:
    def block(channels_in: int, channels_out: int, stride: int) -> nn.Module:
        wide = 4 * channels_in
        inner = nn.Sequential(
            conv_norm(channels_in, wide, 1), nn.Hardswish(), conv_norm(wide, wide, 3, stride, groups=wide), nn.ReLU6(),
            SqueezeExcite(wide), conv_norm(wide, channels_out, 1),
        )  # fmt: skip
        return Residual(inner, relu=False) if stride == 1 and channels_in == channels_out else inner

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10)]
    return nn.Sequential(conv_norm(3, 8, 3, 2), nn.SiLU(), block(8, 8, 1), block(8, 16, 2), block(16, 16, 1), *head)


class UNet(nn.Module):
    """Down, up, and the skipped pictures concatenated (arXiv 1505.04597), with both ways of growing a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_norm(3, 8), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2), conv_norm(8, 16), nn.LeakyReLU(0.1))
        self.third = nn.Sequential(nn.AvgPool2d(2), conv_norm(16, 32), nn.ELU())
        self.grow = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join = nn.Sequential(conv_norm(32, 16), nn.ReLU())
        self.last = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(first)
        third = self.grow(self.third(second))
        joined = self.join(torch.cat([third, second], dim=1))
        grown = nn.functional.interpolate(joined, scale_factor=2.0, mode="bilinear", align_corners=False)
        output: torch.Tensor = self.last(torch.cat([grown, first], dim=1))
        return output


class Generator(nn.Module):
    """Noise to pictures by transposed convolutions with stride, padding, output padding and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(16, 32 * 4 * 4)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.InstanceNorm2d(8, affine=True), nn.Tanh(), nn.ConvTranspose2d(8, 3, 3, padding=2, dilation=2),
        )  # fmt: skip

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layers(self.start(noise).unflatten(1, (32, 4, 4))))


class Temporal(nn.Module):
    """Gated dilated causal convolutions over time, as WaveNet's (arXiv 1609.03499), with weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, 16, 1)
        self.gated = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 32, 2, dilation=2**i)) for i in range(3)
        )
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Conv1d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for i, layer in enumerate(self.gated):
            x = x + nn.functional.glu(layer(nn.functional.pad(x, (2**i, 0))), dim=1)
        output: torch.Tensor = self.out(self.norm(x))
        return output.transpose(1, 2)


def group_norm() -> nn.Module:
    def block(channels: int) -> nn.Module:
        half = [
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
        ]
        other = [nn.GroupNorm(1, channels), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=2, dilation=2)]
        return Residual(nn.Sequential(*half, *other), relu=False)

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, padding=1), block(16), nn.PixelShuffle(2), nn.Conv2d(4, 16, 3), block(16)
    )


class ShuffleDense(nn.Module):
    """Channel shuffle (arXiv 1707.01083) in branches that are split and concatenated again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, 3, 2), nn.PReLU(16))
        self.branch = nn.Sequential(
            conv_norm(8, 8, 1), nn.ReLU(), conv_norm(8, 8, 3, groups=8), conv_norm(8, 8, 1), nn.ReLU()
        )
        self.dense = nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept, changed = self.stem(x).chunk(2, dim=1)
        joined = torch.cat([kept, self.branch(changed)], dim=1)
        batch, channels, height, width = joined.shape
        shuffled = (
            joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        )
        features = torch.cat([shuffled, self.dense(shuffled)], dim=1)
        return self.head(features.amax((2, 3))), features


def conv3d() -> nn.Module:
    layers = [
        nn.Conv3d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm3d(8),
        nn.Softplus(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 8, (1, 3, 3)),
    ]
    return nn.Sequential(*layers, nn.Mish(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))


class MaskedEncoder(nn.Module):
    """PyTorch's own transformer encoder, whose fast path hides the attention from a capture that leaves it on."""

    def __init__(self, *, norm_first: bool, activation: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, norm_first=norm_first, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self.encoder(x, src_key_padding_mask=None if mask is None else mask == 0)
        return output


def masked_sequence(batch: int) -> dict[str, torch.Tensor]:
    generator = seeded(batch)
    return {"x": torch.randn(batch, 12, 32, generator=generator), "mask": padding_mask(batch, 12, generator)}


def cases() -> dict[str, Case]:
    """Name -> Case; nothing is built yet."""

    def case(kind: str, make_model: Callable[[], nn.Module], make_inputs: MakeInputs) -> Case:
        return Case(kind, make_model, make_inputs, batch_first(make_inputs))

    picture = tensors(input=normal(3, 32, 32))
    x = tensors(x=normal(3, 32, 32))
    return {
        "plain-resnet": case("convolution", resnet, picture),
        "plain-mobilenet": case("convolution", mobilenet, picture),
        "plain-unet": case("convolution", UNet, x),
        "plain-generator": case("convolution", Generator, tensors(noise=normal(16))),
        "plain-temporal": case("convolution", Temporal, tensors(x=normal(4, 20))),
        "plain-group-norm": case("convolution", group_norm, picture),
        "plain-shuffle": case("convolution", ShuffleDense, x),
        "plain-conv3d": case("convolution", conv3d, tensors(input=normal(2, 4, 12, 12))),
        "plain-encoder": case(
            "text", lambda: MaskedEncoder(norm_first=False, activation="relu"), tensors(x=normal(12, 32))
        ),
        "plain-encoder-mask": case("text", lambda: MaskedEncoder(norm_first=True, activation="gelu"), masked_sequence),
    }
