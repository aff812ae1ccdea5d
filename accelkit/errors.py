"""The errors accelkit raises: one tree, so that `except accelkit.AccelkitError` catches everything that is ours.

A message says what failed, on what (pass, node, shape, dtype), and what to do about it. Exceptions raised inside the
user's own `forward` are never wrapped: they pass through as they are.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Sequence


class AccelkitError(Exception):
    """Base of every error that accelkit raises on purpose."""


class CaptureError(AccelkitError):
    """The model could not be turned into a graph."""


class PassError(AccelkitError):
    """A pass failed or broke one of the runner's invariants."""


class LoweringError(AccelkitError):
    """A backend could not compile a graph.

    Attributes:
        nodes: names of the graph nodes the backend cannot take, mapped to reasons; lowering retries with them in PyTorch.
    """

    def __init__(self, message: str, nodes: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.nodes: dict[str, str] = dict(nodes or {})


class BackendUnavailableError(AccelkitError):
    """A target cannot run on this machine; the message says what is missing and how to get it."""


class InputError(AccelkitError, ValueError):
    """An argument, or an input of a call, is not what the model or the option takes."""


class AccuracyError(AccelkitError):
    """The compiled result is further from the float64 reference than allowed."""


class ArtifactError(AccelkitError):
    """A .accel file is damaged, too new, or not an .accel file."""


class CacheError(AccelkitError):
    """The engine cache was asked for something it cannot do (reads and writes during a build only warn)."""


class AccelkitWarning(UserWarning):
    """Something is slower or otherwise other than asked, and the caller should know."""


def warn(text: str) -> None:
    """An AccelkitWarning that points at the caller's line outside accelkit (and torch), whatever called us."""
    level, frame = 2, sys._getframe(1)  # level 1 is this line, 2 the frame that called warn()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "accelkit",
        "torch",
        "contextlib",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(AccelkitWarning(text), stacklevel=level)


def unknown_name(kind: str, name: object, known: Sequence[str]) -> InputError:
    """The one form of "no such pass/target/precision": names the closest known ones first.

    >>> str(unknown_name("target", "onxruntime", ["eager", "onnxruntime"]))
    "unknown target 'onxruntime'; did you mean 'onnxruntime'? Known targets: eager, onnxruntime"
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    plural = f"{kind}es" if kind.endswith("s") else f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    return InputError(f"unknown {kind} {name!r}{hint} Known {plural}: {', '.join(sorted(known)) or '(none)'}")
