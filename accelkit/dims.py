"""Dynamic dimensions: `Dim("batch", min=1, opt=8, max=64)`, given per input and dimension in `dynamic_shapes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accelkit.errors import InputError


@dataclass(frozen=True)
class Dim:
    """A dimension whose size varies from call to call.

    Attributes:
        name: dimensions of the same name have the same size in every call.
        min: smallest size, at least 1.
        opt: the size that engines are tuned for; by default the example's.
        max: largest size, or None for no bound.
    """

    name: str
    min: int = 1
    opt: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise InputError(f"Dim's name must be a Python identifier, not {self.name!r}")
        if self.min < 1:
            raise InputError(f"Dim {self.name!r}: min={self.min}, but sizes start at 1")
        if self.max is not None and self.max < self.min:
            raise InputError(f"Dim {self.name!r}: max={self.max} is smaller than min={self.min}")
        if self.opt is not None and (self.opt < self.min or (self.max is not None and self.opt > self.max)):
            raise InputError(f"Dim {self.name!r}: opt={self.opt} lies outside {self.min}..{self.max}")

    def exported(self) -> Any:
        """The same dimension in torch.export's terms."""
        return torch.export.Dim(self.name, min=self.min, max=self.max)
