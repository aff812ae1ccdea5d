"""Makers of inputs: batch -> keyword tensors, random but the same at every call.

Text has real padding: every row has its own length (row 0 the full one), the mask is 1 for tokens and 0 for padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MakeInputs = Callable[[int], dict[str, torch.Tensor]]
"""batch -> keyword tensors."""

Extra = Callable[[int, torch.Generator], torch.Tensor]

VOCAB = 99
LENGTH = 12
PAD = 1


def seeded(batch: int) -> torch.Generator:
    """A fresh generator, so that inputs do not depend on what was drawn before."""
    return torch.Generator().manual_seed(1000 + batch)


def padding_mask(batch: int, length: int, generator: torch.Generator, shortest: int = 3) -> torch.Tensor:
    """[batch, length] of int64 ones and zeros; row 0 is full, the others end at random places."""
    lengths = torch.randint(shortest, length, (batch, 1), generator=generator)
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def text(
    length: int = LENGTH,
    *,
    mask: bool = True,
    types: bool = False,
    left: bool = False,
    shortest: int = 3,
    vocab: int = VOCAB,
    extra: dict[str, Extra] | None = None,
) -> MakeInputs:
    """`input_ids` [batch, length], with an `attention_mask`, `token_type_ids` of two segments and `extra` if asked.

    Padding is on the right, or on the left as generation wants it; no row is shorter than `shortest` tokens.
    """

    def make(batch: int) -> dict[str, torch.Tensor]:
        generator = seeded(batch)
        ids = torch.randint(3, vocab, (batch, length), generator=generator)
        inputs = {"input_ids": ids}
        if mask:
            kept = padding_mask(batch, length, generator, shortest)
            kept = kept.flip(1) if left else kept
            inputs = {"input_ids": torch.where(kept.bool(), ids, PAD), "attention_mask": kept}
        if types:
            inputs["token_type_ids"] = (torch.arange(length) >= length // 2).long().repeat(batch, 1)
        for name, draw in (extra or {}).items():
            inputs[name] = draw(batch, generator)
        return inputs

    return make


def ids(length: int, vocab: int = VOCAB) -> Extra:
    return lambda batch, generator: torch.randint(3, vocab, (batch, length), generator=generator)


def normal(*shape: int) -> Extra:
    return lambda batch, generator: torch.randn(batch, *shape, generator=generator)


def uniform(*shape: int) -> Extra:
    return lambda batch, generator: torch.rand(batch, *shape, generator=generator)


def boxes(length: int = LENGTH) -> Extra:
    """Corners (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, in 0..1000 as LayoutLM reads them."""

    def draw(batch: int, generator: torch.Generator) -> torch.Tensor:
        corners = torch.randint(0, 1001, (batch, length, 2, 2), generator=generator)
        return torch.cat([corners.amin(2), corners.amax(2)], dim=-1)

    return draw


def tensors(**draws: Extra) -> MakeInputs:
    """Inputs drawn one by one, in the order given."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        generator = seeded(batch)
        return {name: draw(batch, generator) for name, draw in draws.items()}

    return make


def image(size: int = 32, channels: int = 3) -> MakeInputs:
    """`pixel_values` [batch, channels, size, size], of unit variance."""
    return tensors(pixel_values=normal(channels, size, size))


def wave(samples: int = 400, *, mask: bool = False) -> MakeInputs:
    """`input_values` [batch, samples], and a mask of real samples if asked."""

    def make(batch: int) -> dict[str, torch.Tensor]:
        generator = seeded(batch)
        inputs = {"input_values": torch.randn(batch, samples, generator=generator)}
        if mask:
            inputs["attention_mask"] = padding_mask(batch, samples, generator, shortest=samples // 2)
        return inputs

    return make
