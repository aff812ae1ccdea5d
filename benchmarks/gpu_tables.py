"""Tables of the GPU benchmarks, made from a results file alone: result (its JSON) -> heading, columns, rows.

    for table in tables(result, published): table.title, table.columns, table.rows, table.notes

What was published elsewhere stands in published.json with its source; what was to be reached in GOALS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

OURS = "accelkit"
GOALS = {
    "fastertransformer_vit_b16_384": {1: 0.50, 8: 1.85, 32: 6.9},
    "fx2ait_encoder": {1: 0.040, 8: 0.070, 64: 0.34, 512: 2.5},
    "bert_tools": {1: 0.45, 8: 0.70, 64: 2.9},
}
"""Results file -> batch -> ms to reach on one H200 in fp16."""
BEST_PEER_RATIO = 1.35
"""And at least so many times as fast as the best fp16 peer of the same run."""
ONNXRUNTIME_GOAL = ("fastertransformer_vit_b16_384", 32, 11.0)
PADDING_GOAL = 1.8
"""remove_padding at 40 % mean length over the same without it."""
MIB = 2**20

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table under its own heading, with sentences that belong below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = field(default_factory=tuple)


def tables(result: Row, published: dict[str, Any]) -> list[Table]:
    """All tables of one results file, in the order in which they are read; empty ones are left out."""
    from tensorrt_tables import engines  # which takes this module's parts

    made: list[Table] = []
    for number, one in enumerate(by_run(result)):
        first = number == 0
        own = [summary(one), *([goals(one)] if first else []), engines(one)]
        own += [times(one, precision) for precision in reversed(_unique(r["precision"] for r in one["rows"]))]
        if first and result["name"] in published:
            own.append(then_and_now(one, published[result["name"]]))
        own.append(failures(one))
        made += own if first else [replace(t, title=f"{t.title} (run {run_of(one)})") for t in own]
    return [table for table in made if table.rows]


def by_run(result: Row) -> list[Row]:
    """The file's rows, run by run: rows are compared inside one. A file without sets is one run."""
    sets = result.get("sets")
    if not sets:
        return [result]
    runs = _unique(sets[row["set"]]["run"] for row in result["rows"])
    return [
        {**result, "rows": [row for row in result["rows"] if sets[row["set"]]["run"] == run],
         "sets": {name: one for name, one in sets.items() if one["run"] == run}}
        for run in runs
    ]  # fmt: skip


def run_of(result: Row) -> str | None:
    """The run of a file that `by_run` gave."""
    return next((str(one["run"]) for one in result.get("sets", {}).values()), None)


def measured(result: Row, precision: str | None = None) -> list[Row]:
    return [r for r in result["rows"] if "median_ms" in r and precision in (None, r["precision"])]


def summary(result: Row, precision: str = "fp16") -> Table:
    """Ours beside the best of the others, and the floor, a line a batch size."""
    columns = [
        "batch", "floor, ms", "PyTorch, ms", "best peer, ms", "which", "accelkit, ms", "over PyTorch", "over best peer",
        "share of the floor",
    ]  # fmt: skip
    rows = []
    for batch in _unique(r["batch"] for r in measured(result, precision)):
        own = {r["candidate"]: r for r in measured(result, precision) if r["batch"] == batch}
        ours, plain, best = own.get(OURS), own.get("eager"), best_peer(result, batch, precision)
        floor = next((r["floor_ms"] for r in own.values() if "floor_ms" in r), None)
        rows.append([
            batch, ms(floor), ms(_median(plain)), ms(_median(best)), best and label(result, best), ms(_median(ours)),
            _times(plain, ours), _times(best, ours), _share(ours),
        ])  # fmt: skip
    return Table(f"{precision}: accelkit, the best peer of the run, and the floor", columns, rows)


def best_peer(result: Row, batch: int, precision: str) -> Row | None:
    """The fastest candidate that is not ours and computes the same model."""
    skipped = set(result.get("sparse", ()))
    others = [
        r for r in measured(result, precision)
        if r["batch"] == batch and not r["candidate"].startswith(OURS) and r["candidate"] not in skipped
    ]  # fmt: skip
    return min(others, key=lambda r: float(r["median_ms"]), default=None)


