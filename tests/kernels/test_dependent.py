"""Programmatic dependent launch: who is launched so, and what may be read before the wait."""

from __future__ import annotations

import pytest
import torch

from accelkit.kernels import dependent


def test_nothing_is_launched_so_on_a_cpu() -> None:
    x = torch.randn(3)
    with dependent.launches(True):
        assert not any(dependent.dependent(kernel, x) for kernel in (*dependent.BY_DEFAULT, "hopper"))
    assert dependent.options(False) == {}
    assert dependent.options(True) == {"launch_pdl": True}


def test_the_switch_decides_inside_and_is_put_back() -> None:
    assert dependent.allowed(True)
    assert not dependent.allowed(False)
    with dependent.launches(False):
        assert not dependent.allowed(True)
        with dependent.launches(True):
            assert dependent.allowed(True)
            assert not dependent.allowed(False), "a configuration that says no is not overruled"
        assert not dependent.allowed(True)
    assert dependent.allowed(True)


def test_kernels_follow_the_default_and_the_switch_where_the_gpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependent, "dependent_launch_on", lambda device: True)
    monkeypatch.setattr(dependent, "BY_DEFAULT", frozenset({"norm"}))
    x = torch.randn(3)
    assert [dependent.dependent(kernel, x) for kernel in ("norm", "rows")] == [True, False]
    with dependent.launches(True):
        assert [dependent.dependent(kernel, x) for kernel in ("norm", "rows")] == [True, True]
    with dependent.launches(False):
        assert [dependent.dependent(kernel, x) for kernel in ("norm", "rows")] == [False, False]


def test_nothing_is_a_constant_unless_declared() -> None:
    weight, other = torch.randn(4, 3), torch.randn(4, 3)
    assert not dependent.is_constant(weight)
    with dependent.constants([weight]):
        assert not dependent.is_constant(weight), "on a CPU nothing overlaps"
        assert not dependent.is_constant(other)


def test_views_of_constants_are_constants_and_copies_are_not() -> None:
    weight = torch.randn(4, 3)
    token = dependent._constants.set(frozenset({dependent._memory(weight)}))
    try:
        assert dependent.is_constant(weight)
        assert dependent.is_constant(weight.view(3, 4)[1:])
        assert not dependent.is_constant(weight.clone())
    finally:
        dependent._constants.reset(token)
    assert not dependent.is_constant(weight)
