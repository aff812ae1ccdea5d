"""List the targets: what each runs in and on, whether it can run here, and its place in target="auto"."""

from __future__ import annotations

import argparse
from typing import Any

from accelkit import plugins
from accelkit.cli.output import print_table
from accelkit.errors import AccelkitError
from accelkit.options import AUTO_ORDER

HELP = "list the targets and whether they can run here"
EXAMPLES = ("accelkit targets",)
COLUMNS = ("target", "precisions", "devices", "auto order", "here", "what it does")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    print_table(COLUMNS, [_row(name) for name in plugins.names(plugins.BACKENDS)])
    return 0


def missing(name: str) -> str | None:
    """Why a target cannot run here (another's broken plug-in included), or None."""
    try:
        reason: str | None = plugins.find(plugins.BACKENDS, name)().unavailable()
    except AccelkitError as error:
        return str(error)
    return reason


def available() -> list[str]:
    """The names of the targets that can run here."""
    return [name for name in plugins.names(plugins.BACKENDS) if missing(name) is None]


def _row(name: str) -> tuple[Any, ...]:
    reason = missing(name)
    try:
        backend = plugins.find(plugins.BACKENDS, name)
    except AccelkitError:
        return (name, None, None, None, f"no: {reason}", None)
    places = ", ".join(f"{device} {order.index(name) + 1}" for device, order in AUTO_ORDER.items() if name in order)
    here = "yes" if reason is None else f"no: {reason}"
    description = backend.description or None
    return (name, ", ".join(backend.precisions), ", ".join(backend.devices), places or None, here, description)
