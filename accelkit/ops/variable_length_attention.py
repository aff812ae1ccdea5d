"""attention within each of several sequences that lie one after another, without padding between them

rows:     a0 a1 a2 | b0 | c0 c1 | (rows that hold nothing)
offsets:  0          3    4       6
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.ops import attention
from accelkit.ops.operator import Operator, define

SCHEMA = (
    "variable_length_attention(Tensor query, Tensor key, Tensor value, Tensor offsets, SymInt longest, "
    "bool causal=False, float? scale=None) -> Tensor"
)


def meaning(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product self-attention over packed sequences (FasterTransformer's "effective transformer").

    Args:
        query: [rows, heads, width]. key: [rows, key heads, width]. value: [rows, key heads, value width].
        offsets: int32 [sequences + 1], where each sequence begins, and where the last one ends.
        longest: a bound on the sequences' lengths; computes nothing, sizes the kernel's grid.
        causal: a row attends to itself and to earlier rows of its sequence.
        scale: of the scores; None: 1 / sqrt(width).

    Returns:
        [rows, heads, value width]; rows from offsets[-1] on hold anything (zeros here).
    """
    result = query.new_zeros((*query.shape[:2], value.shape[2]))
    bounds = offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            part = (t[start:end].unsqueeze(0) for t in (query, key, value))
            result[start:end] = attention.meaning(*part, causal=causal, scale=scale)[0]
    return result


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
) -> str | None:
    return "no kernel is here yet"


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    raise NotImplementedError


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
