"""Small transformers for the tests of quantisation, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

F = nn.functional
WIDTH, HEADS = 32, 4


class Attention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.causal = causal

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], HEADS, WIDTH // HEADS)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class PreNorm(nn.Module):
    """A ViT's layer."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(causal), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PostNorm(nn.Module):
    """A BERT's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Vit(nn.Module):
    def __init__(self, causal: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreNorm(causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class Bert(nn.Module):
    """Gets the lengths of its rows, and masks what is behind them."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, WIDTH), nn.LayerNorm(WIDTH)
        self.layers, self.pooler = nn.ModuleList(PostNorm() for _ in range(layers)), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = mask[:, None, None, :].bool()
        x = self.norm(self.words(ids))
        for layer in self.layers:
            x = layer(x, seen)
        return x, torch.tanh(self.pooler(x[:, 0]))


def vit(**options: Any) -> tuple[Vit, list[torch.Tensor]]:
    """A model in eval mode and four batches for it."""
    torch.manual_seed(0)
    return Vit(**options).eval(), [torch.randn(2, 9, WIDTH) for _ in range(4)]


def bert(**options: Any) -> tuple[Bert, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        mask = (torch.arange(9) < torch.randint(4, 10, (2, 1))).long()
        return torch.randint(0, 50, (2, 9)), mask

    return Bert(**options).eval(), [batch() for _ in range(4)]
