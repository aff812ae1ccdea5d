"""Another attention put into a model by hand, as its user would: model -> copy with xFormers' or FlexAttention's kernel.

transformers' models take a registered attention function by name; nn.MultiheadAttention is exchanged for a module with
the same weights. Parameters are shared with the model, which keeps its own attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""(query, key, value, mask, scale), each [batch, length, heads, width] -> the same; mask boolean or None."""

_FLEX_WIDTH = 16
"""FlexAttention's kernels take heads of at least this width."""


def xformers_attention(model: nn.Module) -> nn.Module:
    """The model on xformers.ops.memory_efficient_attention.

    Raises:
        ImportError: xFormers is not installed, or its library does not load.
    """
    from xformers.ops import memory_efficient_attention

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        result: torch.Tensor = memory_efficient_attention(
            query, key, value, attn_bias=None if mask is None else _bias(mask, query, key), scale=scale
        )
        return result

    return exchanged(model, "accelkit-bench-xformers", kernel)


def sparse_attention(model: nn.Module, pattern: torch.Tensor) -> nn.Module:
    """The model on FlexAttention, block-sparse over `pattern`, boolean [tokens, tokens]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = next(model.parameters()).device
    pattern = pattern.to(device)
    tokens = len(pattern)
    blocks = create_block_mask(lambda b, h, q, k: pattern[q, k], None, None, tokens, tokens, device=device)
    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        width = query.shape[3]
        operands = [F.pad(t, (0, max(0, _FLEX_WIDTH - width))).transpose(1, 2) for t in (query, key, value)]
        result: torch.Tensor = run(*operands, block_mask=blocks, scale=scale)
        return result[..., :width].transpose(1, 2)

    return exchanged(model, "accelkit-bench-sparse", kernel)


def masked_attention(model: nn.Module, pattern: torch.Tensor) -> nn.Module:
    """The same on scaled_dot_product_attention with `pattern` as its mask: what sparse attention is checked against."""
    wanted = pattern.to(next(model.parameters()).device)

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        operands = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*operands, attn_mask=wanted, scale=scale).transpose(1, 2)

    return exchanged(model, "accelkit-bench-masked", kernel)


def exchanged(model: nn.Module, name: str, kernel: Kernel) -> nn.Module:
    """A copy of the model, weights shared, on this kernel.

    Raises:
        TypeError: neither a transformers model nor one with nn.MultiheadAttention in it.
    """
    twin = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    if hasattr(twin, "set_attn_implementation"):
        _register(name, kernel)
        twin.set_attn_implementation(name)
        return twin
    found = [path for path, module in twin.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if not found:
        raise TypeError(f"{type(model).__name__} has no attention that could be exchanged by hand")
    for path in found:
        parent, _, attribute = path.rpartition(".")
        attention = twin.get_submodule(path)
        assert isinstance(attention, nn.MultiheadAttention)
        setattr(twin.get_submodule(parent), attribute, _SelfAttention(attention, kernel))
    return twin


def _register(name: str, kernel: Kernel) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = (t.transpose(1, 2) for t in (query, key, value))  # they come as [batch, heads, length, width]
        return kernel(*rows, attention_mask, scale), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """xFormers wants a bias of exactly [batch, heads, queries, keys], its second-last stride a multiple of 8."""
    batch, length, heads, _ = query.shape
    keys = key.shape[1]
    room = torch.zeros(batch, heads, length, -(-keys // 8) * 8, dtype=query.dtype, device=query.device)[..., :keys]
    if mask.dtype is torch.bool:
        return room.masked_fill_(mask.logical_not(), float("-inf"))
    return room.add_(mask)


class _SelfAttention(nn.Module):
    """nn.MultiheadAttention's weights, called with one tensor three times."""

    def __init__(self, attention: nn.MultiheadAttention, kernel: Kernel) -> None:
        super().__init__()
        if attention.in_proj_weight is None or not attention.batch_first:
            raise TypeError("only batch-first nn.MultiheadAttention with packed weights is exchanged by hand")
        self.heads, self.kernel = attention.num_heads, kernel
        self.weight, self.bias, self.out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        batch, length, features = query.shape
        packed = F.linear(query, self.weight, self.bias).view(batch, length, 3, self.heads, features // self.heads)
        attended = self.kernel(*packed.unbind(2), None, (features // self.heads) ** -0.5)
        return self.out(attended.reshape(batch, length, features)), None
