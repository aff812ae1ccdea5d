"""Tables of TensorRT's candidates, made from results files alone: accelkit's engines beside those built by hand.

engines(result)     of a table's results file: a line a batch size and precision, with the goals
builds(result)      of tensorrt_build.json: what building, caching, calling and refitting cost, with the goals
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_tables import MIB, Row, Table, ms

OURS = "accelkit-tensorrt"
TORCHSCRIPT, DYNAMO = "tensorrt-torchscript", "tensorrt-dynamo"
FASTER_GOAL = {("fastertransformer_vit_b16_384", 32, "fp16"): 0.9}
"""Where being no slower is not enough: results file, batch, precision -> at most so many times the better one's time."""
ERROR_GOAL = 2.0
"""fp16: at most so many times plain PyTorch's error in fp16."""
OWN_SHARE_GOAL = 0.10
"""accelkit's own time around a build, of TensorRT's."""
TIMING_CACHE_GOAL = 3.0
"""A build with a warm timing cache: so many times faster than a cold one."""
OVERHEAD_GOAL_US = 30.0


def engines(result: Row) -> Table:
    """Ours beside the exports built by hand, in the same run."""
    columns = [
        "precision", "batch", "PyTorch, ms", "TorchScript export, ms", "dynamo export, ms", "accelkit, ms",
        "over the better", "goal", "reached", "error over PyTorch's", "reached", "build by hand, s", "accelkit's build, s",
        "engine by hand, MiB", "accelkit's, MiB",
    ]  # fmt: skip
    lines = []
    rows = [r for r in result["rows"] if r["candidate"].startswith(("tensorrt", OURS, "eager"))]
    if not any(r["candidate"].startswith(("tensorrt", OURS)) and r["failure"] is None for r in rows):
        return Table("TensorRT", columns, [])
    order = ["fp16", "bf16", "tf32", "fp32"]
    for precision, batch in sorted(
        {(r["precision"], r["batch"]) for r in rows}, key=lambda k: (order.index(k[0]), k[1])
    ):
        own = {r["candidate"]: r for r in rows if (r["precision"], r["batch"]) == (precision, batch)}
        if not any(key.startswith(("tensorrt", OURS)) for key in own):
            continue
        found = {key: r for key, r in own.items() if "median_ms" in r}
        ours, plain = found.get(OURS), found.get("eager")
        script, dynamo = (_best(found, kind) for kind in (TORCHSCRIPT, DYNAMO))
        better = min((r for r in (script, dynamo) if r), key=lambda r: float(r["median_ms"]), default=None)
        share = FASTER_GOAL.get((result["name"], batch, precision), 1.0)
        error = ours["error"] / plain["error"] if ours and plain and plain.get("error") else None
        lines.append([
            precision, batch, _median(plain), _median(script), _median(dynamo), _median(ours),
            f"{better['median_ms'] / ours['median_ms']:.2f}x" if ours and better else None,
            "no slower" if share == 1.0 else f"at least {1 - share:.0%} faster", _reached(ours, better, share),
            None if error is None else f"{error:.2f}", _error_reached(error, precision, ours),
            _seconds(script), _seconds(ours), _mib(script), _mib(ours),
        ])  # fmt: skip
    notes = [
        "By hand: the faster of the exports of the float32 model with the builder's flags and of the fp16 model, where both "
        "were measured, without a CUDA graph. No slower: beyond the spread of the two. Build seconds are TensorRT's "
        "and the export's; accelkit's are all of `optimize()`."
    ]
    return Table("TensorRT: accelkit beside engines built by hand in the same run", columns, lines, notes)


def _best(found: dict[str, Row], kind: str) -> Row | None:
    """The faster way to build this export by hand."""
    ways = [r for key, r in found.items() if key in (kind, f"{kind}-half")]
    return min(ways, key=lambda r: float(r["median_ms"]), default=None)


def _reached(ours: Row | None, better: Row | None, share: float) -> str | None:
    if better is None:
        return None
    if ours is None:
        return "no"
    spread = max(r["high_ms"] - r["low_ms"] for r in (ours, better)) if share == 1.0 else 0.0
    return "yes" if ours["median_ms"] - share * better["median_ms"] <= spread else "no"


def _error_reached(error: float | None, precision: str, ours: Row | None) -> str | None:
    if precision != "fp16":
        return None
    return "yes" if ours and error is not None and error <= ERROR_GOAL else "no"


def _median(row: Row | None) -> str | None:
    return None if row is None else ms(row["median_ms"])


def _seconds(row: Row | None) -> str | None:
    if row is None or "seconds" not in row:
        return None
    seconds = row["seconds"]
    return f"{seconds.get('optimize', sum(seconds.values())):.0f}"


