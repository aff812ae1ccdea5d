"""From a histogram to the largest magnitude that 8 bits shall hold: what lies beyond is clipped.

    Max()               the largest magnitude seen: nothing is clipped
    Percentile(99.99)   all but 0.01 % of the values
    MSE()               the least mean squared error of rounding and clipping
    Entropy()           the least Kullback-Leibler divergence between the distribution and its 8-bit form

Sources: Max and Percentile as in FasterTransformer's quantisation toolkits (NVIDIA's pytorch-quantization); MSE: Nagel and
others, A White Paper on Neural Network Quantization (arXiv 2106.08295), section 3.1; Entropy: Migacz, 8-bit Inference with
TensorRT (GTC 2017).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from accelkit.errors import InputError, unknown_name
from accelkit.quantization.histogram import BINS, Histogram

LEVELS = 127
"""Steps on each side of zero of a symmetric 8-bit number."""


@dataclass(frozen=True)
class Calibrator(ABC):
    """A rule that chooses a threshold. Subclasses are frozen dataclasses; `name` is what errors and files call them."""

    name: ClassVar[str] = ""
    known: ClassVar[dict[str, type[Calibrator]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Calibrator.known[cls.name] = cls

    @abstractmethod
    def threshold(self, histogram: Histogram) -> float:
        """The magnitude beyond which values are clipped; 0 where only zeros were seen."""

    def limits(self, histogram: Histogram) -> tuple[float, float]:
        """(low, high) for an asymmetric range: what was seen, cut at the threshold, 0 included."""
        threshold = self.threshold(histogram)
        return max(min(histogram.minimum, 0.0), -threshold), min(max(histogram.maximum, 0.0), threshold)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class Max(Calibrator):
    """The largest magnitude seen."""

    name: ClassVar[str] = "max"

    def threshold(self, histogram: Histogram) -> float:
        return histogram.largest


@dataclass(frozen=True)
class Percentile(Calibrator):
    """The magnitude below which `percentile` percent of the values lie.

    Attributes:
        percentile: above 0, at most 100. FasterTransformer's guide calibrates with 99.99, its toolkits' default is 99.999.
    """

    percentile: float = 99.99

    name: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        if not isinstance(self.percentile, (int, float)) or not 0 < self.percentile <= 100:
            raise InputError(f"Percentile({self.percentile!r}): a percentile is above 0 and at most 100, such as 99.99")

    def threshold(self, histogram: Histogram) -> float:
        cumulative = histogram.magnitudes().cumsum(0)
        # in whole values: 99.99 % of 10000 is 9999 of them, whatever floating point makes of it
        wanted = math.ceil(int(cumulative[-1]) * self.percentile / 100 - 1e-6)
        edge = (int(torch.searchsorted(cumulative, wanted)) + 1) * histogram.width
        return min(edge, histogram.largest)


@dataclass(frozen=True)
class MSE(Calibrator):
    """The threshold of the least mean squared error over the histogram, among `candidates` evenly spaced ones.

    Attributes:
        candidates: how many are tried, from largest / candidates to the largest magnitude.
    """

    candidates: int = 128

    name: ClassVar[str] = "mse"

    def __post_init__(self) -> None:
        if not isinstance(self.candidates, int) or self.candidates < 2:
            raise InputError(f"MSE(candidates={self.candidates!r}): at least 2")

    def threshold(self, histogram: Histogram) -> float:
        tried = self._tried(histogram)
        return min(tried, key=lambda t: squared_error(histogram, -t, t)) if tried else 0.0

    def limits(self, histogram: Histogram) -> tuple[float, float]:
        tried = [
            (max(min(histogram.minimum, 0.0), -t), min(max(histogram.maximum, 0.0), t)) for t in self._tried(histogram)
        ]
        return min(tried, key=lambda pair: squared_error(histogram, *pair)) if tried else (0.0, 0.0)

    def _tried(self, histogram: Histogram) -> list[float]:
        # the largest first: of equal errors the one that clips least
        return [histogram.largest * n / self.candidates for n in range(self.candidates, 0, -1) if histogram.largest]


@dataclass(frozen=True)
class Entropy(Calibrator):
    """The threshold whose 8-bit form of the distribution loses the least information.

    For each number of bins i, from 128 on: P is the distribution of the magnitudes in the first i bins with all that is
    beyond added to the last; Q is the same bins in 128 levels, each level's count spread over its bins that are not
    empty. The i of the least divergence of Q from P wins. The bin at zero takes its neighbour's count: exact zeros are
    held exactly at any scale, and would outweigh everything else.

    Attributes:
        stride: bins between two candidates.
    """

    stride: int = 16

    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or self.stride < 1:
            raise InputError(f"Entropy(stride={self.stride!r}): at least 1")

    def threshold(self, histogram: Histogram) -> float:
        counts = histogram.magnitudes().double()
        counts[0] = counts[1]
        used = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
        if used <= LEVELS + 1:
            return histogram.largest
        tried = [*range(LEVELS + 1, used, self.stride), used]
        best = min(reversed(tried), key=lambda bins: _divergence(counts, bins))
        return float(min(best * histogram.width, histogram.largest))


def _divergence(counts: torch.Tensor, bins: int) -> float:
    inside = counts[:bins]
    reference = inside.clone()
    reference[-1] += counts[bins:].sum()
    filled = reference > 0
    level = torch.arange(bins) * (LEVELS + 1) // bins
    totals = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, level, inside)
    shared = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, level, filled.double())
    quantised = torch.where(filled, totals[level] / shared[level].clamp(min=1), 0.0)
    p, q = reference / reference.sum(), quantised / quantised.sum().clamp(min=1)
    # a level whose own bins are empty but for what was clipped has no probability: as good as the least one count
    q = torch.where(filled & (q == 0), 1.0 / max(1.0, float(counts.sum())), q)
    return float((p[filled] * (p[filled] / q[filled]).log()).sum())


def squared_error(histogram: Histogram, low: float, high: float) -> float:
    """Mean squared error of rounding to 8 bits between `low` and `high`, and of clipping, over the histogram.

    A symmetric range (low = -high) has 127 steps on each side of zero, another one 255 from end to end. Within a bin,
    values are taken to lie at its middle.
    """
    steps = 2 * LEVELS if low == -high else 2 * LEVELS + 1
    step = (high - low) / steps
    if not step or not histogram.total:
        return 0.0
    values, weights = histogram.centres(), histogram.counts.double()
    zero = round(-low / step)
    held = (torch.round(values / step) + zero).clamp_(0, steps).sub_(zero).mul_(step)
    return float(((values - held).square() * weights).sum() / weights.sum())


def signal_power(histogram: Histogram) -> float:
    """Mean square of the values."""
    weights = histogram.counts.double()
    return float((histogram.centres().square() * weights).sum() / weights.sum().clamp(min=1))


def as_calibrator(value: object) -> Calibrator:
    """The calibrator itself, or the one of a name (`"max"`) or of its JSON, with defaults for what is not given.

    Raises:
        InputError: there is no such calibrator; the message lists the known ones.
    """
    if isinstance(value, Calibrator):
        return value
    if isinstance(value, type) and issubclass(value, Calibrator):
        raise InputError(f"calibrator must be a value; did you mean {value.__name__}()?")
    options = dict(value) if isinstance(value, dict) else {"name": value}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in Calibrator.known:
        raise unknown_name("calibrator", name, list(Calibrator.known))
    return Calibrator.known[name](**options)


__all__ = [
    "BINS",
    "MSE",
    "Calibrator",
    "Entropy",
    "Max",
    "Percentile",
    "as_calibrator",
    "signal_power",
    "squared_error",
]