def times(result: Row, precision: str) -> Table:
    """Medians with their quartiles, a line a candidate; the error is the largest over the batch sizes."""
    rows = [r for r in result["rows"] if r["precision"] == precision]
    batches = _unique(r["batch"] for r in rows)
    plain = worst_error(r for r in rows if r["candidate"] == "eager")
    lines: list[list[Any]] = []
    for candidate in _unique(r["candidate"] for r in rows):
        own = {r["batch"]: r for r in rows if r["candidate"] == candidate and "median_ms" in r}
        if not own:
            continue
        error = worst_error(own.values())
        sparse = candidate in result.get("sparse", ())
        over = f"{error / plain:.2f}" if error is not None and plain and not sparse else None
        memory = own[max(own)].get("memory_bytes")
        lines.append([
            label(result, {"candidate": candidate}), *(_spread(own.get(batch)) for batch in batches),
            None if error is None else f"{error:.1e}", over, None if memory is None else f"{memory / MIB:.0f}",
        ])  # fmt: skip
    floors = [next((r["floor_ms"] for r in rows if r["batch"] == b and "floor_ms" in r), None) for b in batches]
    if lines:
        lines.append(["the floor", *map(ms, floors), None, None, None])
    columns = ["candidate", *(f"batch {b}, ms" for b in batches), "error", "over PyTorch's", "memory, MiB"]
    return Table(f"{precision}: medians (first to third quartile)", columns, lines)


def then_and_now(result: Row, published: dict[str, Any]) -> Table:
    """What the source published, on its machine, and what this run measured."""
    batches = sorted(
        {int(b) for r in published["rows"] for b in r.get("ms", {})} | {r["batch"] for r in result["rows"]}
    )
    link = f"[{published['source']}]({published['url']})" if published["url"] else published["source"]
    if not any("ms" in r for r in published["rows"]):
        rows = [[r["what"], "then", r["precision"], r["factor"]] for r in published["rows"]]
        for precision, candidate in _unique((r["precision"], r["candidate"]) for r in measured(result)):
            factors = [f for b in batches if (f := _over_fp32(result, b, precision, candidate)) is not None]
            if factors:
                shown = f"{min(factors):.2g} to {max(factors):.2g}"
                rows.append([label(result, {"candidate": candidate}), "now", precision, shown])
        return Table(
            "Then and now: times as fast as PyTorch in fp32",
            ["what", "when", "precision", "factor"],
            rows,
            [f"Then: {link}."],
        )
    lines = [
        [r["what"], "then", r["precision"], *(ms(r["ms"].get(str(b))) for b in batches), _iqr(r), _mib(r)]
        for r in published["rows"]
    ]
    for precision, candidate in _unique((r["precision"], r["candidate"]) for r in measured(result)):
        own = {r["batch"]: r for r in measured(result, precision) if r["candidate"] == candidate}
        first = own.get(batches[0], {})
        cells = [ms(_median(own.get(b))) for b in batches]
        lines.append([label(result, {"candidate": candidate}), "now", precision, *cells, _iqr(first), _mib(first)])
    columns = ["what", "when", "precision", *(f"batch {b}, ms" for b in batches)]
    if not any("iqr_ms" in r for r in published["rows"]):
        lines = [line[:-2] for line in lines]
    else:
        columns += [f"IQR at batch {batches[0]}, ms", f"memory at batch {batches[0]}, MiB"]
    return Table("Then and now, ms a batch", columns, lines, [f"Then: {link}."])