def _mib(row: Row | None) -> str | None:
    return f"{row['engine_bytes'] / MIB:.0f}" if row and row.get("engine_bytes") else None


# --- builds


def builds(result: Row) -> list[Table]:
    """Tables of tensorrt_build.json; those without a line are left out."""
    rows = sorted(result["rows"], key=lambda r: (r["model"], r["batch"], r["precision"]))
    made = [_times(rows), _sizes(rows), _calls(rows), _refits(rows), _missing(rows)]
    return [table for table in made if table.rows]


def _times(rows: Sequence[Row]) -> Table:
    columns = [
        "model", "batch", "precision", "TensorRT, s", "accelkit's own, s", "own share", "at most 10 %",
        "TensorRT, warm timing cache, s", "times faster", "at least 3", "from the engine cache, s",
        "by hand, s", "by hand, warm timing cache, s",
    ]  # fmt: skip
    lines = []
    for row in rows:
        cold, warm, cached, hand = (row.get(step) for step in ("cold", "warm", "cached", "by_hand"))
        if cold is None:
            continue
        inside, own = cold["seconds"]["tensorrt"], cold["seconds"]["own"]
        share = own / inside if inside else None
        gain = inside / warm["seconds"]["tensorrt"] if warm and warm["seconds"]["tensorrt"] else None
        lines.append([
            *_key(row), _s(inside), _s(own), None if share is None else f"{share:.0%}",
            _yes(share, share is not None and share <= OWN_SHARE_GOAL), _s(warm and warm["seconds"]["tensorrt"]),
            None if gain is None else f"{gain:.1f}x", _yes(gain, gain is not None and gain >= TIMING_CACHE_GOAL),
            _s(cached and cached["seconds"]["optimize"]),
            _s(hand and sum(hand["cold_seconds"].values())), _s(hand and sum(hand["warm_seconds"].values())),
        ])  # fmt: skip
    notes = [
        "With a warm timing cache the model has other weights, and the build process is that of the cold build. By hand: parse "
        "and build of the TorchScript export."
    ]
    return Table("Build", columns, lines, notes)


def _sizes(rows: Sequence[Row]) -> Table:
    columns = ["model", "batch", "precision", "engine, MiB", "activations, MiB", "GPU memory taken, MiB",
               "engine by hand, MiB"]  # fmt: skip
    lines = []
    for row in rows:
        cold, cached, call, hand = (row.get(step) for step in ("cold", "cached", "overhead", "by_hand"))
        if cold is not None:
            found = (cold.get("engine_bytes"), call and call.get("device_memory_bytes"), cached and cached.get("memory_bytes"),
                     hand and hand.get("engine_bytes"))  # fmt: skip
            lines.append([*_key(row), *(None if n is None else f"{n / MIB:.1f}" for n in found)])
    return Table("Size and memory", columns, lines)


def _calls(rows: Sequence[Row]) -> Table:
    columns = ["model", "batch", "precision", "CUDA graph", "execute_async_v3, us", "accelkit, us", "overhead, us",
               "at most 30 us"]  # fmt: skip
    lines = []
    for row in rows:
        for step, words in (("overhead", "yes"), ("plain", "no")):
            if (found := row.get(step)) is not None:
                extra = found["overhead_us"]
                lines.append([
                    *_key(row), words, f"{found['raw_us']:.1f}", f"{found['accelkit_us']:.1f}", f"{extra:.1f}",
                    _yes(extra, extra <= OVERHEAD_GOAL_US),
                ])  # fmt: skip
    notes = ["Medians of the host's time in a call while the GPU is idle, the two taken in turn."]
    return Table("A call, on the host", columns, lines, notes)


def _refits(rows: Sequence[Row]) -> Table:
    columns = ["model", "batch", "precision", "refit, s", "TensorRT's build, s", "error over PyTorch's afterwards"]
    lines = []
    for row in rows:
        if (found := row.get("refit")) is not None:
            over = found["error"] / found["plain_error"] if found["plain_error"] else None
            shown = None if over is None else f"{over:.2f}"
            lines.append([*_key(row), f"{found['refit_seconds']:.2f}", _s(found["built"]["tensorrt"]), shown])
    return Table("Other weights for a refittable engine", columns, lines)


def _missing(rows: Sequence[Row]) -> Table:
    lines = [[*_key(row), step, why] for row in rows for step, why in row["failures"].items()]
    return Table("Not measured", ["model", "batch", "precision", "step", "reason"], lines)


def _key(row: Row) -> list[Any]:
    return [row["model"], row["batch"], row["precision"]]


def _s(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _yes(value: float | None, met: bool) -> str | None:
    return None if value is None else ("yes" if met else "no")
