"""Attention as users write it, two layers of width 64 with 4 heads; what the attention passes' tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from accelkit.pass_api import GraphPass
from accelkit_passes.canonicalise import Canonicalise
from accelkit_passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from accelkit_passes.fold_constants import FoldConstants
from accelkit_passes.merge_qkv import MergeQkv
from accelkit_passes.recognise_attention import ATTENTION, RecogniseAttention
from accelkit_passes.remove_dropout import RemoveDropout
from accelkit_passes.remove_no_ops import RemoveNoOps
from accelkit_passes.reorder_rows import ReorderRows

WIDTH, HEADS, LENGTH = 64, 4, 10
HEAD = WIDTH // HEADS

# As in the default pipeline: what stands before the attention passes, and they themselves.
BEFORE: tuple[GraphPass, ...] = (
    Canonicalise(), RemoveDropout(), RemoveNoOps(), FoldConstants(), EliminateCommonSubexpressions(),
)  # fmt: skip
PASSES: tuple[GraphPass, ...] = (
    *BEFORE, RecogniseAttention(), ReorderRows(), MergeQkv(), EliminateCommonSubexpressions(),
)  # fmt: skip


class SelfAttention(nn.Module):
    """q, k, v by linear layers of [batch, length, width]; `core` makes [batch, heads, length, head width] of them."""

    def __init__(self, core: Callable[..., Tensor], key_heads: int = HEADS) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, key_heads * HEAD), nn.Linear(WIDTH, key_heads * HEAD)
        self.core = core

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, HEAD).transpose(1, 2)

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        y = self.core(q, k, v, *masks)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Jeonsworld(nn.Module):
    """The attention of jeonsworld/ViT-pytorch, which FasterTransformer aligned its ViT with."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attn_dropout, self.proj_dropout, self.softmax = nn.Dropout(0.1), nn.Dropout(0.1), nn.Softmax(dim=-1)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        x = x.view(*x.size()[:-1], HEADS, HEAD)
        return x.permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.transpose_for_scores(one(x)) for one in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HEAD)
        weights = self.attn_dropout(self.softmax(scores))
        context = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return self.proj_dropout(self.out(context.view(*context.size()[:-2], WIDTH)))


class Timm(nn.Module):
    """timm's: one linear layer for all three, unbound; by scaled_dot_product_attention or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), fused

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * HEAD**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class MultiheadAttention(nn.Module):
    """nn.MultiheadAttention, called as users do."""

    def __init__(self, need_weights: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=self.need_weights)[0]


class Layers(nn.Module):
    """Two of a layer one after the other, normalised and added as encoders do."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x), *masks)
        return x


def torch_encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """transformers' repetition of key and value heads."""
    batch, heads, length, width = x.shape
    x = x[:, :, None].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


def attentions(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is ATTENTION]


def moves_data(graph: fx.GraphModule) -> list[str]:
    """The permutations and copies that are left."""
    names = ("permute", "contiguous", "clone", "expand")
    return [node.name for node in graph.graph.nodes if any(name in str(node.target) for name in names)]


def targets(graph: fx.GraphModule, names: Sequence[str]) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if any(name in str(node.target) for name in names)]
