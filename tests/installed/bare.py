"""accelkit as installed without extras: imports, says what is missing and how to get it, and runs target eager."""

from __future__ import annotations

import importlib.util
import sys

import torch

import accelkit

print("accelkit", accelkit.__version__, "from", accelkit.__file__)
assert "site-packages" in accelkit.__file__, "this must run against an installed wheel"
assert "onnxruntime" not in sys.modules
assert importlib.util.find_spec("onnxruntime") is None, "this must run before the extras are installed"

model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Flatten()
).eval()
with torch.no_grad():
    model(torch.randn(4, 3, 16, 16))
x = torch.randn(2, 3, 16, 16)
fast = accelkit.optimize(model, x, target="eager")
torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
report = str(fast.report())
assert "fuse_conv_batch_norm" in report, report
print(report)

try:
    accelkit.optimize(model, x, target="onnxruntime")
except accelkit.BackendUnavailableError as error:
    assert "pip install" in str(error), error
    print("refused as it should be:", error)
else:
    raise SystemExit("target onnxruntime worked without onnxruntime?")
