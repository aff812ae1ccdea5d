"""Attention patterns: each against its definition pair by pair, unions, lengths, bad values, and the way into files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelkit.attention_patterns import (
    Axial2D,
    Custom,
    GlobalTokens,
    Local2D,
    Pattern,
    Random,
    RandomNear2D,
    Union,
    pattern_from_json,
)
from accelkit.errors import InputError

Place = tuple[int, int]
HEIGHT, WIDTH = 4, 6
DIAGONAL = torch.eye(24, dtype=torch.bool)


def distance(p: float) -> Callable[[Place, Place], float]:
    if math.isinf(p):
        return lambda a, b: max(abs(a[0] - b[0]), abs(a[1] - b[1]))
    return lambda a, b: (abs(a[0] - b[0]) ** p + abs(a[1] - b[1]) ** p) ** (1 / p)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    ("pattern", "attends"),
    [
        (Axial2D, lambda a, b: a[0] == b[0] or a[1] == b[1]),
        (lambda *s, **o: Local2D(*s, distance=2, **o), lambda a, b: distance(2)(a, b) < 2),
        (lambda *s, **o: Local2D(*s, distance=2.3, **o), lambda a, b: distance(2)(a, b) < 2.3),
        (lambda *s, **o: Local2D(*s, distance=3, p=1, **o), lambda a, b: distance(1)(a, b) < 3),
        (lambda *s, **o: Local2D(*s, distance=2, p=math.inf, **o), lambda a, b: distance(math.inf)(a, b) < 2),
    ],
    ids=["axial", "local 2", "local 2.3", "local 3, p 1", "local 2, p inf"],
)
def test_patterns_of_a_grid(pattern: Any, attends: Callable[[Place, Place], bool], prefix: int) -> None:
    mask = pattern(HEIGHT, WIDTH, prefix=prefix).mask(prefix + HEIGHT * WIDTH)
    places: list[Place | None] = [None] * prefix + list(itertools.product(range(HEIGHT), range(WIDTH)))  # row after row
    expected = [[a is None or b is None or attends(a, b) for b in places] for a in places]
    assert mask.dtype is torch.bool
    assert mask.tolist() == expected


def test_random_pairs() -> None:
    mask = Random(0.9, seed=3).mask(200)
    assert 0.09 < float(mask.float().mean()) < 0.11
    assert torch.equal(mask, Random(0.9, 3).mask(200))
    assert not torch.equal(mask, Random(0.9, 4).mask(200))


def test_random_pairs_nearby() -> None:
    mask = RandomNear2D(12, 12, sigma=2.0, sparsity=0.95, seed=1).mask(144)
    assert int(mask.sum()) == int(144 * 144 * 0.05)
    assert torch.equal(mask, RandomNear2D(12, 12, 2.0, 0.95, 1).mask(144))
    near = Local2D(12, 12, distance=4).mask(144)
    assert float(mask[near].float().mean()) > 10 * float(mask[~near].float().mean())
    assert RandomNear2D(12, 12, 2.0, 0.95, prefix=1).mask(145)[0].all()


def test_global_tokens() -> None:
    first, chosen = GlobalTokens(2).mask(5), GlobalTokens((1, 3)).mask(5)
    assert first.tolist() == [[i < 2 or j < 2 for j in range(5)] for i in range(5)]
    assert chosen.tolist() == [[i in (1, 3) or j in (1, 3) for j in range(5)] for i in range(5)]


def test_a_mask_of_ones_own_is_copied() -> None:
    mask = DIAGONAL.clone()
    pattern = Custom(mask)
    mask.fill_(True)
    assert torch.equal(pattern.mask(24), DIAGONAL)
    assert pattern == Custom(DIAGONAL)
    assert pattern != Custom(~DIAGONAL)
    assert len({pattern, Custom(DIAGONAL), Custom(~DIAGONAL)}) == 2


def test_unions() -> None:
    parts = (Axial2D(4, 6), Random(0.5), Custom(DIAGONAL))
    union = parts[0] | parts[1] | parts[2]
    assert union == Union(parts)
    assert union == parts[0] | (parts[1] | parts[2])
    assert torch.equal(union.mask(24), parts[0].mask(24) | parts[1].mask(24) | parts[2].mask(24))
    assert repr(parts[0] | parts[1]) == "Axial2D(height=4, width=6) | Random(sparsity=0.5)"
    with pytest.raises(TypeError):
        parts[0] | DIAGONAL


@pytest.mark.parametrize(
    ("pattern", "length", "reason"),
    [
        (Axial2D(4, 6), 25, r"it is for 24 tokens \(4 x 6\), not 25"),
        (Local2D(4, 6, 2, prefix=1), 24, r"it is for 25 tokens \(1 \+ 4 x 6\), not 24"),
        (Custom(DIAGONAL), 23, "it is for 24 tokens, not 23"),
        (GlobalTokens((0, 7)), 7, "there is no token 7 among 7"),
        (Random(0.5) | Axial2D(4, 6), 20, r"Axial2D\(height=4, width=6\): it is for 24 tokens"),
    ],
)
def test_another_length(pattern: Pattern, length: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        pattern.mask(length)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Axial2D(0, 4), "height and width are numbers of patches"),
        (lambda: Axial2D(4, 4, prefix=-1), "prefix is a number of tokens"),
        (lambda: Local2D(4, 4, distance=0), "distance is a number of patches above 0, not 0"),
        (lambda: Local2D(4, 4, distance=1, p=0), "p is a norm's exponent above 0, not 0"),
        (lambda: Random(1.0), "sparsity is the share left out, above 0 and below 1, not 1.0"),
        (lambda: RandomNear2D(4, 4, sigma=0, sparsity=0.5), "sigma is a number of patches above 0"),
        (lambda: GlobalTokens(0), "0 are no tokens"),
        (lambda: GlobalTokens((-1, 2)), r"\(-1, 2\) are no tokens"),
        (lambda: Custom(torch.ones(3, 3)), r"boolean tensor \[length, length\], not torch.float32\[3, 3\]"),
        (lambda: Custom(torch.ones(3, 4, dtype=torch.bool)), r"not torch.bool\[3, 4\]"),
        (lambda: Custom("local"), "not 'local'"),  # type: ignore[arg-type]
    ],
)
def test_bad_values(make: Callable[[], Pattern], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make()


def test_to_a_file_and_back() -> None:
    pattern = (
        Axial2D(4, 6) | Local2D(4, 6, 2.5, p=1) | RandomNear2D(4, 6, 2.0, 0.9) | Random(0.9, 2) | GlobalTokens((1, 3))
        | Custom(DIAGONAL) | GlobalTokens(2)
    )  # fmt: skip
    again = pattern_from_json(json.loads(json.dumps(pattern.to_json())))
    assert again == pattern
    assert torch.equal(again.mask(24), pattern.mask(24))


@pytest.mark.parametrize("data", [{"pattern": "Spiral"}, {"pattern": "Axial2D", "depth": 3}, {}])
def test_no_pattern_in_a_file(data: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no attention pattern"):
        pattern_from_json(data)
