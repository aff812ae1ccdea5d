"""The examples in docstrings are true: all of them run, in every module of both packages."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import accelkit
import accelkit_passes


def modules_with_examples() -> Iterator[str]:
    for package in (accelkit, accelkit_passes):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield module.name


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of(name: str) -> None:
    if name.endswith("__main__"):
        return  # importing it would run the command
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0, "see the captured output"
