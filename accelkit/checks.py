"""The proof that goes into the report: error against float64, and time beside the original model.

captured program in float64 = truth;  the original model in the precision asked for = yardstick;  compiled = what is judged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from accelkit import graph as graphs
from accelkit.accuracy import OutputError, check_outputs, reference_outputs, relative_error
from accelkit.capture import Program
from accelkit.changed_meaning import follow
from accelkit.errors import AccuracyError, warn
from accelkit.lowering import EngineStore, Lowered
from accelkit.measure import Timing, interleaved
from accelkit.pass_api import OpenResult
from accelkit.pass_runner import PassRecord
from accelkit.precision import FP32, Precision
from accelkit.quantization.emulation import NOISY, Emulation, LayerNoise, layer_noise, outputs_of
from accelkit.twin import clone_inputs, preserved
from accelkit.yardstick import Yardstick, first_line, original_call, output_name

TIMING_SECONDS = 1.0
"""Time spent on measuring a variant beside the original; at least two rounds are made however long they take."""


@dataclass
class Checked:
    """What was found: each output's error, the timings, the example's inputs and results, int8 layers' noise, and notes for
    the report."""

    accuracy: list[OutputError] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)
    samples: tuple[tuple[torch.Tensor, ...], tuple[Any, ...]] = ((), ())
    layers: list[LayerNoise] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check(
    program: Program,
    graph: fx.GraphModule,
    lowered: Lowered,
    model: nn.Module | None,
    precision: Precision,
    tolerance: float | None,
    store: EngineStore,
    ledger: Sequence[PassRecord] = (),
    yardstick: Yardstick | None = None,
) -> Checked:
    """Run the compiled graph on the example, judge it, and time it beside the original.

    Args:
        program: as captured.
        graph: after the passes.
        model: the original (its twin), or None where only the program is at hand.
        store: remembers what was found for these very weights, inputs and engines.
        ledger: of the passes: where outputs are not compared, and what is computed by design, as they declared.
        yardstick: of the same program, model and precision, where it was used before.

    Raises:
        AccuracyError: an output is further from float64 than allowed.
    """
    checked = Checked()
    yardstick = yardstick or Yardstick(program, model, precision)
    original, owners = yardstick.original, yardstick.owners
    try:
        with preserved(*owners), torch.no_grad():
            results = tuple(lowered.call(*clone_inputs(program.inputs)))
    except Exception:
        run_original(program, model)
        raise
    checked.samples = (program.inputs, _apart(results, program))
    random = [n.name for n in graph.graph.nodes if graphs.is_random(n)]
    if not random:
        for emulation in (r.emulation for r in ledger if r.emulation is not None):
            with preserved(*owners):
                checked.layers += layer_noise(emulation, program.inputs)
    remembered = store.recall(program, lowered, tolerance, results) if not random else None
    if remembered is not None:
        checked.accuracy, checked.timings, checked.notes = remembered
        return checked
    if random:
        checked.notes.append(f"not compared with float64: the model is random by itself ({', '.join(random[:3])})")
    else:
        _judge(checked, yardstick, results, tolerance, ledger)
    with preserved(*owners), torch.no_grad():
        inputs = clone_inputs(program.inputs)
        device = inputs[0].device if inputs else torch.device("cpu")
        checked.timings = interleaved(
            {"original": original, "compiled": lambda: lowered.call(*inputs)},
            seconds=TIMING_SECONDS, min_rounds=2, warmup=0 if not random else 1, max_rounds=50, device=device,
        )  # fmt: skip
    if not random:
        store.remember(program, lowered, tolerance, (checked.accuracy, checked.timings, checked.notes))
    return checked


def _judge(
    checked: Checked,
    yardstick: Yardstick,
    results: Sequence[Any],
    tolerance: float | None,
    ledger: Sequence[PassRecord],
) -> None:
    program, model, precision = yardstick.program, yardstick.model, yardstick.precision
    names, own = yardstick.names, yardstick.own
    changes = [record.meaning for record in ledger if record.meaning is not None]
    owners = yardstick.owners
    plain = yardstick.plain
    checked.notes += yardstick.notes
    try:
        reference = yardstick.reference
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if plain is None:
            checked.notes.append(f"not compared: an operator has no float64 form ({first_line(error)})")
            return
        if changes:
            checked.notes.append(
                f"not compared: the model is changed on request, and an operator has no float64 form ({first_line(error)})"
            )
            return
        checked.notes.append(
            f"compared with plain PyTorch, since an operator has no float64 form ({first_line(error)})"
        )
        reference = plain
    if model is not None and tolerance is None and any(map(_far, own, reference)):
        _require_same_program(program, own, names, owners)
    _tell_non_finite(checked.notes, program, reference)
    for emulation in (r.emulation for r in ledger if r.emulation is not None):
        with preserved(*owners):
            plain = _emulated(emulation, program, reference, own, names, tolerance, checked.notes)
    for change in changes:
        reference, plain, note = follow(change, program.inputs, reference, plain, names, precision, tolerance)
        checked.notes.append(note)
    for one in (one for record in ledger for one in record.open):
        kept = _where_kept(one, program)
        results, reference = (_only(kept, one.output, values) for values in (results, reference))
        plain = None if plain is None else _only(kept, one.output, plain)
        checked.notes.append(
            f"{names[one.output]}: compared at {int(kept.sum())} of {kept.numel()} positions, the others are no results "
            f"({one.reason})"
        )
    checked.accuracy = check_outputs(results, reference, plain, names, precision, tolerance)
    wrong = [o for o in checked.accuracy if not o.ok]
    if wrong:
        listed = "; ".join(
            f"{o.name} is off by {o.error:.2e} (allowed {o.allowed:.2e}, plain PyTorch {_shown(o)})" for o in wrong
        )
        raise AccuracyError(
            f"the compiled model is further from float64 than allowed: {listed}. Use a wider precision, keep the operators that "
            "need it in fp32, or allow more with tolerance=..."
        )


def _emulated(
    emulation: Emulation,
    program: Program,
    reference: Sequence[Any],
    own: Sequence[Any],
    names: Sequence[str],
    tolerance: float | None,
    notes: list[str],
) -> Sequence[Any]:
    """The quantised graph's outputs in plain PyTorch, once what they were made from is proved to be the model."""
    before = reference_outputs(emulation.before, program.inputs)
    if wrong := [o for o in check_outputs(before, reference, own, names, FP32, tolerance) if not o.ok]:
        listed = ", ".join(f"{o.name} is off by {o.error:.2e} (allowed {o.allowed:.2e})" for o in wrong)
        raise AccuracyError(f"the passes before {emulation.by} compute something else than the model: {listed}")
    emulated = outputs_of(emulation.after, program.inputs)
    pairs = zip(names, emulated, reference, strict=True)
    errors = {name: relative_error(e, r) for name, e, r in pairs if isinstance(e, torch.Tensor)}
    listed = ", ".join(f"{name} {error:.2e}" for name, error in errors.items())
    notes.append(f"quantised in plain PyTorch, which the target is held to: error against float64 {listed}")
    worst = max(errors.values(), default=0.0)
    advice = (
        "give more calibration data, another calibrator (MSE(), Entropy()) or scheme (ft1, qdq), or keep=(...) the layers that "
        "the report shows with the least signal-to-noise ratios"
    )
    if tolerance is None and worst >= 1.0:
        raise AccuracyError(f"quantised, the model's results are worse than zeros (relative error {listed}): {advice}")
    if worst >= NOISY:
        warn(f"quantised, the model's results are off by {listed}: {advice}")
    return emulated


