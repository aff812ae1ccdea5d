"""relu6(x + 3) / 6 -> hardsigmoid(x)

Mobile networks from before PyTorch had hardsigmoid spell it out; as one operator it is one pass over memory, not three,
and runtimes have a kernel for it. On a CPU the result is bit for bit the same in float32 and float64; in half precision
hardsigmoid rounds once where the three operators round three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from accelkit.pass_api import Match, RewritePass

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseHardSigmoid(RewritePass):
    """relu6(x + 3) / 6 -> hardsigmoid(x)"""

    def pattern(self, x: Any) -> Any:
        return aten.div.Tensor(aten.relu6.default(aten.add.Tensor(x, 3)), 6)

    def replacement(self, x: Any) -> Any:
        return aten.hardsigmoid.default(x)

    def check(self, match: Match) -> None:
        dtype = match.value("x").dtype
        match.require(dtype.is_floating_point, f"x is {dtype}, and hardsigmoid takes floating-point tensors only")
