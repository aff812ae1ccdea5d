"""List the engine cache, or change it.

Builds keep what they compiled in one folder of the user's (another: the environment's ACCELKIT_CACHE_DIR), bounded in
size (10 GiB; another bound: ACCELKIT_CACHE_MAX_BYTES), the least recently used going first.
"""

from __future__ import annotations

import argparse
import re
import time

from accelkit.cache import EngineCache
from accelkit.cli.output import counted, mebibytes, print_table
from accelkit.errors import CacheError

HELP = "list, shrink or clear the engine cache"
EXAMPLES = ("accelkit cache", "accelkit cache --limit 2GiB", "accelkit cache --clear")
UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
COLUMNS = ("key", "size", "last used", "what")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--path", action="store_true", help="print the folder and nothing else")
    what.add_argument("--clear", action="store_true", help="remove every engine")
    what.add_argument(
        "--limit", type=size_bytes, metavar="SIZE", help="remove the least recently used beyond SIZE (2GiB, 500MB, 0)"
    )


def run(options: argparse.Namespace) -> int:
    """List, or do what is asked."""
    cache = EngineCache()
    if cache.folder is None:
        raise CacheError("there is no home folder to keep engines in; set ACCELKIT_CACHE_DIR to a folder")
    if options.path:
        print(cache.folder)
    elif options.clear:
        before = cache.size_bytes()
        print(f"removed {counted(cache.clear(), 'engine')}, {mebibytes(before)}, from {cache.folder}")
    elif options.limit is not None:
        removed, freed = shrink(cache, options.limit)
        left = mebibytes(cache.size_bytes())
        print(f"removed {counted(removed, 'engine')}, {mebibytes(freed)}; {left} left in {cache.folder}")
    else:
        _list(cache)
    return 0


def shrink(cache: EngineCache, limit_bytes: int) -> tuple[int, int]:
    """Remove the least recently used entries until at most `limit_bytes` are left; (entries, bytes) removed.

    Raises:
        CacheError: one cannot be removed.
    """
    entries = cache.entries()
    excess = sum(entry.size_bytes for entry in entries) - limit_bytes
    removed = freed = 0
    for entry in entries:
        if freed >= excess:
            break
        if cache.remove(entry.key):
            removed += 1
        freed += entry.size_bytes
    return removed, freed


def size_bytes(text: str) -> int:
    """`2GiB` -> 2147483648, for argparse."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GiB, 500MB or 0")
    return int(float(match[1]) * UNITS[match[2] or ""])


def _list(cache: EngineCache) -> None:
    entries = cache.entries()
    rows = []
    for entry in reversed(entries):
        facts = cache.facts(entry.key) or {"damaged": "it is removed when it is next looked up"}
        what = ", ".join(f"{name} {value}" for name, value in facts.items())
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        rows.append((entry.key[:16], mebibytes(entry.size_bytes), used, what))
    if rows:
        print_table(COLUMNS, rows)
    size, bound = mebibytes(sum(entry.size_bytes for entry in entries)), mebibytes(cache.max_bytes)
    print(f"{counted(len(entries), 'engine')}, {size} of at most {bound}, in {cache.folder}")
