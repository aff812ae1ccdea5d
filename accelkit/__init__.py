"""accelkit: a PyTorch model in, the same model out, faster, with proof."""

from __future__ import annotations

from accelkit.dims import Dim as Dim

__version__ = "0.1.0"
