"""Passes and backends by name, found through entry points: accelkit's own come the same way as anyone's.

A plug-in is one line in its distribution's pyproject.toml:

    [project.entry-points."accelkit.passes"]
    my_pass = "my_package.my_module:MyPass"

Installing one never changes a result: only the default pipeline or the caller's own tuple runs.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from accelkit.errors import AccelkitError, InputError, unknown_name

PASSES, BACKENDS = "accelkit.passes", "accelkit.backends"
_KIND = {PASSES: "pass", BACKENDS: "target"}


@cache
def _entries(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=group):  # the same distribution can be seen twice on sys.path: one line, not two
        found.setdefault(entry.name, {})[entry.value] = entry
    return {name: tuple(entries.values()) for name, entries in sorted(found.items())}


def names(group: str) -> list[str]:
    """The names registered in a group (PASSES or BACKENDS), sorted."""
    return list(_entries(group))


def find(group: str, name: str) -> Any:
    """The class that a name stands for.

    Raises:
        InputError: unknown name (the known ones are listed), or two distributions claim it (both are named).
    """
    kind, entries = _KIND[group], _entries(group)
    if name not in entries:
        error = unknown_name(kind, name, list(entries))
        raise InputError(
            f"{error} (a {kind} just added to an editable install is seen only after `pip install -e .` is repeated)"
        )
    owners = entries[name]
    if len(owners) > 1:
        claims = " and ".join(f"{e.dist.name if e.dist else 'unknown distribution'} ({e.value})" for e in owners)
        raise InputError(
            f"{kind} {name!r} is claimed by {claims}; uninstall one, or pass the class's value, not its name"
        )
    try:
        return owners[0].load()
    except (ImportError, AttributeError) as error:
        dist = owners[0].dist
        where = f"{owners[0].value} of {dist.name if dist else 'unknown distribution'}"
        raise AccelkitError(
            f"{kind} {name!r} cannot be loaded from {where}: {error}; reinstall that package"
        ) from error


def refresh() -> None:
    """Forget what was found, so that a plug-in installed since is seen."""
    _entries.cache_clear()
