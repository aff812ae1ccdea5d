"""Who attends to whom in sparse attention: values that give a boolean mask, [length, length], True where query i sees key j.

    Axial2D(14, 14, prefix=1) | Local2D(14, 14, distance=2, prefix=1) | Random(0.99)   ->   .mask(197)

For `swap_attention(kind=pattern)`. The patterns are those of earlier xFormers' `attention_patterns`, made anew: tokens are
a grid of image patches, row after row, with `prefix` tokens (a class token) before it that attend to all and that all
attend to. Masks depend on the values alone: random patterns are drawn on the CPU, from their seed.

Example:
    >>> pattern = Axial2D(2, 3) | GlobalTokens(1)
    >>> pattern
    Axial2D(height=2, width=3) | GlobalTokens(tokens=1)
    >>> pattern.mask(6).int()[:4].tolist()
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 1]]
"""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.errors import InputError

__all__ = ["Axial2D", "Custom", "GlobalTokens", "Local2D", "Pattern", "Random", "RandomNear2D", "Union"]


class Pattern(ABC):
    """A rule for who attends to whom; `one | other` allows what either does. Immutable, compared by value."""

    @abstractmethod
    def mask(self, length: int) -> Tensor:
        """Boolean [length, length] on the CPU, True where the query (row) attends to the key (column).

        Raises:
            InputError: the pattern is for another length.
        """

    def why_not(self, length: int) -> str | None:
        """Why the pattern has no mask of this length, or None."""
        return None

    def __or__(self, other: Pattern) -> Union:
        if not isinstance(other, Pattern):
            return NotImplemented
        parts = [p.patterns if isinstance(p, Union) else (p,) for p in (self, other)]
        return Union((*parts[0], *parts[1]))

    def __repr__(self) -> str:
        this: Any = self
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(this)]
        shown = [f"{name}={value!r}" for name, value, default in values if value != default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_json(self) -> dict[str, Any]:
        """The pattern as plain data; `pattern_from_json` is the way back."""
        this: Any = self
        return {"pattern": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(this)}

    def _require_length(self, length: int) -> None:
        if (reason := self.why_not(length)) is not None:
            raise InputError(f"{self!r}: {reason}")


def _require(condition: bool, pattern: str, text: str) -> None:
    if not condition:
        raise InputError(f"{pattern}: {text}")


@dataclass(frozen=True, repr=False)
class _Grid(Pattern):
    """Patches in rows and columns after `prefix` tokens of another kind."""

    height: int
    width: int
    prefix: int = field(default=0, kw_only=True)

    def why_not(self, length: int) -> str | None:
        covered = self.prefix + self.height * self.width
        if length == covered:
            return None
        tokens = f"{self.prefix} + {self.height} x {self.width}" if self.prefix else f"{self.height} x {self.width}"
        return f"it is for {covered} tokens ({tokens}), not {length}"

    def mask(self, length: int) -> Tensor:
        self._require_length(length)
        allowed = torch.ones(length, length, dtype=torch.bool)
        allowed[self.prefix :, self.prefix :] = self._between_patches()
        return allowed

    @abstractmethod
    def _between_patches(self) -> Tensor: ...

    def _distances(self) -> tuple[Tensor, Tensor]:
        """How far apart patches are in rows and in columns; the two broadcast to [height, width, height, width]."""
        rows, columns = torch.arange(self.height), torch.arange(self.width)
        return (
            (rows[:, None] - rows).abs()[:, None, :, None],
            (columns[:, None] - columns).abs()[None, :, None, :],
        )

    def _as_pairs(self, allowed: Tensor) -> Tensor:
        patches = self.height * self.width
        return allowed.expand(self.height, self.width, self.height, self.width).reshape(patches, patches)

    def __post_init__(self) -> None:
        name = type(self).__name__
        _require(_is_count(self.height) and _is_count(self.width), name, "height and width are numbers of patches")
        _require(isinstance(self.prefix, int) and self.prefix >= 0, name, "prefix is a number of tokens")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True, repr=False)
