"""accelkit's goals on a CPU, measured: each with what was wanted, what came out, and whether it was met.

    python benchmarks/cpu_goals.py               # all of them, on a machine that does nothing else (about ten minutes)
    python benchmarks/cpu_goals.py --only call,import
    python benchmarks/cpu_goals.py --quick       # does it work? Small models, few rounds, nothing recorded

Writes benchmarks/results/<machine>/cpu_goals.json. Each part runs in processes of its own, by `--part`, so that neither
memory nor caches of one reach another; what is compared in one process is timed in interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpu_parts import PARTS

RESULTS = Path(__file__).resolve().parent / "results"
BERT, VIT = "bert-base-128", "vit-b16-224"
QUICK = {BERT: "encoder-block", VIT: "encoder-block"}
GROUPS = ("speed", "call", "import", "build", "memory")
PLAIN, BY_HAND = "PyTorch fp32", "ONNX Runtime by hand fp32"


@dataclass
class Goal:
    """One figure.

    Attributes:
        name: what is measured.
        wanted: the bound, in `unit`; a lower one where `at_least`, else an upper one.
        measured: what came out; None where it could not be measured, with the reason in `details`.
        details: the numbers that it was made from.
    """

    name: str
    wanted: float
    unit: str
    at_least: bool
    measured: float | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}

    def cells(self) -> list[Any]:
        wanted = f"{'at least' if self.at_least else 'at most'} {self.wanted:g} {self.unit}"
        measured = None if self.measured is None else f"{self.measured:.3g} {self.unit}"
        return [self.name, wanted, measured, "yes" if self.met else "no"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.part:
        print(json.dumps(PARTS[options.part](options.model, options.seconds)))
        return 0
    runner = Runner(options.quick)
    goals: list[Goal] = []
    for group in GROUPS:
        if group in options.only:
            goals += getattr(runner, f"{group}_goals")()
    # What the parent imports comes after its measurements: it holds no memory while they run.
    from accelkit.measure import write_results

    columns = ["goal", "wanted", "measured", "met"]
    table = {"columns": columns, "rows": [goal.cells() for goal in goals]}
    folder = options.output or (Path(tempfile.mkdtemp(prefix="accelkit-quick-")) if options.quick else RESULTS)
    facts: dict[str, Any] = {
        "packages": ("onnx", "onnxscript", "onnxruntime", "openvino", "transformers"),
        "quick": options.quick,
    }
    if not options.quick and set(options.only) == set(GROUPS):  # a file with a table is shown in the README
        facts |= {"title": "Goals on a CPU", "table": table}
    path = write_results("cpu_goals", [goal.to_json() for goal in goals], folder, **facts)
    for row in [columns, *table["rows"]]:
        print(f"{row[0]:<72} {row[1]:<22} {row[2] or '-':<12} {row[3]}")
    print(f"wrote {path}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}; with fewer than all the README shows none"
    )
    parser.add_argument(
        "--output", type=Path, help="results folder (default: benchmarks/results; a temporary one with --quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small models and few rounds, for a look whether all works"
    )
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--model", default=BERT, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(GROUPS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}")
    return options


class Runner:
    """Runs the parts in fresh processes and makes goals of what they print."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rounds = 1 if quick else 5
        self.seconds = 2.0 if quick else 60.0

    def name(self, model: str) -> str:
        """The model that stands for `model` in this run."""
        return QUICK[model] if self.quick else model

    def part(self, name: str, model: str = BERT, cache: str | None = None) -> dict[str, Any]:
        """One part in a process of its own; without `cache`, with a cache folder of its own."""
        with tempfile.TemporaryDirectory(prefix="accelkit-goals-") as folder:
            environment = os.environ | {
                "ACCELKIT_CACHE_DIR": cache or folder,
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            }
            command = [sys.executable, __file__, "--part", name, "--model", self.name(model)]
            command += ["--seconds", str(self.seconds)]
            print(f"{name} {model}", file=sys.stderr, flush=True)
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            return {"failure": f"{name} {model}: exit code {done.returncode}"}
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def speed_goals(self) -> list[Goal]:
        """Latency at batch 1, over PyTorch and over a session written by hand."""
        goals = []
        for model, over_plain, over_half in ((BERT, 1.85, 3.8), (VIT, 1.9, 3.6)):
            found = self.part("speed", model)
            name = self.name(model)
            wanted = [
                ("accelkit onnxruntime fp32", PLAIN, over_plain),
                ("accelkit onnxruntime fp32", BY_HAND, 0.98),
                ("accelkit inductor bf16", PLAIN, over_half),
            ]
            goals += [
                Goal(f"{name}, batch 1: {tool} over {other}", factor, "x", True, _ratio(found, other, tool), found)
                for tool, other, factor in wanted
            ]
        return goals

    def call_goals(self) -> list[Goal]:
        """What a CompiledModel adds to its engine, by the form of the call."""
        found = self.part("call")
        forms = found.get("forms", {})
        names = ("positional tensor", "keyword tensors", "dict output")
        return [
            Goal(
                f"CompiledModel over the raw engine, one linear layer, {name}", 30.0, "us", False,
                forms[name]["added_us"] if name in forms else None, forms.get(name, found),
            )
            for name in names
        ]  # fmt: skip

    def import_goals(self) -> list[Goal]:
        """`import accelkit` after `import torch`."""
        self.part("import")  # compiles the .pyc files and warms the file cache
        runs = [self.part("import") for _ in range(2 if self.quick else 9)]
        seconds = [run["accelkit_s"] for run in runs if "accelkit_s" in run]
        measured = statistics.median(seconds) if len(seconds) == len(runs) else None
        return [Goal("import accelkit, after import torch", 0.3, "s", False, measured, {"runs": runs})]

    def build_goals(self) -> list[Goal]:
        """optimize() for onnxruntime against export and session by hand, and its second run."""
        by_hand, first, same_process, new_process = [], [], [], []
        for _ in range(self.rounds):  # interleaved, as all that is compared
            with tempfile.TemporaryDirectory(prefix="accelkit-goals-cache-") as cache:
                by_hand.append(self.part("build_by_hand"))
                run = self.part("build", cache=cache)
                first.append(run)
                same_process.append(run)
                new_process.append(self.part("build", cache=cache))
        hand_s, first_s = _median(by_hand, "first_s"), _median(first, "first_s")
        ratio = first_s / hand_s if first_s is not None and hand_s else None
        details = {"by_hand": by_hand, "optimize": first, "optimize_from_cache": new_process}
        what = f"optimize() of {self.name(BERT)} for onnxruntime"
        second = f"{what} from the cache"
        return [
            Goal(f"{what}, checks included, over export and session by hand", 1.3, "x", False, ratio, details),
            Goal(
                f"{second}, same process", 1.5, "s", False, _median(same_process, "second_s"), {"see": "the row above"}
            ),
            Goal(f"{second}, new process", 1.5, "s", False, _median(new_process, "first_s"), {"see": "the row above"}),
        ]

    def memory_goals(self) -> list[Goal]:
        """Peak of optimize(), the model's own weights included."""
        found, by_hand = self.part("memory"), self.part("memory_by_hand")
        details = {"optimize": found, "by_hand": by_hand}
        what = f"peak memory of optimize() of {self.name(BERT)} for onnxruntime, over the weights' bytes"
        return [Goal(what, 3.0, "x", False, found.get("factor"), details)]


def _ratio(found: dict[str, Any], other: str, tool: str) -> float | None:
    timings = found.get("timings", {})
    if not {other, tool} <= set(timings):
        return None
    return float(timings[other]["median_ms"] / timings[tool]["median_ms"])


def _median(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if key in run]
    return statistics.median(values) if values and len(values) == len(runs) else None


if __name__ == "__main__":
    sys.exit(main())
