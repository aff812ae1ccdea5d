"""Modules, masks and layers that the tests of set_precision share."""

from __future__ import annotations

import torch
from torch import nn


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


def x() -> torch.Tensor:
    return torch.randn(2, 8)


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