class Axial2D(_Grid):
    """Patches of the same row or the same column.

    Attributes:
        height, width: the grid, in patches.
        prefix: tokens before it, which attend to all and are attended to by all.
    """

    def _between_patches(self) -> Tensor:
        rows, columns = self._distances()
        return self._as_pairs((rows == 0) | (columns == 0))


@dataclass(frozen=True, repr=False)
class Local2D(_Grid):
    """Patches closer than a distance.

    Attributes:
        height, width: the grid, in patches.
        distance: in patches; smaller ones attend, one of exactly this much does not.
        p: the norm that measures it: 2 (Euclidean), 1, inf (the larger of rows and columns), or any other above 0.
        prefix: tokens before the grid, which attend to all and are attended to by all.
    """

    distance: float
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.distance > 0, "Local2D", f"distance is a number of patches above 0, not {self.distance!r}")
        _require(self.p > 0, "Local2D", f"p is a norm's exponent above 0, not {self.p!r}")

    def _between_patches(self) -> Tensor:
        rows, columns = (d.double() for d in self._distances())
        if math.isinf(self.p):
            return self._as_pairs(torch.maximum(rows, columns) < self.distance)
        return self._as_pairs(rows**self.p + columns**self.p < float(self.distance) ** self.p)


@dataclass(frozen=True, repr=False)
class RandomNear2D(_Grid):
    """Pairs of patches drawn at random, nearer ones more often: by a Gaussian of their distance.

    Attributes:
        height, width: the grid, in patches.
        sigma: the Gaussian's standard deviation, in patches.
        sparsity: share of the pairs that do not attend, above 0 and below 1.
        seed: of the draw.
        prefix: tokens before the grid, which attend to all and are attended to by all.
    """

    sigma: float
    sparsity: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.sigma > 0, "RandomNear2D", f"sigma is a number of patches above 0, not {self.sigma!r}")
        _require_sparsity("RandomNear2D", self.sparsity)

    def _between_patches(self) -> Tensor:
        rows, columns = self._distances()
        log_weight = self._as_pairs((rows**2 + columns**2).double()).flatten() / (-2 * self.sigma**2)
        # Without replacement: the smallest of exponential times over the weights (Efraimidis and Spirakis, 2006).
        times = torch.empty_like(log_weight).exponential_(generator=torch.Generator().manual_seed(self.seed))
        count = int(len(times) * (1 - self.sparsity))
        drawn = (times.log() - log_weight).topk(count, largest=False).indices
        allowed = torch.zeros(len(times), dtype=torch.bool)
        allowed[drawn] = True
        return allowed.reshape(self.height * self.width, -1)


def _require_sparsity(name: str, sparsity: float) -> None:
    _require(0 < sparsity < 1, name, f"sparsity is the share left out, above 0 and below 1, not {sparsity!r}")


@dataclass(frozen=True, repr=False)
class Random(Pattern):
    """Each pair on its own, at random; a token may be left with nothing to attend to, and gets zeros then.

    Attributes:
        sparsity: the chance that a pair does not attend, above 0 and below 1.
        seed: of the draw.
    """

    sparsity: float
    seed: int = 0

    def __post_init__(self) -> None:
        _require_sparsity("Random", self.sparsity)

    def mask(self, length: int) -> Tensor:
        return torch.rand(length, length, generator=torch.Generator().manual_seed(self.seed)) > self.sparsity


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    """Tokens that attend to all and that all attend to.

    Attributes:
        tokens: how many, from the first on; or which, by their places.
    """

    tokens: int | tuple[int, ...]

    def __post_init__(self) -> None:
        given: Any = self.tokens
        if isinstance(given, (list, range)):
            object.__setattr__(self, "tokens", tuple(given))
        places = self.tokens if isinstance(self.tokens, tuple) else (self.tokens - 1,)
        _require(len(places) > 0 and min(places) >= 0, "GlobalTokens", f"{self.tokens!r} are no tokens")

    def why_not(self, length: int) -> str | None:
        last = max(self.tokens) if isinstance(self.tokens, tuple) else self.tokens - 1
        return f"there is no token {last} among {length}" if last >= length else None

    def mask(self, length: int) -> Tensor:
        self._require_length(length)
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[list(self.tokens) if isinstance(self.tokens, tuple) else slice(self.tokens)] = True
        return chosen[:, None] | chosen


