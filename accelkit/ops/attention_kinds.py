"""The kernels that can compute attention on a GPU: which operands each takes, and how it is called.

PyTorch's own are called as ATen operators on transposed views: no copies, and none of the process-wide switches that
`torch.nn.attention.sdpa_kernel` turns, which other threads would feel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from accelkit.ops.operator import without_triton

_HALF = (torch.float16, torch.bfloat16)


def refusal_of(kind: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Why this kernel cannot take these operands, or None; works on fake tensors, proves rather than guards."""
    if kind == "math":
        return None
    dtypes = {query.dtype, key.dtype, value.dtype}
    taken = _DTYPES[kind]
    if len(dtypes) > 1:
        return f"{kind} attention needs query, key and value of one dtype, not {_listed(dtypes)}"
    if query.dtype not in taken:
        return f"{kind} attention takes {_listed(taken)}, not {_listed(dtypes)}"
    sizes = (query.shape[2], key.shape[2], query.shape[3], value.shape[3])
    if not all(isinstance(size, int) for size in sizes):
        return f"{kind} attention needs numbers of heads and head widths that are known when the model is compiled"
    heads, key_heads, width, value_width = sizes
    if value_width != width:
        return f"{kind} attention needs values as wide as queries, not {value_width} beside {width}"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"{kind} attention needs an NVIDIA GPU of compute capability 8.0 or later"
    return _REFUSALS[kind](query, key, mask, causal, width, heads != key_heads)


def run(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    config: Any = None,
) -> Tensor:
    """The attention by this kernel, [batch, length, heads, width], for operands that `refusal_of` lets pass.

    `config` is the Triton kernel's; None: by rule.
    """
    if kind == "triton":
        from accelkit.kernels import attention

        return attention.attention(query, key, value, mask, causal, scale, config)
    if mask is not None and causal:
        mask = with_causal(mask, query.shape[1], key.shape[1])
        causal = False
    query, key, value = map(_aligned, (query, key, value))
    if kind == "xformers":
        return _xformers(query, key, value, mask, causal, scale)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return _ATEN[kind](query, key, value, mask, causal, scale).transpose(1, 2).contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor as PyTorch's and xFormers' kernels read it, 16 bytes at a time: they do not look whether they may (seen with
    PyTorch 2.11: an illegal access, which ends the process's use of the GPU)."""
    size = tensor.element_size()
    if tensor.stride(-1) == 1 and not any(n * size % 16 for n in (tensor.storage_offset(), *tensor.stride()[:-1])):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def with_causal(mask: Tensor, length: int, keys: int) -> Tensor:
    """The mask, with what the causal line forbids forbidden too."""
    allowed = torch.ones(length, keys, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype is torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))


def aligned_bias(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """The mask as an additive [batch, heads, length, keys] view in query's dtype, rows 16 numbers apart or broadcast.

    What PyTorch's efficient kernel and xFormers' ask for: exact sizes, a last stride of 1, multiples of 8 for the others.
    """
    bias = _as_bias(mask, query.dtype)
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    bias = F.pad(bias.expand(*bias.shape[:3], keys), (0, -keys % 16))[..., :keys]
    batch, heads, length = query.shape[0], query.shape[2], query.shape[1]
    return bias.expand(batch, heads, length, keys)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


@functools.cache
def without_xformers() -> str | None:
    """Why xFormers cannot run here, or None."""
    try:
        from xformers.ops import fmha
    except (ImportError, OSError) as error:
        return f'xFormers is not installed or does not load ({error}); pip install "accelkit[gpu]"'
    if not any(operator.is_available() for operator in (fmha.flash.FwOp, fmha.cutlass.FwOp)):
        return "xFormers is installed but its compiled library does not load; `python -m xformers.info` says why"
    return None


def _listed(dtypes: Any) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))


def _refuse_triton(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, width: int, grouped: bool
) -> str | None:
    if reason := without_triton():
        return reason
    return f"the Triton kernel takes heads up to 256 wide, not {width}" if width > 256 else None


