"""attention within each of several sequences that lie one after another, without padding between them

rows:     a0 a1 a2 | b0 | c0 c1 | (rows that hold nothing)
offsets:  0          3    4       6
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from accelkit.ops import attention
from accelkit.ops.attention_kinds import refusal_of
from accelkit.ops.operator import Operator, define, differ

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

    Raises:
        ValueError: sizes that do not go together, offsets that are no int32 vector.
    """
    _check(query, key, value, offsets)
    result = query.new_zeros((*query.shape[:2], value.shape[2]))
    bounds = offsets.tolist()
    for start, end in itertools.pairwise(bounds):
        if end > start:
            q, k, v = (t[start:end].unsqueeze(0) for t in (query, key, value))
            result[start:end] = attention.meaning(q, k, v, causal=causal, scale=scale)[0]
    return result


def _check(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor) -> None:
    """Raise ValueError for what no kernel may be given; symbolic sizes are taken on trust."""
    if not query.dim() == key.dim() == value.dim() == 3:
        raise ValueError(
            "variable-length attention takes [rows, heads, width] operands, not "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    attention.check(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0))
    if differ(query.shape[0], key.shape[0]):
        raise ValueError(f"as many keys as queries are needed, not {key.shape[0]} beside {query.shape[0]} rows")
    if offsets.dim() != 1 or offsets.dtype is not torch.int32:
        raise ValueError(f"offsets have to be an int32 vector, not {offsets.dtype} {list(offsets.shape)}")


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    _check(query, key, value, offsets)
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
    _check(query, key, value, offsets)
    return refusal_of("triton", query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), None, causal)


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    from accelkit.kernels import attention as kernels

    _check(query, key, value, offsets)
    return kernels.variable_length_attention(query, key, value, offsets, longest, causal, scale)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
