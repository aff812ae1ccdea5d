"""Passes and targets by name: known ones listed, two owners named, broken ones told from unknown ones."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from accelkit import AccelkitError, Backend, GraphPass, InputError, OnnxPass, plugins


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*found: EntryPoint) -> None:
        monkeypatch.setattr(plugins, "entry_points", lambda group: [e for e in found if e.group == group])
        plugins.refresh()

    yield install
    monkeypatch.undo()
    plugins.refresh()


def entry(name: str, value: str, group: str = plugins.PASSES) -> EntryPoint:
    return EntryPoint(name, value, group)


def test_two_owners_of_a_name_are_both_named(entries: Any) -> None:
    entries(entry("mine", "one.module:A"), entry("mine", "other.module:B"))
    with pytest.raises(
        InputError, match=r"pass 'mine' is claimed by .*one.module:A.* and .*other.module:B.*uninstall one"
    ):
        plugins.find(plugins.PASSES, "mine")


def test_one_distribution_seen_twice_is_one_owner(entries: Any) -> None:
    entries(entry("mine", "collections:Counter"), entry("mine", "collections:Counter"))
    assert plugins.find(plugins.PASSES, "mine").__name__ == "Counter"


@pytest.mark.parametrize("value", ["no_such_module_at_all:A", "collections:NoSuchName"])
def test_a_broken_plug_in(entries: Any, value: str) -> None:
    entries(entry("mine", value))
    with pytest.raises(AccelkitError, match=rf"pass 'mine' cannot be loaded from {value}.*reinstall that package"):
        plugins.find(plugins.PASSES, "mine")


def test_unknown_names_list_the_known_ones(entries: Any) -> None:
    entries(entry("fuse_one", "collections:Counter"), entry("fuse_two", "collections:Counter"))
    with pytest.raises(
        InputError,
        match=r"unknown pass 'fuse_tow'; did you mean 'fuse_two'\? Known passes: fuse_one, fuse_two .*pip install -e",
    ):
        plugins.find(plugins.PASSES, "fuse_tow")


def test_everything_registered_loads_under_its_own_name() -> None:
    for group, kinds in ((plugins.PASSES, (GraphPass, OnnxPass)), (plugins.BACKENDS, (Backend,))):
        for name in plugins.names(group):
            kind = plugins.find(group, name)
            assert issubclass(kind, kinds)
            assert kind.name == name
