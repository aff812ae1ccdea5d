"""A third party's pass and backend, found by their names alone: nothing here imports the plug-in."""

from __future__ import annotations

import sys

import torch

import accelkit
from accelkit import plugins
from accelkit.testing import apply, graph_text, trace


class HardSwish(torch.nn.Module):
    """x * relu6(x + 3) / 6, as networks older than torch.nn.Hardswish have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.nn.functional.relu6(x + 3) / 6)


model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), HardSwish(), torch.nn.Conv2d(8, 4, 1), HardSwish()).eval()
x = torch.randn(2, 3, 12, 12)

before = accelkit.optimize(model, x, target="eager")
assert "fuse_hard_sigmoid" not in str(before.report()), "an installed pass ran without being asked for"
assert not any(name.startswith("accelkit_example_plugin") for name in sys.modules), "imported without being asked for"

fast = accelkit.optimize(model, x, target="interpreter", passes=("canonicalise", "fuse_hard_sigmoid"))
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
report = str(fast.report())
assert "fuse_hard_sigmoid" in report, report
assert "interpreter" in report, report
print(report)

fuse_hard_sigmoid = plugins.find(plugins.PASSES, "fuse_hard_sigmoid")()
graph = trace(model, x)
assert len(apply(fuse_hard_sigmoid, graph).rewrites) == 2
assert graph_text(graph).count("aten.hardsigmoid(") == 2
assert not apply(fuse_hard_sigmoid, graph).rewrites, "a second run found something to rewrite"

integers = trace(HardSwish(), torch.arange(-6, 6))
(refusal,) = apply(fuse_hard_sigmoid, integers).refusals
assert "takes floating-point tensors only" in refusal.reason
print("refused as it should be:", refusal.reason)
