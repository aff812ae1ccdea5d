"""Triton's interpreter on a CPU, the compiler on a GPU: `device` runs a kernel's test on each.

TRITON_INTERPRET is set in tests/conftest.py, before anything imports Triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def _repair_interpreter() -> None:
    """NumPy 2.4 no longer turns arrays of one number into integers, which Triton 3.6's interpreter asks of it in loops."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def repaired(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = repaired


if not torch.cuda.is_available():
    _repair_interpreter()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernel runs."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("where there is a GPU, kernels are compiled for it and not interpreted")
    return str(request.param)
