"""accelkit as installed with its cpu extra: a transformer through onnxruntime, saved, and loaded anew."""

from __future__ import annotations

import subprocess
import sys

import torch

import accelkit

LOAD = """
import sys, warnings, torch, accelkit
warnings.simplefilter("error", accelkit.AccelkitWarning)  # the same machine: no engine is built anew
sample = torch.load("sample.pt", weights_only=True)
torch.testing.assert_close(accelkit.load("model.accel")(sample["x"]), sample["y"], rtol=0, atol=0)
print("loaded in a new process: the same numbers")
"""

assert "site-packages" in accelkit.__file__, "this must run against an installed wheel"
model = torch.nn.TransformerEncoder(
    torch.nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=256, activation="gelu", batch_first=True),
    num_layers=2,
    enable_nested_tensor=False,
).eval()
x = torch.randn(3, 20, 64)

for target in ("eager", "onnxruntime"):
    fast = accelkit.optimize(model, x, target=target)
    y = fast(x)
    with torch.no_grad():
        truth = model.double()(x.double())
    model.float()
    error = float((y.double() - truth).norm() / truth.norm())
    print(f"{target}: relative error against float64 {error:.1e}")
    assert error < 1e-5
    assert target in str(fast.report())

fast.save("model.accel")
torch.save({"x": x, "y": y}, "sample.pt")
subprocess.run([sys.executable, "-c", LOAD], check=True)
