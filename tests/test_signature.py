"""Binding calls: canonical forms, coverage, and messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelkit import Dim, InputError
from accelkit.capture import capture
from accelkit.signature import Binder, leaf_names


def binder(function: Any) -> Binder:
    model = nn.Module()
    model.forward = function  # type: ignore[method-assign]
    return Binder.of(model)


def test_calls_that_mean_the_same_have_one_form() -> None:
    def forward(a: Any, b: Any = None, *, c: int = 3) -> None: ...

    bind = binder(forward).bind
    forms = [bind((1, 2), {}), bind((1,), {"b": 2}), bind((), {"b": 2, "a": 1}), bind((1, 2), {"c": 3})]
    assert all(form == ((), {"a": 1, "b": 2}) for form in forms)
    assert bind((1, None), {}) == bind((1,), {}) == ((), {"a": 1})
    assert bind((1,), {"c": 3.0}) == ((), {"a": 1, "c": 3.0})  # 3.0 is not the default 3
    assert bind((1,), {"c": True}) == ((), {"a": 1, "c": True})


def test_positional_only_and_variadic() -> None:
    def forward(a: Any, /, b: Any, *rest: Any, c: Any = 0, **named: Any) -> None: ...

    one = binder(forward)
    assert one.bind((1, 2), {}) == ((1,), {"b": 2})
    assert one.bind((1, 2, 3, 4), {"a": 5, "d": 6}) == ((1, 2, 3, 4), {"a": 5, "d": 6})
    assert [one.positional_name(i) for i in range(4)] == ["a", "b", "rest[0]", "rest[1]"]
    assert leaf_names(((1, 2, [3, 4]), {"c": {"k": 5}}), one) == ["a", "b", "rest[0][0]", "rest[0][1]", "c['k']"]
    assert one.by_parameter((1, 2, 3), {"d": 6}) == {"a": 1, "b": 2, "rest": (3,), "named": {"d": 6}}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"forward\(a, b=None\): missing a required argument: 'a'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"z": 2}, "unexpected keyword argument 'z'"),
        ((1,), {"a": 2}, "multiple values for argument 'a'"),
    ],
)
def test_calls_that_forward_does_not_take(args: Any, kwargs: Any, message: str) -> None:
    def forward(a, b=None): ...

    with pytest.raises(InputError, match=message):
        binder(forward).bind(args, kwargs)


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y]) @ torch.ones(4)


def test_coverage_of_dynamic_sizes() -> None:
    n, m = Dim("n", max=8), Dim("m", min=2)
    signature = capture(Two(), (torch.randn(3, 4), torch.randn(5, 4)), {}, {"x": {0: n}, "y": {0: m}}).signature

    def covers(x: torch.Tensor, y: torch.Tensor) -> str | None:
        return signature.covers([x, y])

    assert covers(torch.randn(8, 4), torch.randn(1000, 4)) is None
    assert covers(torch.randn(9, 4), torch.randn(2, 4)) == "x has size 9 in dimension 0, covered: n from 1 to 8"
    assert covers(torch.randn(1, 4), torch.randn(1, 4)) == "y has size 1 in dimension 0, covered: m from 2 to any size"
    assert covers(torch.randn(1, 4, 1), torch.randn(2, 4)) is not None
    assert covers(torch.randn(2, 5), torch.randn(2, 4)) == "x has shape [2, 5], captured as ['n', 4]"
    assert covers(torch.randn(2, 4).half(), torch.randn(2, 4)) == "x is torch.float16, captured as torch.float32"
    assert signature.coverage() == "x ['n', 4], y ['m', 4]; n from 1 to 8; m from 2 to any size"


def test_one_name_is_one_size() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    n = Dim("n")
    signature = capture(Add(), (torch.randn(3), torch.randn(3)), {}, ({0: n}, {0: n})).signature
    assert signature.covers([torch.randn(7), torch.randn(7)]) is None
    assert signature.covers([torch.randn(7), torch.randn(6)]) == "n is both 7 and 6 (y, dimension 0)"
    assert signature.covers([torch.randn(7), torch.randn(1)]) is not None  # no broadcasting by accident
