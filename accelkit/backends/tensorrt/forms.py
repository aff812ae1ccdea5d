"""The ONNX forms that TensorRT fuses, where they differ from the standard ones: FORMS, by operator overload.

One function a form, with the operator's own parameters (see accelkit.onnx_translations), so that a better one is one line's
change. Each says which of TensorRT's fusions it is for. Operators without a form here are written as in accelkit.onnx_fused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FORMS: Mapping[Callable[..., Any], Callable[..., Any]] = {}
"""By operator overload, as `export_onnx(translations=...)` takes them."""
