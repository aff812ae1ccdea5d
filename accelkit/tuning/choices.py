"""What measuring found, by device and problem: looked up in every call, loaded from disk by the first.

    chosen[device, problem]  ->  a configuration, or None where the rules decide

A problem and a configuration are NamedTuples of numbers, words, truths and dtypes, so that they can be read in a file.
"""

from __future__ import annotations

import functools
import threading
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

P = TypeVar("P")
C = TypeVar("C")

MOST = 8192
"""Problems that are remembered: a server of many lengths meets new ones without end."""

KINDS: dict[str, Choices[Any, Any]] = {}
"""Every kind of choice, by name."""

_LOADING = threading.RLock()


class Choices(dict[tuple[torch.device, P], C | None], Generic[P, C]):
    """The measured choices of one kind.

    Args:
        kind: its name, as in files and tables.
        problem, config: their NamedTuple classes.
        candidates: the configurations there are for a problem on a device; others in a file are passed over.
    """

    def __init__(
        self, kind: str, problem: type[P], config: type[C], candidates: Callable[[torch.device, P], Sequence[C]]
    ) -> None:
        super().__init__()
        self.kind, self.problem, self.config, self.candidates = kind, problem, config, candidates
        self._loaded: set[torch.device] = set()
        self._provisional: set[tuple[torch.device, P]] = set()
        KINDS[kind] = self

    def keep(self, device: torch.device, problem: P, choice: C, provisional: bool = False) -> None:
        """Choose; `provisional`: of some of the candidates only, so that tuning measures it again."""
        where = (device, problem)
        self[where] = choice
        (self._provisional.add if provisional else self._provisional.discard)(where)

    def is_provisional(self, device: torch.device, problem: P) -> bool:
        """Whether the problem has a choice of some of the candidates only."""
        return self[device, problem] is not None and (device, problem) in self._provisional

    def __missing__(self, where: tuple[torch.device, P]) -> C | None:
        """The first look-up of a problem: loads the device's file where nothing was looked up there before."""
        device, _ = where
        if device not in self._loaded:
            with _LOADING:
                if device not in self._loaded:
                    self._load(device)
                    self._loaded.add(device)
        if len(self) < MOST:
            return self.setdefault(where, None)
        return self.get(where)

    def forget(self) -> None:
        """As if nothing had been looked up yet."""
        with _LOADING:
            self.clear()
            self._loaded.clear()
            self._provisional.clear()

    def _load(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        from accelkit.tuning import files

        refused = 0
        for entry in files.entries_of(device):
            if entry.get("kind") == self.kind:
                try:
                    problem, config = from_json(self.problem, entry["problem"]), from_json(self.config, entry["choice"])
                except (KeyError, TypeError, ValueError):
                    refused += 1
                    continue
                if config in self.candidates(device, problem):
                    if (device, problem) not in self:
                        self.keep(device, problem, config, entry.get("provisional") is True)
                else:
                    refused += 1
        if refused:
            from accelkit.errors import warn

            warn(
                f"{refused} tuned {self.kind} choices in {files.path_of(device)} are not what this version writes and are "
                "passed over; `accelkit tune --clear` removes the file"
            )


# --- NamedTuples as JSON


def to_json(value: Any) -> Any:
    """A NamedTuple as an object, a dtype as its name.

    >>> from accelkit.tuning.choices import to_json
    >>> class Problem(typing.NamedTuple):
    ...     rows: int
    ...     dtype: torch.dtype
    >>> to_json(Problem(3, torch.float16))
    {'rows': 3, 'dtype': 'float16'}
    """
    if isinstance(value, tuple):
        return {name: to_json(field) for name, field in value._asdict().items()}  # type: ignore[attr-defined]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def from_json(cls: type[C], data: Any) -> C:
    """The way back.

    Raises:
        TypeError, KeyError: the data is of another form.
    """
    hints = _hints(typing.cast(Any, cls))
    if not isinstance(data, Mapping) or set(data) != set(hints):
        raise TypeError(f"a {cls.__name__} has {', '.join(hints)}, not {data!r}")
    return cls(**{name: _field(hint, data[name]) for name, hint in hints.items()})


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _field(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
    if hint is torch.dtype:
        found = getattr(torch, value, None) if isinstance(value, str) else None
        if not isinstance(found, torch.dtype):
            raise TypeError(f"{value!r} is no dtype")
        return found
    if issubclass(hint, tuple):
        return from_json(hint, value)
    if type(value) is not hint:
        raise TypeError(f"{value!r} is no {hint.__name__}")
    return value
