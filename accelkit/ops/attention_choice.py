"""What computes an attention of kind "auto" on a GPU: measured for its shape where it was tuned, else by rule.

    (dtype, sizes, mask, causal) -> one of accelkit.ops.attention.KINDS but "auto"

The rules come from measurements on one H200 (CUDA-graph replays, fp16, heads 64 wide): without a mask the Triton kernel leads
cuDNN from 196 keys on, cuDNN leads at 128, both lead flash and the efficient kernel. With a mask, PyTorch's kernels want it
written out for every head and query; the Triton kernel reads it as it broadcasts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.ops.attention_kinds import refusal_of

ShapeKey = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int, str, bool]

TUNED: dict[ShapeKey, str] = {}
"""Measured choices by shape_key; the tuner fills it, an entry that cannot run is passed over."""


def chosen_kind(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> str:
    """The kind to run; "math" where no fused kernel takes the operands (PyTorch then picks for itself)."""
    tuned = TUNED.get(shape_key(query, key, value, mask, causal)) if TUNED else None
    for kind in (tuned, *_by_rule(query, key, mask)):
        if kind is not None and refusal_of(kind, query, key, value, mask, causal) is None:
            return kind
    return "math"


def shape_key(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> ShapeKey:
    """What a measured choice holds for."""
    return query.dtype, tuple(query.shape), tuple(key.shape[1:3]), value.shape[3], mask_form(mask), causal


def mask_form(mask: Tensor | None) -> str:
    """ "none", or "boolean" or "additive" with "by key" or "by query and key": what decides a mask's cost."""
    if mask is None:
        return "none"
    kind = "boolean" if mask.dtype is torch.bool else "additive"
    by_key = mask.dim() < 2 or (isinstance(mask.shape[-2], int) and mask.shape[-2] == 1)
    return f"{kind} by {'key' if by_key else 'query and key'}"


def _by_rule(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[str, ...]:
    if query.dtype is torch.float32:
        return ("efficient", "triton")
    if mask is not None:
        return ("triton", "efficient")
    return ("triton", "cudnn", "flash", "efficient") if key.shape[1] > 128 else ("cudnn", "triton", "flash", "efficient")