@dataclass(frozen=True, repr=False, eq=False)
class Custom(Pattern):
    """A mask of one's own.

    Attributes:
        allowed: boolean [length, length], True where the query (row) attends to the key (column). It is copied.
    """

    allowed: Tensor
    _digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        given = self.allowed
        square = isinstance(given, Tensor) and given.dim() == 2 and given.shape[0] == given.shape[1] > 0
        if not square or given.dtype is not torch.bool:
            shown = f"{given.dtype}{list(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise InputError(f"Custom: a pattern is a boolean tensor [length, length], not {shown}")
        object.__setattr__(self, "allowed", given.detach().to("cpu", copy=True))
        object.__setattr__(self, "_digest", hashlib.sha256(self._packed()).hexdigest())

    def why_not(self, length: int) -> str | None:
        return None if length == len(self.allowed) else f"it is for {len(self.allowed)} tokens, not {length}"

    def mask(self, length: int) -> Tensor:
        self._require_length(length)
        return self.allowed.clone()

    def __repr__(self) -> str:
        length, digest = len(self.allowed), self._digest
        return f"Custom({length} x {length}, {digest[:8]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and torch.equal(self.allowed, other.allowed)

    def __hash__(self) -> int:
        return hash(self._digest)

    def to_json(self) -> dict[str, Any]:
        packed = base64.b64encode(zlib.compress(self._packed())).decode()
        return {"pattern": "Custom", "length": len(self.allowed), "bits": packed}

    def _packed(self) -> bytes:
        return np.packbits(self.allowed.numpy()).tobytes()

    @classmethod
    def _unpacked(cls, length: int, bits: str) -> Custom:
        packed = np.frombuffer(zlib.decompress(base64.b64decode(bits)), dtype=np.uint8)
        return cls(torch.from_numpy(np.unpackbits(packed, count=length * length).reshape(length, length)).bool())


@dataclass(frozen=True, repr=False)
class Union(Pattern):
    """What any of several patterns allows; `one | other` makes it.

    Attributes:
        patterns: the parts.
    """

    patterns: tuple[Pattern, ...]

    def why_not(self, length: int) -> str | None:
        return next((f"{p!r}: {why}" for p in self.patterns if (why := p.why_not(length)) is not None), None)

    def mask(self, length: int) -> Tensor:
        self._require_length(length)
        allowed = torch.zeros(length, length, dtype=torch.bool)
        for pattern in self.patterns:
            allowed |= pattern.mask(length)
        return allowed

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.patterns))

    def to_json(self) -> dict[str, Any]:
        return {"pattern": "Union", "patterns": [p.to_json() for p in self.patterns]}


_KINDS: dict[str, type[Pattern]] = {c.__name__: c for c in (Axial2D, Local2D, RandomNear2D, Random, GlobalTokens)}


def pattern_from_json(data: Mapping[str, Any]) -> Pattern:
    """The pattern that `to_json` described.

    Raises:
        InputError: an unknown pattern, or options that it does not have.
    """
    options = dict(data)
    name = options.pop("pattern", None)
    try:
        if name == "Union":
            return Union(tuple(pattern_from_json(p) for p in options["patterns"]))
        if name == "Custom":
            return Custom._unpacked(options["length"], options["bits"])
        return _KINDS[str(name)](**options)
    except (KeyError, TypeError, ValueError, zlib.error, RuntimeError) as error:
        raise InputError(f"no attention pattern: {name!r} ({type(error).__name__}: {error})") from error
