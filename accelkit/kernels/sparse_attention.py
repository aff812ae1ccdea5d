"""FlexAttention over a constant boolean mask, compiled once per mask and kind of operands.

    allowed [length, keys]  ->  which blocks of 128 x 128 pairs are empty, partly or wholly allowed  ->  compiled kernel

Blocks and kernel are made in the first call with a mask (tens of seconds: torch.compile) and kept as long as the mask's
tensor lives, so that later calls, recordings in CUDA graphs among them, allocate and compile nothing of the kind. Any batch
size runs in the same kernel.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

_NARROWEST = 16  # FlexAttention's matrix products take no narrower heads
_Key = tuple[torch.dtype, int, int, int, int, float]

_LOCK = threading.Lock()
_KERNELS: Any = WeakTensorKeyDictionary()
"""mask -> operands' kind -> (query, key, value, as [batch, heads, length, width]) -> result"""


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """[batch, length, heads, value width]; see accelkit.ops.sparse_attention."""
    width, value_width = query.shape[3], value.shape[3]
    scale = width**-0.5 if scale is None else float(scale)
    kind = (query.dtype, query.shape[2], key.shape[2], width, value_width, scale)
    with _as_if_called_first():
        operands = [_widened(t.detach()).transpose(1, 2) for t in (query, key, value)]
        for operand in operands:
            torch._dynamo.maybe_mark_dynamic(operand, 0)  # the batch
        result: Tensor = _kernel_for(allowed, kind)(*operands)
        return result[..., :value_width].transpose(1, 2).contiguous()


def _widened(operand: Tensor) -> Tensor:
    """Zeros change no score, and give zeros that are cut off."""
    missing = _NARROWEST - operand.shape[3]
    return F.pad(operand, (0, missing)) if missing > 0 else operand


def _kernel_for(allowed: Tensor, kind: _Key) -> Callable[..., Tensor]:
    with _LOCK:
        kernels = _KERNELS.setdefault(allowed, {})
        if kind not in kernels:
            kernels[kind] = _make(allowed, kind)
        return kernels[kind]  # type: ignore[no-any-return]


def _make(allowed: Tensor, kind: _Key) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    dtype, heads, key_heads, width, _, scale = kind
    blocks = block_mask(allowed)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return flex_attention(
            query, key, value, block_mask=blocks, scale=scale, enable_gqa=heads != key_heads,
            # not the decoding kernel, which PyTorch takes for a batch of 1 and fewer than 128 queries: where heads are grouped
            # it may find none of its own configurations to fit (PyTorch 185349, mended after 2.11)
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
        )  # fmt: skip

    # PyTorch counts compilations, and remembers which sizes change, by a function's code: each of these gets its own.
    name = f"sparse_attention_{'x'.join(map(str, (*allowed.shape, heads, key_heads, width)))}_{str(dtype)[6:]}_{id(blocks)}"
    attend.__code__ = attend.__code__.replace(co_name=name)
    return torch.compile(attend, fullgraph=True)


def block_mask(allowed: Tensor) -> Any:
    """FlexAttention's blocks of a mask, the same for every batch and head."""
    from torch.nn.attention.flex_attention import create_block_mask

    values = allowed.detach()  # a tensor of its own: the cache must not keep its key alive

    def pair(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return values[query, key]

    length, keys = allowed.shape
    return create_block_mask(pair, None, None, length, keys, device=str(allowed.device))


@contextmanager
def _as_if_called_first() -> Iterator[None]:
    """What FlexAttention and torch.compile are made for: not inside of PyTorch's dispatcher, where the operator runs.

    Under a TorchDispatchMode or inference mode the dispatcher has turned off the keys that they need.
    """
    with torch.inference_mode(False), torch.no_grad(), torch._C._ForceDispatchKeyGuard(*_dispatch_keys()):
        yield


@functools.cache
def _dispatch_keys() -> tuple[Any, Any]:
    """Included and excluded keys where nothing has been called yet: in a thread of its own."""
    found: list[tuple[Any, Any]] = []
    thread = threading.Thread(
        target=lambda: found.append(
            (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())
        )
    )
    thread.start()
    thread.join()
    return found[0]
