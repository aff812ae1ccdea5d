"""Histograms of values that stream in: a tensor, another, ...  ->  counts over bins that widen without losing one.

    bins of width w = 2^e / BINS, bin k counts the values in [k w, (k + 1) w), from -2^e to 2^e

e is the smallest exponent with every magnitude seen so far below 2^e. When a larger one comes, e grows and bins merge
in pairs (k -> floor(k / 2)) as often as e grew. Edges of wide bins are edges of narrow ones, so every count lands where it
would have landed from the start: the result depends neither on the order of the tensors nor on how they were cut into
batches, and its memory on neither. Scaling by a power of two and rounding down are exact in float32.

Source: a fixed number of bins and a range that doubles, as in Chaudhuri and others' streaming histograms and PyTorch's
HistogramObserver; ranges of powers of two, which make the merging exact, are this module's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

BINS = 4096
"""On each side of zero. The largest magnitude lies in the upper half, so that at least 2048 bins are in use: 16 or more
for each of the 127 steps of an 8-bit number."""
_LEAST_EXPONENT = -100  # smaller values all count as the bins around 0: scaling them would overflow float32


@dataclass
class Histogram:
    """Counts of a tensor's values over all batches.

    Attributes:
        counts: int64 [2 * BINS]; `counts[BINS + k]` is the number of values in [k w, (k + 1) w).
        exponent: the range is [-2^exponent, 2^exponent).
        minimum, maximum: exact, of the finite values; 0 where nothing was seen.
        non_finite: number of NaN and infinite values, which are not in the counts.
    """

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(2 * BINS, dtype=torch.int64))
    exponent: int = _LEAST_EXPONENT
    minimum: float = 0.0
    maximum: float = 0.0
    non_finite: int = 0

    def add(self, values: torch.Tensor) -> None:
        """Count the elements of a floating-point tensor of any shape, on any device."""
        values = values.detach().reshape(-1)
        if not values.numel():
            return
        values = values.float() if values.dtype is not torch.float64 else values
        low, high = (float(v) for v in torch.stack(torch.aminmax(values)).tolist())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = values[values.isfinite()]
            self.non_finite += values.numel() - finite.numel()
            return self.add(finite)
        first = not self.total
        self.minimum = low if first else min(self.minimum, low)
        self.maximum = high if first else max(self.maximum, high)
        self._widen(max(math.frexp(max(-low, high))[1], _LEAST_EXPONENT))
        bins = torch.floor(values * math.ldexp(BINS, -self.exponent)).to(torch.int64).add_(BINS)
        self.counts += torch.bincount(bins, minlength=2 * BINS).cpu()

    def _widen(self, exponent: int) -> None:
        """Grow the range to [-2^exponent, 2^exponent); pairs of bins become one."""
        steps = exponent - self.exponent
        if steps <= 0:
            return
        self.exponent = exponent
        used = self.counts.nonzero().reshape(-1)
        if not used.numel():
            return
        merged = torch.div(used - BINS, 2 ** min(steps, 62), rounding_mode="floor") + BINS
        self.counts = torch.zeros_like(self.counts).index_add_(0, merged, self.counts[used])

    # --- questions

    @property
    def total(self) -> int:
        """Number of finite values counted."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Width of a bin, in the tensor's own units."""
        return math.ldexp(1.0 / BINS, self.exponent)

    @property
    def largest(self) -> float:
        """The largest magnitude, exact."""
        return max(-self.minimum, self.maximum, 0.0)

    def centres(self) -> torch.Tensor:
        """float64 [2 * BINS]: the middles of the bins, within what was seen."""
        middles = (torch.arange(-BINS, BINS, dtype=torch.float64) + 0.5) * self.width
        return middles.clamp_(self.minimum, self.maximum)

    def magnitudes(self) -> torch.Tensor:
        """int64 [BINS]: counts of |value|, in bins of the same width from 0 on."""
        return self.counts[BINS:] + self.counts[:BINS].flip(0)
