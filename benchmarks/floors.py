"""floor = max(operations / rate of one large matrix product, bytes / rate of one large copy), in ms

    ceilings = measure_ceilings("cuda")                  # in the same run as the times that are compared with it
    floor = floor_of(work_of(model, inputs, "fp16"), ceilings, "fp16")
    floor.ms, floor.bound                                # 4.8, "operations"

Operations are those of the matrix products and convolutions alone, two for a multiplication with its addition; bytes are
each weight and each input once, as if all in between stayed on the chip. No program is faster, except where
weights stay in the caches from one call to the next, and none that writes its activations to memory gets there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from by_hand import flat_call
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from accelkit.measure import interleaved
from accelkit.models import Inputs

SIZE = 8192
"""Rows, columns and inner size of the matrix product."""
COPY_BYTES = 2**31
"""What the copy reads; it writes as much."""
NUMBER_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Ceilings:
    """What the machine gives at most.

    Attributes:
        tflops: operations by precision, in 1e12 a second, in products of square matrices of `size`.
        copy_tb_s: bytes read and written, in 1e12 a second.
    """

    tflops: dict[str, float]
    copy_tb_s: float
    size: int = SIZE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """One forward: operations of its products, and bytes that it cannot avoid to read."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Floor:
    """The least time, in ms, and what sets it: "operations" or "bytes"."""

    ms: float
    bound: str


def measure_ceilings(
    device: str, precisions: Sequence[str] = ("fp32", "tf32", "fp16"), *, tiny: bool = False, seconds: float = 2.0
) -> Ceilings:
    """One square matrix product in each precision and one copy, interleaved; medians."""
    from gpu_peers import DTYPES, with_tf32

    size, copy_bytes = (64, 2**16) if tiny else (SIZE, COPY_BYTES)
    candidates: dict[str, Any] = {}
    for precision in precisions:
        a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
        candidates[precision] = with_tf32(precision, lambda a=a, b=b: a @ b)
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    candidates["copy"] = lambda: target.copy_(source)
    timings = interleaved(candidates, seconds=seconds, max_rounds=2 if tiny else 50, warmup=2, device=device)
    rates = {p: 2 * size**3 / timings[p].median_ms / 1e9 for p in precisions}
    return Ceilings(rates, 2 * copy_bytes / timings["copy"].median_ms / 1e9, size)


def work_of(
    model: nn.Module,
    inputs: Inputs,
    precision: str,
    lengths: Sequence[int] | None = None,
    counted: dict[int | None, int] | None = None,
) -> Work:
    """Counted by running the model once on one row of `inputs` (or, where `lengths` is given, on one of each length).

    Args:
        inputs: first dimension the batch.
        lengths: the rows' lengths without their padding: only these tokens count, as without padding they would.
        counted: operations by length that are known already; added to.
    """
    tensors = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    batch = tensors[0].shape[0]
    rows, tokens = lengths or [None] * batch, sum(lengths) if lengths else tensors[0].shape[:2].numel()
    counted = {} if counted is None else counted
    for length in set(rows) - set(counted):
        counted[length] = _operations(model, _row(inputs, length))
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(weight) for weight in embeddings}
    numbers = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    numbers += sum(min(tokens, weight.shape[0]) * weight.shape[1] for weight in embeddings)  # rows that are looked up
    numbers += sum(t.numel() for t in tensors if t.is_floating_point())
    indices = sum(t.numel() * t.element_size() for t in tensors if not t.is_floating_point())
    return Work(float(sum(counted[row] for row in rows)), float(numbers * NUMBER_BYTES[precision] + indices))


def floor_of(work: Work, ceilings: Ceilings, precision: str) -> Floor:
    """The least time that this machine could take for it."""
    by_operations = work.operations / ceilings.tflops[precision] / 1e9
    by_bytes = work.bytes / ceilings.copy_tb_s / 1e9
    return Floor(by_operations, "operations") if by_operations >= by_bytes else Floor(by_bytes, "bytes")


def _row(inputs: Inputs, length: int | None) -> Inputs:
    """The first row; where a length is given, that many tokens of it, none of them padding."""
    if isinstance(inputs, tuple):
        return tuple(t[:1] for t in inputs)
    row = {name: t[:1] if length is None else t[:1, :length] for name, t in inputs.items()}
    return {n: torch.ones_like(t) if length is not None and n == "attention_mask" else t for n, t in row.items()}


def _operations(model: nn.Module, inputs: Inputs) -> int:
    # nn.MultiheadAttention's fast path and the attention kernels are opaque to the counter; their parts are not.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            flat_call(model, inputs)()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())
