"""Precisions: what the arithmetic inside a compiled model runs in.

Inputs and outputs of a compiled model keep the model's own dtypes, whatever runs inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from accelkit.errors import InputError, unknown_name


@dataclass(frozen=True, repr=False)
class Precision:
    """One precision: its name, the dtype that floating-point tensors have inside, and what it means in words.

    Attributes:
        name: what `optimize(precision=...)` takes.
        dtype: dtype of floating-point values inside the graph.
        description: one sentence for tables and reports.
    """

    name: str
    dtype: torch.dtype
    description: str
    known: ClassVar[dict[str, Precision]] = {}

    @property
    def epsilon(self) -> float:
        """Spacing of this precision's numbers at 1.0 (tf32 keeps float32's range with 10 bits of mantissa)."""
        return 2.0**-10 if self.name == "tf32" else float(torch.finfo(self.dtype).eps)

    @property
    def overflows(self) -> bool:
        """Whether what float32 holds may lie beyond its range: float16's ends at 65504, bfloat16's where float32's does."""
        return float(torch.finfo(self.dtype).max) < 1e-3 * float(torch.finfo(torch.float32).max)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name.upper() if self.name in Precision.known else f"Precision({self.name!r}, {self.dtype})"


def _define(name: str, dtype: torch.dtype, description: str) -> Precision:
    Precision.known[name] = precision = Precision(name, dtype, description)
    return precision


FP32 = _define("fp32", torch.float32, "float32 throughout: the model as it is")
TF32 = _define("tf32", torch.float32, "float32 with tensor cores' 10-bit products (NVIDIA GPUs since Ampere)")
BF16 = _define("bf16", torch.bfloat16, "bfloat16: float32's range, 8 bits of precision")
FP16 = _define("fp16", torch.float16, "float16: 11 bits of precision, largest value 65504")


def as_precision(value: str | Precision) -> Precision:
    """The Precision for a name, or the value itself.

    Raises:
        InputError: no such precision; the message lists the known ones.
    """
    if isinstance(value, Precision):
        return value
    if not isinstance(value, str):
        raise InputError(f"precision must be a name or a Precision value, not {type(value).__name__}")
    if value not in Precision.known:
        raise unknown_name("precision", value, list(Precision.known))
    return Precision.known[value]
