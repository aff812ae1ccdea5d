"""softmax(scale Q K^T where allowed) V, [batch, length, heads, width]: attention between chosen pairs of tokens only

Like accelkit.attention with a boolean mask, but the mask is a constant of the model: a GPU skips its empty blocks of
128 x 128 pairs, through PyTorch's FlexAttention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops import attention
from accelkit.ops.operator import Operator, define, without_triton

SCHEMA = "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor allowed, float? scale=None) -> Tensor"


def meaning(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, section 3.2.1) over the allowed pairs.

    Args:
        query: [batch, length, heads, width].
        key: [batch, keys, key heads, width]; heads is a multiple of key heads.
        value: [batch, keys, key heads, value width].
        allowed: boolean [length, keys], True where the query attends to the key; not written to as long as it is used.
            A query that attends to nothing gets zeros.
        scale: of the scores; None: 1 / sqrt(width).

    Returns:
        [batch, length, heads, value width], contiguous, in query's dtype.

    Raises:
        ValueError: sizes that do not go together, or a mask that is not boolean [length, keys].
    """
    check(query, key, value, allowed)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    result = F.scaled_dot_product_attention(query, key, value, allowed, scale=scale, enable_gqa=grouped).transpose(1, 2)
    # PyTorch has zeros there but for cuDNN's kernel, which is its first choice on Hopper: up to 2.11 a pair that is not
    # allowed has a score lower by 65504 there, which in a row of nothing else is as if all were allowed.
    return result.masked_fill(~allowed.any(1)[:, None, None], 0.0).contiguous()


def check(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> None:
    """Raise ValueError for what no kernel may be given; symbolic sizes are taken on trust."""
    if allowed.dim() != 2 or allowed.dtype is not torch.bool:
        raise ValueError(f"allowed has to be boolean [length, keys], not {allowed.dtype}{list(allowed.shape)}")
    attention.check(query, key, value, allowed)


def fake(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    check(query, key, value, allowed)
    return query.new_empty((*query.shape[:3], value.shape[3]))


def refusal(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> str | None:
    if reason := without_triton():
        return reason
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return "sparse attention needs query, key and value of one dtype"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention takes float16, bfloat16 and float32, not {query.dtype}"
    sizes = (*allowed.shape, query.shape[2], key.shape[2], query.shape[3], value.shape[3])
    if not all(isinstance(size, int) for size in sizes):
        return "FlexAttention is used with lengths, heads and head widths that are known when the model is compiled"
    if query.shape[3] > 256 or value.shape[3] > 256:
        return f"FlexAttention is used with heads up to 256 wide, not {max(query.shape[3], value.shape[3])}"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "FlexAttention needs an NVIDIA GPU of compute capability 8.0 or later"
    return None


def kernel(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    from accelkit.kernels import sparse_attention

    check(query, key, value, allowed)
    return sparse_attention.sparse_attention(query, key, value, allowed, scale)


OPERATOR = define(Operator(SCHEMA, meaning, fake, refusal, kernel))
