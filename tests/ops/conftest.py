"""`device`: on a CPU an operator is its plain meaning, on a GPU the kernel."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the operator runs."""
    return str(request.param)