def _refuse_cudnn(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, width: int, grouped: bool
) -> str | None:
    if mask is not None:
        return "cudnn attention is used without a mask only: a broadcast one would be written out for every head"
    if grouped:
        return "cudnn attention is used with as many key heads as query heads only"
    if width % 8 or width > 128:
        return f"cudnn attention takes head widths that are multiples of 8, up to 128, not {width}"
    if _same(key.shape[1], 1):
        return "cudnn attention takes two keys or more"
    return _refuse_oblong("cudnn", query, key, causal)


def _refuse_flash(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, width: int, grouped: bool
) -> str | None:
    if mask is not None:
        return "flash attention takes no mask"
    if width % 8 or width > 256:
        return f"flash attention takes head widths that are multiples of 8, up to 256, not {width}"
    return _refuse_oblong("flash", query, key, causal)


def _refuse_efficient(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, width: int, grouped: bool
) -> str | None:
    if grouped:
        return "efficient attention needs as many key heads as query heads"
    multiple = 16 // query.element_size()
    if width % multiple:
        return f"efficient attention takes head widths that are multiples of {multiple} in this dtype, not {width}"
    return None


def _refuse_xformers(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, width: int, grouped: bool
) -> str | None:
    if reason := without_xformers():
        return reason
    if width % 8:
        return f"xformers attention takes head widths that are multiples of 8, not {width}"
    if query.dtype is not torch.float32 and mask is None and width > 256:
        return f"xformers attention takes heads up to 256 wide without a mask, not {width}"
    return _refuse_oblong("xformers", query, key, causal)


def _refuse_oblong(kind: str, query: Tensor, key: Tensor, causal: bool) -> str | None:
    if causal and not _same(query.shape[1], key.shape[1]):
        return (
            f"{kind} attention draws the causal line from the last key where there are more or fewer keys than queries"
        )
    return None


def _cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operator(query, key, value, None, False, 0.0, causal, scale=scale)[0]  # type: ignore[no-any-return]


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    return operator(query, key, value, 0.0, causal, scale=scale)[0]  # type: ignore[no-any-return]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    bias = None if mask is None else aligned_bias(mask, query.transpose(1, 2), key.shape[2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(query, key, value, bias, False, 0.0, causal, scale=scale)[0]  # type: ignore[no-any-return]


def _math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    bias = None if mask is None else torch.atleast_2d(_as_bias(mask, query.dtype))  # type: ignore[no-untyped-call]
    operator = torch.ops.aten._scaled_dot_product_attention_math
    grouped = query.shape[1] != key.shape[1]
    return operator(query, key, value, bias, 0.0, causal, scale=scale, enable_gqa=grouped)[0]  # type: ignore[no-any-return]


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    from xformers import ops

    shape = query.shape
    bias: Any = ops.LowerTriangularMask() if causal else None
    if mask is not None:
        bias = aligned_bias(mask, query, key.shape[1])
    if query.shape[2] != key.shape[2]:
        groups, members = key.shape[2], query.shape[2] // key.shape[2]
        query = query.reshape(*shape[:2], groups, members, shape[3])
        key, value = (t.unsqueeze(3).expand(-1, -1, -1, members, -1) for t in (key, value))
        if mask is not None:
            bias = bias.reshape(shape[0], groups, members, shape[1], key.shape[1])
    result: Tensor = ops.memory_efficient_attention(query, key, value, attn_bias=bias, scale=scale)
    return result.reshape(shape).contiguous()


_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "triton": (*_HALF, torch.float32),
    "cudnn": _HALF,
    "flash": _HALF,
    "efficient": (*_HALF, torch.float32),
    "xformers": (*_HALF, torch.float32),
}
_REFUSALS: dict[str, Callable[[Tensor, Tensor, Tensor | None, bool, int, bool], str | None]] = {
    "triton": _refuse_triton,
    "cudnn": _refuse_cudnn,
    "flash": _refuse_flash,
    "efficient": _refuse_efficient,
    "xformers": _refuse_xformers,
}
_ATEN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "efficient": _efficient,
    "math": _math,
}