def goals(result: Row) -> Table:
    """What was to be reached on one H200 in fp16, and what was; on other machines, nothing."""
    lines: list[list[Any]] = []
    if "H200" not in result["machine"]:
        return Table("Goals", (), lines)
    name = result["name"]
    found = {(r["candidate"], r["batch"]): float(r["median_ms"]) for r in measured(result, "fp16")}
    for batch, wanted in GOALS.get(name, {}).items():
        ours, best = found.get((OURS, batch)), best_peer(result, batch, "fp16")
        lines.append(_goal(f"batch {batch}", wanted, ours, "ms", at_least=False))
        ratio = None if ours is None or best is None else best["median_ms"] / ours
        lines.append(_goal(f"batch {batch}, over the best peer", BEST_PEER_RATIO, ratio, "x", at_least=True))
    if name == ONNXRUNTIME_GOAL[0]:
        _, batch, wanted = ONNXRUNTIME_GOAL
        reached = found.get(("accelkit-onnxruntime", batch))
        lines.append(_goal(f"accelkit onnxruntime, batch {batch}", wanted, reached, "ms", at_least=False))
    if name == "bert_tools_padded":
        for batch in _unique(b for _, b in found):
            kept, ours = found.get(("accelkit-padded", batch)), found.get((OURS, batch))
            ratio = kept / ours if kept and ours else None
            lines.append(_goal(f"batch {batch}, over padding kept", PADDING_GOAL, ratio, "x", at_least=True))
    return Table("Goals, fp16", ["goal", "wanted", "measured", "met"], lines)


def failures(result: Row) -> Table:
    """Candidates that were not measured, with the reason; equal ones of several batch sizes are one line."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        if row["failure"]:
            key = (label(result, row), row["precision"], row["failure"])
            found.setdefault(key, []).append(str(row["batch"]))
    rows = [[who, precision, ", ".join(batches), why] for (who, precision, why), batches in found.items()]
    return Table("Not measured", ["candidate", "precision", "batch", "reason"], rows)


def ceilings(result: Row) -> str:
    """The ceilings in a sentence; of several processes, the least and the most."""
    found = [one["ceilings"] for one in result.get("sets", {}).values() if "ceilings" in one] or [result["ceilings"]]
    precisions = _unique(p for one in found for p in one["tflops"])
    rates = [f"{p} {_range([one['tflops'][p] for one in found if p in one['tflops']], '.0f')}" for p in precisions]
    size = " x ".join([str(found[0]["size"])] * 3)
    copies = _range([one["copy_tb_s"] for one in found], ".2f")
    return f"Ceilings of this run: {', '.join(rates)} TFLOP/s (products of {size}), copy {copies} TB/s."


def _range(values: Sequence[float], style: str) -> str:
    low, high = format(min(values), style), format(max(values), style)
    return low if low == high else f"{low} to {high}"


def label(result: Row, row: Row) -> str:
    return str(result["labels"][row["candidate"]])


def ms(value: float | None) -> str | None:
    """Milliseconds with three significant digits."""
    if value is None:
        return None
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def worst_error(rows: Iterable[Row]) -> float | None:
    return max((r["error"] for r in rows if r.get("error") is not None), default=None)


def _goal(what: str, wanted: float, found: float | None, unit: str, *, at_least: bool) -> list[Any]:
    met = found is not None and (found >= wanted if at_least else found <= wanted)
    shown = None if found is None else f"{ms(found)} {unit}"
    return [what, f"{'at least' if at_least else 'at most'} {wanted:g} {unit}", shown, "yes" if met else "no"]


def _over_fp32(result: Row, batch: int, precision: str, candidate: str) -> float | None:
    found = {(r["candidate"], r["precision"]): r["median_ms"] for r in measured(result) if r["batch"] == batch}
    plain, own = found.get(("eager", "fp32")), found.get((candidate, precision))
    return plain / own if plain and own else None


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _median(row: Row | None) -> float | None:
    return None if row is None else float(row["median_ms"])


def _times(slow: Row | None, fast: Row | None) -> str | None:
    return f"{slow['median_ms'] / fast['median_ms']:.2f}x" if slow and fast else None


def _share(row: Row | None) -> str | None:
    return f"{100 * row['share_of_floor']:.0f} %" if row and row.get("share_of_floor") is not None else None


def _spread(row: Row | None) -> str | None:
    return None if row is None else f"{ms(row['median_ms'])} ({ms(row['low_ms'])} to {ms(row['high_ms'])})"


def _iqr(row: Row) -> str | None:
    if "iqr_ms" in row:
        return ms(row["iqr_ms"])
    return ms(row["high_ms"] - row["low_ms"]) if "high_ms" in row else None


def _mib(row: Row) -> str | None:
    if "memory_mib" in row:
        return f"{row['memory_mib']:.0f}"
    return f"{row['memory_bytes'] / MIB:.0f}" if row.get("memory_bytes") is not None else None
