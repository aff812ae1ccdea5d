"""What each kernel takes on the shapes of the benchmarked models, beside cuBLAS, cuDNN and the rule that picks without tuning.

    python benchmarks/kernel_choices.py            all problems of the models below, fp16; about a minute on a GPU

Each candidate is checked against float64, then timed in CUDA graphs in interleaved rounds (accelkit.tuning). The rules in
accelkit/kernels and accelkit/ops/attention_choice.py follow the results file that this writes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import parts
import torch

from accelkit.backends.fastertransformer.tune import GraphTimer, tasks_of_model
from accelkit.measure import write_results
from accelkit.models import load_model
from accelkit.precision import as_precision
from accelkit.tuning.tuner import shown, tune

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {"vit-b16-384": (1, 8, 32), "bert-base-128": (1, 8, 64), "encoder-block": (1, 8, 64, 512)}
PEERS = ("cublas", "cudnn", "flash", "efficient")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds of tuning")
    parts.add_options(parser)
    options = parser.parse_args()
    os.environ["ACCELKIT_CACHE_DIR"] = tempfile.mkdtemp(prefix="accelkit-choices-")  # nothing is known beforehand
    tasks, users = [], defaultdict(set)
    for name, batches in MODELS.items():
        for batch in batches:
            model, inputs = load_model(name, batch)
            assert inputs is not None
            moved = [t.cuda() for t in (inputs.values() if isinstance(inputs, dict) else inputs)]
            given: Any = dict(zip(inputs, moved, strict=True)) if isinstance(inputs, dict) else tuple(moved)
            found = tasks_of_model(model.cuda(), given, as_precision("fp16"))
            tasks += found
            for task in found:
                users[task.key()].add(f"{name} {batch}")
    outcome = tune(tasks, GraphTimer(torch.device("cuda", 0)), seconds=options.budget, again=True)
    rows = []
    for result in sorted(outcome.results, key=lambda r: str(r.task)):
        times = {shown(config): ms * 1e3 for config, ms in result.times_ms.items()}
        rows.append({
            "problem": str(result.task), "models": sorted(users[result.task.key()]), "rule": shown(result.default),
            "rule_us": (result.default_ms or float("nan")) * 1e3, "fastest": shown(result.choice),
            "fastest_us": result.choice_ms * 1e3, "times_us": times,
            "wrong": {shown(c): why for c, why in result.wrong.items()},
            "failed": {shown(c): why for c, why in result.failed.items()},
        })  # fmt: skip
    peers = [[min((t for n, t in r["times_us"].items() if n.startswith(p)), default=None) for p in PEERS] for r in rows]
    table = {
        "columns": ["problem", "by rule, us", "fastest, us", "fastest", *(f"{p}, us" for p in PEERS)],
        "rows": [
            [r["problem"], f"{r['rule_us']:.1f}", f"{r['fastest_us']:.1f}", r["fastest"], *(f"{t:.1f}" if t else "" for t in p)]
            for r, p in zip(rows, peers, strict=True)
        ],
    }  # fmt: skip
    path = write_results(
        parts.file_name("kernel_choices", options), rows, options.output, title="Kernels by shape, fp16", table=table,
        left=outcome.left, packages=("triton",), **parts.facts(options),
    )  # fmt: skip
    print(f"{len(rows)} problems, {len(outcome.left)} left; wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
