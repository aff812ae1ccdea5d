"""`kind`: a fresh kind of choice, on a GPU that needs not be there."""

from __future__ import annotations

import pytest
from fake_problems import ENVIRONMENT, Config, Fake, Problem

from accelkit.tuning import choices, files
from accelkit.tuning.choices import Choices


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> Choices[Problem, Config]:
    monkeypatch.setattr(files, "environment_of", lambda device: ENVIRONMENT)
    monkeypatch.setattr(choices, "KINDS", {})
    return Choices("fake", Problem, Config, lambda device, problem: Fake(None).candidates())  # type: ignore[arg-type]
