"""Parts of a results file: a run over many processes writes one a process, and merge_results.py joins them.

    --part b1 --run fused --at-once 8    ->    <output>/<machine>/<name>@b1.json, with these facts beside its rows

Rows of one batch size and precision are timed in one process, on one GPU; a part holds whole such groups.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

FIRST_RUN = "fused"
"""The run that files without the name of one are of."""
SEPARATOR = "@"
INCOMPLETE = 75


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the launcher gives each of its processes."""
    group = parser.add_argument_group("parts", "given by on_all_gpus.py")
    group.add_argument("--part", metavar="NAME", help=f"write <name>{SEPARATOR}NAME.json, for merge_results.py")
    group.add_argument("--run", default=FIRST_RUN, metavar="NAME", help="tables compare rows of one run")
    group.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="how many GPUs are measured at the same time"
    )


def file_name(name: str, options: argparse.Namespace) -> str:
    """A results file's name, or a part's."""
    return f"{name}{SEPARATOR}{options.part}" if options.part else name


def incomplete(left: int) -> int:
    """The exit code of a script that has left so much out for want of time: the launcher does not count it as done."""
    if left:
        print(f"the time budget was used up, {left} not measured")
    return INCOMPLETE if left else 0


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the rows has to know about how the process ran."""
    return {"run": options.run, "part": options.part, "gpus_at_once": options.at_once,
            "threads": torch.get_num_threads()}  # fmt: skip
