"""Parts of results files, joined: <parts>/<machine>/<name>@<part>.json ... -> <into>/<machine>/<name>.json

    python benchmarks/merge_results.py PARTS                          # into benchmarks/results
    python benchmarks/merge_results.py PARTS --into OTHER/results

A group is the rows of one run, model, batch size and precision, which one process timed. A group that was measured takes the
place of the same group in the file that is there; all other rows stay. Each row names its set, and `sets` says of each
when, on what, with which versions and beside how many other GPUs it was taken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts import FIRST_RUN, SEPARATOR

from accelkit.measure import write_json

RESULTS = Path(__file__).resolve().parent / "results"
PROVENANCE = (
    "date", "machine", "hardware", "versions", "run", "part", "gpus_at_once", "threads", "target", "quick", "ceilings",
)  # fmt: skip
"""What a set keeps of the file that its rows come from."""
JOBS = "jobs_"
"""Files whose rows are jobs of a list, one a name."""
Result = dict[str, Any]
Key = tuple[Any, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder of machines' folders")
    parser.add_argument("--into", type=Path, default=RESULTS, help="results folder (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    written = merge_folder(options.parts, options.into)
    for path, notes in written.items():
        print(f"wrote {path}" + "".join(f"\n  {note}" for note in notes))
    if not written:
        print(f"{options.parts}: no <machine>/<name>{SEPARATOR}<part>.json in it", file=sys.stderr)
    return 0 if written else 1


def merge_folder(parts: Path, into: Path, base: Path | None = None) -> dict[Path, list[str]]:
    """Join every machine's parts with the files of `base` (None: of `into`); results file -> notes on what was replaced."""
    names: dict[tuple[str, str], list[Path]] = {}
    for path in sorted([*parts.glob(f"*/*{SEPARATOR}*.json"), *parts.glob(f"*/{JOBS}*.json")]):
        names.setdefault((path.parent.name, path.stem.split(SEPARATOR)[0]), []).append(path)
    written = {}
    for (machine, name), paths in names.items():
        target, known = into / machine / f"{name}.json", (base or into) / machine / f"{name}.json"
        before = json.loads(known.read_text()) if known.exists() else None
        found = [json.loads(path.read_text()) for path in paths]
        merged, notes = (_jobs(before, found[0]), []) if name.startswith(JOBS) else merge(before, found)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, merged)
        written[target] = notes
    return written


def merge(before: Result | None, parts: Sequence[Result]) -> tuple[Result, list[str]]:
    """The file as it is (None: there is none), and parts of the same benchmark -> the file to write, and notes."""
    ordered = sorted(parts, key=lambda part: (part["date"], part.get("part") or ""))
    newest = ordered[-1]
    if not all("batch" in row for part in ordered for row in part["rows"]):  # not of groups: the newest is the file
        return {**newest, "name": newest["name"].split(SEPARATOR)[0]}, []
    notes: list[str] = []
    sets: dict[str, Result] = dict(before.get("sets", {})) if before else {}
    groups: dict[Key, list[Result]] = {}
    for source in [before, *ordered] if before else ordered:
        if "sets" in source:
            rows = source["rows"]
        else:
            identity = _new_set(source, sets)
            rows = [{**row, "set": identity} for row in source["rows"]]
        for key, found in _groups(rows, sets).items():
            old = groups.get(key)
            if old and _measured(old) and not _measured(found):
                notes.append(f"{_words(key)}: nothing was measured; the rows that were there stay")
                continue
            if old and {r["candidate"] for r in old} - {r["candidate"] for r in found}:
                gone = sorted({r["candidate"] for r in old} - {r["candidate"] for r in found})
                notes.append(f"{_words(key)}: measured anew without {', '.join(gone)}")
            groups[key] = found
    rows = [row for key in sorted(groups, key=_place) for row in groups[key]]
    used = {row["set"] for row in rows}
    result = {**newest, "name": newest["name"].split(SEPARATOR)[0]}
    result = {k: v for k, v in result.items() if k not in ("part", "run", "rows")}
    if "labels" in newest:
        result["labels"] = {k: v for source in (before or {}, *ordered) for k, v in source.get("labels", {}).items()}
    if "sparse" in newest:
        result["sparse"] = sorted({key for source in (before or {}, *ordered) for key in source.get("sparse", ())})
    result["quick"] = False
    return {**result, "sets": {k: v for k, v in sets.items() if k in used}, "rows": rows}, notes


def _jobs(before: Result | None, found: Result) -> Result:
    """What became of each job the last time."""
    rows = {row["job"]: {"date": source.get("date")} | row for source in (before or {"rows": []}, found)
            for row in source["rows"]}  # fmt: skip
    return {**found, "rows": list(rows.values())}


def _new_set(source: Result, sets: dict[str, Result]) -> str:
    """Register where a file's rows come from; gives the name that they carry."""
    run, part = source.get("run", FIRST_RUN), source.get("part")
    name = base = " ".join(word for word in (run, part, source["date"]) if word)
    number = 2
    while name in sets:
        name, number = f"{base} ({number})", number + 1
    sets[name] = {key: source[key] for key in PROVENANCE if key in source} | {"run": run}
    return name


def _groups(rows: Sequence[Result], sets: dict[str, Result]) -> dict[Key, list[Result]]:
    found: dict[Key, list[Result]] = {}
    for row in rows:
        run = sets[row["set"]]["run"]
        found.setdefault((run, row.get("model"), row["batch"], row["precision"]), []).append(row)
    return found


def _measured(rows: Sequence[Result]) -> bool:
    return any(row["failure"] is None for row in rows)


def _place(key: Key) -> tuple[Any, ...]:
    run, model, batch, precision = key
    order = ("fp32", "tf32", "bf16", "fp16")
    return run != FIRST_RUN, run, model or "", batch, order.index(precision)


def _words(key: Key) -> str:
    run, model, batch, precision = key
    return f"{run}, {model + ', ' if model else ''}batch {batch}, {precision}"


if __name__ == "__main__":
    sys.exit(main())
