"""softmax(scale Q K^T + mask) V, all operands in [batch, length, heads, width]

The layout in which linear layers give Q, K and V and take the result: no transposed copies, and the slices of one packed
[batch, length, 3, heads, width] product are taken as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import Operator, define

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float? scale=None, "
    "str kind='auto') -> Tensor"
)

KINDS = ("auto", "triton", "cudnn", "flash", "efficient", "xformers", "math")
"""What computes it on a GPU; "auto": measured per shape where tuned, else by rules. On a CPU all mean the same."""


def meaning(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, section 3.2.1).

    Args:
        query: [batch, length, heads, width].
        key: [batch, keys, key heads, width]; heads is a multiple of key heads (grouped queries, arXiv 2305.13245).
        value: [batch, keys, key heads, value width].
        mask: broadcasts to [batch, heads, length, keys]; boolean (True: attend) or added to the scores.
        causal: query i attends to keys 0 to i.
        scale: of the scores; None: 1 / sqrt(width).
        kind: one of KINDS.

    Returns:
        [batch, length, heads, value width], contiguous, in query's dtype.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind has to be one of {', '.join(KINDS)}, not {kind!r}")
    if mask is not None and causal:
        mask = _with_causal(mask, query.shape[1], key.shape[1])
        causal = False
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    return result.transpose(1, 2).contiguous()


def _with_causal(mask: Tensor, length: int, keys: int) -> Tensor:
    allowed = torch.ones(length, keys, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype is torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"kind has to be one of {', '.join(KINDS)}, not {kind!r}")
    return query.new_empty((*query.shape[:3], value.shape[3]))


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> str | None:
    return "no kernel is here yet"


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Tensor:
    raise NotImplementedError


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
