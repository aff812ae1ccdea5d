"""Float32 matrix products and convolutions on tensor cores, for as long as a block runs.

    with tensor_core_products(): x @ w        # float32 in and out, products of 10-bit mantissas, float32 sums

PyTorch has no switch for one operator or one thread: these are settings of the process, read when an operator is enqueued.
Two blocks never overlap, but what another thread enqueues meanwhile runs in tf32 as well. A CUDA graph that is captured
inside keeps it and needs no setting when it is replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.RLock()


@contextmanager
def tensor_core_products() -> Iterator[None]:
    """Turn tf32 on for matrix products (cuBLAS) and convolutions (cuDNN); the former settings come back afterwards.

    Has no effect on processors and on GPUs before Ampere.
    """
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    with _LOCK:
        # PyTorch keeps every setting twice, for its old and its new names, and fails where the two disagree
        new = [(owner, owner.fp32_precision) for owner in (matmul, cudnn.conv, cudnn.rnn)]
        old = [(matmul, _allowed(matmul, new[0][1])), (cudnn, _allowed(cudnn, new[1][1]))]
        try:
            for owner, _ in old:
                owner.allow_tf32 = True
            yield
        finally:
            for owner, value in old:
                owner.allow_tf32 = value
            for owner, value in new:
                owner.fp32_precision = value


def _allowed(owner: Any, new: str) -> bool:
    try:
        return bool(owner.allow_tf32)
    except RuntimeError:  # the user has set the new name only, so the old one says the opposite
        return new != "tf32"
