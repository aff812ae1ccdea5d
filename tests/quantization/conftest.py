from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about time."""
    monkeypatch.setattr("accelkit.checks.TIMING_SECONDS", 0.0)
