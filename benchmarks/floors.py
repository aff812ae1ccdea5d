"""floor = max(operations / rate of one large matrix product, bytes / rate of one large copy), in ms

    ceilings = measure_ceilings("cuda")                  # in the same run as the times that are compared with it
    floor = floor_of(work_of(model, inputs, "fp16"), ceilings, "fp16")
    floor.ms, floor.bound                                # 4.8, "operations"

What counts, and what a floor means, is written in `accelkit.floor`, which counts captured programs; here models are counted by
running them, so that rows of several lengths are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from by_hand import flat_call
from torch import nn

from accelkit.floor import NUMBER_BYTES, Work, counted, floor_of
from accelkit.models import Inputs
from accelkit.rates import Rates as Ceilings
from accelkit.rates import measure_rates

SIZE = 8192
"""Rows, columns and inner size of the matrix product."""
COPY_BYTES = 2**31
"""What the copy reads; it writes as much."""


def measure_ceilings(
    device: str, precisions: Sequence[str] = ("fp32", "tf32", "fp16"), *, tiny: bool = False, seconds: float = 2.0
) -> Ceilings:
    """One square matrix product in each precision and one copy, interleaved; medians."""
    size, copy_bytes = (64, 2**16) if tiny else (SIZE, COPY_BYTES)
    return measure_rates(device, precisions, size, copy_bytes, seconds=seconds, max_rounds=2 if tiny else 50, warmup=2)


def work_of(
    model: nn.Module,
    inputs: Inputs,
    precision: str,
    lengths: Sequence[int] | None = None,
    known: dict[int | None, int] | None = None,
) -> Work:
    """Counted by running the model once on one row of `inputs` (or, where `lengths` is given, on one of each length).

    Args:
        inputs: first dimension the batch.
        lengths: the rows' lengths without their padding: only these tokens count, as without padding they would.
        known: operations by length that are known already; added to.
    """
    tensors = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    batch = tensors[0].shape[0]
    rows, tokens = lengths or [None] * batch, sum(lengths) if lengths else tensors[0].shape[:2].numel()
    known = {} if known is None else known
    for length in set(rows) - set(known):
        known[length] = counted(flat_call(model, _row(inputs, length)))
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(weight) for weight in embeddings}
    numbers = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    numbers += sum(min(tokens, weight.shape[0]) * weight.shape[1] for weight in embeddings)  # rows that are looked up
    numbers += sum(t.numel() for t in tensors if t.is_floating_point())
    indices = sum(t.numel() * t.element_size() for t in tensors if not t.is_floating_point())
    return Work(float(sum(known[row] for row in rows)), float(numbers * NUMBER_BYTES[precision] + indices))


def _row(inputs: Inputs, length: int | None) -> Inputs:
    """The first row; where a length is given, that many tokens of it, none of them padding."""
    if isinstance(inputs, tuple):
        return tuple(t[:1] for t in inputs)
    row = {name: t[:1] if length is None else t[:1, :length] for name, t in inputs.items()}
    return {n: torch.ones_like(t) if length is not None and n == "attention_mask" else t for n, t in row.items()}


__all__ = ["Ceilings", "Work", "floor_of", "measure_ceilings", "work_of"]
