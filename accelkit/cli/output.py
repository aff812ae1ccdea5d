"""What commands print: tables (rich on a terminal, plain text elsewhere), complaints, and arguments' types."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelkit.errors import InputError


def complain(sentence: str) -> None:
    """One line on standard error."""
    print(f"accelkit: {sentence}", file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A table on standard output; None is shown as a dash. Numbers' columns stand on the right.

    On a terminal rich wraps long cells where it is installed; elsewhere lines are as long as their content, for grep.
    """
    cells = [["-" if value is None else str(value) for value in row] for row in rows]
    right = [all(_is_number(row[i]) for row in cells) and bool(cells) for i in range(len(columns))]
    if sys.stdout.isatty() and _print_rich(columns, cells, right, title):
        return
    if title:
        print(title)
    widths = [max(len(column), *(len(row[i]) for row in cells), 0) for i, column in enumerate(columns)]
    for row in [list(columns), ["-" * width for width in widths], *cells]:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print("  ".join(padded).rstrip())


def _print_rich(columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool], title: str) -> bool:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, (column, is_right) in enumerate(zip(columns, right, strict=True)):
        table.add_column(escape(column), justify="right" if is_right else "left", no_wrap=index == 0, overflow="fold")
    for row in cells:
        table.add_row(*map(escape, row))
    Console().print(table)
    return True


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.strip("~x%+-.").replace(".", "").replace("e-", "").isdigit()


def mebibytes(size_bytes: int | None) -> str | None:
    """`12.3 MiB`, `0.01 MiB`; None where unknown."""
    if size_bytes is None:
        return None
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**20 or not size_bytes else f"{size_bytes / 2**20:.2g} MiB"


def counted(count: int, what: str) -> str:
    """`1 engine`, `3 engines`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def comma_list(text: str) -> list[str]:
    """`a,b` -> ["a", "b"], for argparse."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names such as a,b")
    return list(dict.fromkeys(words))


def batch_size(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a batch size: a whole number of at least 1")
    return int(text)


def batch_sizes(text: str) -> list[int]:
    """`1,8` -> [1, 8], for argparse."""
    return [batch_size(word) for word in comma_list(text)]


def positive(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number above zero, for argparse."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} has to be above zero")
        return value

    return parse


def output_path(path: Path | None, suffix: str = "") -> Path | None:
    """The path, checked before minutes of work are spent on what goes there.

    Raises:
        InputError: its folder does not exist, it is a folder itself, or it has another suffix than asked for.
    """
    if path is None:
        return None
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if suffix and path.suffix != suffix:
        raise InputError(f"cannot write {path}: the name has to end in {suffix}")
    return path
