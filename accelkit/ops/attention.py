"""softmax(scale Q K^T + mask) V, all operands in [batch, length, heads, width]

The layout in which linear layers give Q, K and V and take the result: no transposed copies, and the slices of one packed
[batch, length, 3, heads, width] product are taken as they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops import attention_kinds
from accelkit.ops.attention_choice import choice_of, chosen_kind
from accelkit.ops.attention_kinds import with_causal
from accelkit.ops.operator import Operator, define, differ

SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float? scale=None, "
    "str kind='auto') -> Tensor"
)

KINDS = ("auto", "triton", "cudnn", "flash", "efficient", "xformers", "math")
"""What computes it on a GPU; "auto": measured per shape where compiled or tuned for it, else by rules. On a CPU all are
the same."""


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
        ValueError: an unknown kind, or sizes that do not go together.
    """
    check(query, key, value, mask, kind)
    if mask is not None and causal:
        mask = with_causal(mask, query.shape[1], key.shape[1])
        causal = False
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    if mask is not None and mask.dim() < 2:
        mask = mask.reshape(1, -1)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    return result.transpose(1, 2).contiguous()


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, kind: str = "auto") -> None:
    """Raise ValueError for what no kernel may be given; symbolic sizes are taken on trust."""
    if kind not in KINDS:
        raise ValueError(f"kind has to be one of {', '.join(KINDS)}, not {kind!r}")
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"attention takes [batch, length, heads, width] operands, not {_sizes(query, key, value)}")
    batch, length, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    if differ(batch, key.shape[0]) or differ(width, key.shape[3]) or any(map(differ, key.shape[:3], value.shape[:3])):
        raise ValueError(
            "query, key and value have to agree in batch, query and key in width, key and value in length and heads; "
            f"they are {_sizes(query, key, value)}"
        )
    if isinstance(heads, int) and isinstance(key_heads, int) and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"the query's heads have to be a multiple of the key's: {_sizes(query, key, value)}")
    if mask is None:
        return
    wanted = (batch, heads, length, keys)
    if mask.dim() > 4 or any(differ(m, w) and m != 1 for m, w in zip(mask.shape[::-1], wanted[::-1], strict=False)):
        raise ValueError(
            f"a mask {list(mask.shape)} does not broadcast to [batch, heads, length, keys], {list(wanted)}"
        )


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Tensor:
    check(query, key, value, mask, kind)
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
    check(query, key, value, mask, kind)
    if kind != "auto":
        return attention_kinds.refusal_of(kind, query, key, value, mask, causal)
    if chosen_kind(query, key, value, mask, causal) != "math":
        return None
    return attention_kinds.refusal_of("triton", query, key, value, mask, causal)


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    kind: str = "auto",
) -> Tensor:
    check(query, key, value, mask, kind)
    choice = choice_of(kind, query, key, value, mask, causal)
    return attention_kinds.run(choice.kind, query, key, value, mask, causal, scale, choice.config)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