def _where_kept(one: OpenResult, program: Program) -> torch.Tensor:
    with torch.no_grad():
        return one.kept(*clone_inputs(program.inputs))


def _only(kept: torch.Tensor, output: int, values: Sequence[Any]) -> list[Any]:
    """The outputs, one of them with zeros where it is not to be compared."""
    value = values[output]
    shape = (*kept.shape, *(1 for _ in value.shape[kept.dim() :]))
    zeroed = torch.where(kept.reshape(shape).to(value.device), value, value.new_zeros(()))
    return [*values[:output], zeroed, *values[output + 1 :]]


_SAME_PROGRAM = 1e-2
"""Largest relative difference between the model and its captured program: the same kernels run in the same dtypes."""


def _far(own: Any, reference: Any) -> bool:
    floats = isinstance(own, torch.Tensor) and isinstance(reference, torch.Tensor) and own.is_floating_point()
    return floats and relative_error(own, reference) > _SAME_PROGRAM


def _require_same_program(
    program: Program, plain: Sequence[Any], names: list[str], owners: tuple[nn.Module, ...]
) -> None:
    with preserved(*owners), torch.no_grad():
        captured = program.graph(*clone_inputs(program.inputs))
    for name, ours, own in zip(names, captured, plain, strict=True):
        if _far(own, ours):
            raise AccuracyError(
                f"the captured program computes {name} other than the model itself (relative difference "
                f"{relative_error(ours, own):.2e}), before any pass: the model depends on something that capture cannot see. "
                "tolerance=... switches this comparison off"
            )


def run_original(program: Program, model: nn.Module | None) -> None:
    """Run the original on the example: an exception of the model's own is the one to see, not what a backend makes of it."""
    owners = (program.graph,) if model is None else (program.graph, model)
    with preserved(*owners), torch.no_grad():
        original_call(program, model)()


def _apart(results: Sequence[Any], program: Program) -> tuple[Any, ...]:
    # an output that is a weight would change with it
    weights = {t.untyped_storage()._cdata for _, t in graphs.tensor_attributes(program.graph)}
    return tuple(
        r.clone() if isinstance(r, torch.Tensor) and r.untyped_storage()._cdata in weights else r for r in results
    )


def _shown(output: OutputError) -> str:
    return "unknown" if output.yardstick is None else f"{output.yardstick:.2e}"


def _tell_non_finite(notes: list[str], program: Program, reference: Sequence[Any]) -> None:
    bad = [
        i
        for i, r in enumerate(reference)
        if isinstance(r, torch.Tensor) and r.is_floating_point() and not r.isfinite().all()
    ]
    if not bad:
        return
    weights = [
        str(node.target)
        for node, tensor in graphs.tensor_attributes(program.graph)
        if tensor.is_floating_point() and bool(tensor.isnan().any())
    ]
    cause = f"; NaN in the weights {', '.join(weights[:5])}" if weights else ""
    where = ", ".join(output_name(program, i) for i in bad)
    text = f"the original model itself gives NaN or infinity in {where}{cause}"
    notes.append(text)
    warn(text)
