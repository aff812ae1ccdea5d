"""List the passes: what each does, its options and defaults, its place in the default pipeline, and whose it is."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from importlib.metadata import entry_points
from typing import Any

from accelkit import plugins
from accelkit.cli.output import print_table
from accelkit.errors import AccelkitError
from accelkit.options import resolve_passes
from accelkit.precision import Precision

HELP = "list the passes and the default pipeline"
EXAMPLES = ("accelkit passes",)
COLUMNS = ("pass", "default pipeline", "options", "distribution", "what it does")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> int:
    """Print the table: the default pipeline in its order, then the other passes."""
    places = _default_places()
    names = plugins.names(plugins.PASSES)
    ordered = [name for name in places if name in names]
    rows = [_row(name, places.get(name)) for name in [*ordered, *(n for n in names if n not in places)]]
    print_table(COLUMNS, rows)
    return 0


def _default_places() -> dict[str, str]:
    """Pass name -> its places in the default pipeline, in that order, with its precisions where it is not for all."""
    pipelines: dict[str, list[str]] = {}
    for name, precision in Precision.known.items():
        graph_passes, onnx_passes = resolve_passes(None, precision)
        pipelines[name] = [p.name for p in (*graph_passes, *onnx_passes)]
    every: list[str] = []
    for pipeline in sorted(pipelines.values(), key=len, reverse=True):
        for before, name in zip(["", *pipeline], pipeline, strict=False):  # what only some have, behind its predecessor
            if name not in every:
                every.insert(every.index(before) + 1 if before else 0, name)
    places: dict[str, str] = {}
    for name in every:
        having = [precision for precision, pipeline in pipelines.items() if name in pipeline]
        longest = pipelines[max(having, key=lambda precision: len(pipelines[precision]))]
        numbers = ", ".join(str(i + 1) for i, other in enumerate(longest) if other == name)
        places[name] = numbers if len(having) == len(pipelines) else f"{numbers} ({', '.join(having)} only)"
    return places


def _row(name: str, place: str | None) -> tuple[Any, ...]:
    owners = ", ".join(sorted({e.dist.name for e in entry_points(group=plugins.PASSES, name=name) if e.dist}))
    try:
        cls = plugins.find(plugins.PASSES, name)
    except AccelkitError as error:
        return (name, place, None, owners, f"cannot be loaded: {error}")
    what = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return (name, place, _options(cls), owners, what)


def _options(cls: Any) -> str | None:
    """`limit_bytes=1024, keep=()` of a pass's fields."""
    if not dataclasses.is_dataclass(cls):
        return None
    shown = []
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            shown.append(f"{field.name}={field.default!r}")
        elif field.default_factory is not dataclasses.MISSING:
            shown.append(f"{field.name}={field.default_factory()!r}")
        else:
            shown.append(field.name)
    return ", ".join(shown) or None
