"""The kinds of problem that can be tuned, one file each: the operands to measure with, and the plain meaning.

    linear        activation(x W^T + bias) + residual: cuBLASLt or one of our kernels; the same with K split
    attention     which kernel, and the Triton kernel's configuration; attention of packed sequences
    norms         layer and RMS norms of sums, of looked-up rows

`task_of(operator name, arguments)` gives the problem of a fused operator's call from its operands' sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelkit.tuning.measuring import Task
from accelkit.tuning.problems import attention, linear, norms

_BY_OPERATOR: dict[str, Callable[..., Task | None]] = {
    "linear_activation": linear.of_linear,
    "patch_embedding": linear.of_patches,
    "linear_residual_layer_norm": linear.of_split,
    "attention": attention.of_attention,
    "variable_length_attention": attention.of_variable_length,
    "residual_layer_norm": norms.of_layer_norm,
    "residual_rms_norm": norms.of_rms_norm,
    "embedding_layer_norm": norms.of_embedding,
}


def task_of(name: str, *args: Any, **kwargs: Any) -> Task | None:
    """The problem of a fused operator's call; None where there is nothing to choose, or a size is not known."""
    make = _BY_OPERATOR.get(name)
    return None if make is None else make(*args, **kwargs)
