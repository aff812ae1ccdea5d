"""What `optimize()` did, as data, text and JSON: captured, rewritten, refused and why, lowered where, how wrong, how fast.

`print(fast.report())` shows it; `fast.report().to_json()` is the same for machines. docs/reading-the-report.md explains the lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelkit.accuracy import OutputError
from accelkit.backend_api import EngineFacts
from accelkit.measure import Timing
from accelkit.pass_api import Refusal
from accelkit.pass_runner import PassRecord
from accelkit.quantization.emulation import LayerNoise

if TYPE_CHECKING:
    from accelkit.floor import Floor

_SHOWN_REFUSALS = 8
_SHOWN_LAYERS = 5


@dataclass
class PieceReport:
    """One compiled piece: operators in it, where the engine came from, and what it says it is."""

    operators: int
    origin: str
    facts: EngineFacts

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self.facts)
        return {"operators": self.operators, "origin": self.origin, **facts}


@dataclass
class VariantReport:
    """One built variant: the shapes it serves and all that was found while building it.

    Attributes:
        label: the bucket (`batch=8`), or `as captured`.
        inputs: the covered inputs in words.
        capture_operators: operators captured, before any pass.
        ledger: one record a pass, fx and ONNX alike.
        pieces: what runs in engines.
        torch_operators: operators that run in PyTorch.
        refusals: which, and why.
        layers: of an int8 build, each quantised layer's signal-to-noise ratio in the emulation, all earlier ones quantised.
        accuracy: each output's error against float64; empty where it could not be checked (see notes).
        timings: `original` and `compiled`, interleaved.
        floor: the least time that this machine could take for the captured program (accelkit.floor); None where the rate of
            the precision was not measured, or the program's work is not known (see notes).
        seconds: build time by stage.
        peak_memory_bytes: highest resident memory while building, beyond what was resident before.
        notes: whatever else the user should know.
    """

    label: str
    inputs: str = ""
    capture_operators: int = 0
    ledger: list[PassRecord] = field(default_factory=list)
    pieces: list[PieceReport] = field(default_factory=list)
    torch_operators: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    layers: list[LayerNoise] = field(default_factory=list)
    accuracy: list[OutputError] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)
    floor: Floor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the original model, by medians; None where it was not measured."""
        if not {"original", "compiled"} <= set(self.timings):
            return None
        return self.timings["original"].median_ms / self.timings["compiled"].median_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "inputs": self.inputs,
            "capture_operators": self.capture_operators,
            "ledger": [r.to_json() for r in self.ledger],
            "pieces": [p.to_json() for p in self.pieces],
            "torch_operators": self.torch_operators,
            "refusals": [asdict(r) for r in self.refusals],
            "layers": [asdict(layer) for layer in self.layers],
            "accuracy": [a.to_json() for a in self.accuracy],
            "timings": {k: t.to_json() for k, t in self.timings.items()},
            "speedup": self.speedup,
            "floor": None if self.floor is None else self.floor.to_json(),
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "notes": list(self.notes),
        }


@dataclass
class Report:
    """The whole story of one `optimize()` call.

    Attributes:
        model: the model's class name.
        target: the backend with its options.
        precision: what floating-point values have inside.
        variants: one entry a built bucket (or a captured piece, where torch.export refused the model).
        breaks: where torch.export and torch.compile's front end could not follow the model, and why.
        padding: what happens to a batch between two buckets, and why; empty where there are no buckets of batch sizes.
    """

    model: str
    target: str
    precision: str
    variants: list[VariantReport] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    padding: str = ""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "model": self.model,
            "target": self.target,
            "precision": self.precision,
            "breaks": list(self.breaks),
            "padding": self.padding,
            "variants": [v.to_json() for v in self.variants],
        }

    def save(self, path: str | Path) -> None:
        """Write the report: JSON for a name that ends in .json, text for any other."""
        path = Path(path)
        content = json.dumps(self.to_json(), indent=1) if path.suffix == ".json" else str(self)
        path.write_text(content + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"{self.model} -> {self.target}, {self.precision}"]
        for text in self.breaks:
            lines.append(f"  not captured: {text}")
        if self.padding:
            lines.append(f"  padding: {self.padding}")
        if not self.variants:
            lines.append("  not built yet: the first call is the example")
        for variant in self.variants:
            lines += _variant_lines(variant)
        return "\n".join(lines)

    __repr__ = __str__


def _variant_lines(variant: VariantReport) -> Iterable[str]:
    yield f"[{variant.label}] {variant.inputs}"
    yield f"  captured   {variant.capture_operators} operators"
    if variant.ledger:
        yield "  passes     rewrites  refused  operators      time"
    for record in variant.ledger:
        counts = f"{len(record.rewrites):8d}  {len(record.refusals):7d}  {record.nodes_before:5d} -> {record.nodes_after:<5d}"
        yield f"    {record.name:<42} {counts} {record.seconds * 1e3:6.0f} ms"
        yield from _refusal_lines(record.refusals, "      ")
    for piece in variant.pieces:
        yield from _piece_lines(piece)
    if variant.torch_operators or variant.refusals:
        yield f"  in PyTorch {variant.torch_operators} operators"
        yield from _refusal_lines(variant.refusals, "      ")
    yield from _layer_lines(variant.layers)
    yield from _accuracy_lines(variant.accuracy)
    if variant.timings:
        faster = f", {variant.speedup:.2f} times as fast" if variant.speedup else ""
        yield f"  latency    {'; '.join(f'{k} {t}' for k, t in variant.timings.items())}{faster}"
    if variant.floor is not None and "compiled" in variant.timings:
        yield f"  floor      {variant.floor.reached(variant.timings['compiled'].median_ms)}"
    if variant.seconds:
        total = sum(variant.seconds.values())
        yield f"  built in   {total:.2f} s ({', '.join(f'{k} {v:.2f}' for k, v in variant.seconds.items())})"
    if variant.peak_memory_bytes:
        yield f"  memory     {variant.peak_memory_bytes / 2**20:.0f} MiB more at the build's peak"
    for note in variant.notes:
        yield f"  note       {note}"


def _piece_lines(piece: PieceReport) -> Iterable[str]:
    facts = piece.facts
    precisions = ", ".join(f"{count} in {name}" for name, count in facts.precisions.items())
    versions = ", ".join(f"{k} {v}" for k, v in facts.versions.items())
    where = f"{facts.backend} ({piece.origin}; {versions})"
    yield f"  engine     {piece.operators} operators on {where}{': ' if precisions else ''}{precisions}"
    if facts.memory_bytes is not None:
        yield f"      holds {facts.memory_bytes / 2**20:.1f} MiB of its own"
    for note in facts.notes:
        yield f"      {note}"


def _refusal_lines(refusals: Iterable[Refusal], indent: str) -> Iterable[str]:
    by_reason: dict[str, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal.node)
    common = Counter({reason: len(nodes) for reason, nodes in by_reason.items()}).most_common()
    for reason, count in common[:_SHOWN_REFUSALS]:
        nodes = by_reason[reason]
        where = ", ".join(nodes[:3]) + (f" and {count - 3} more" if count > 3 else "")
        yield f"{indent}left alone: {where}: {reason}"
    if len(common) > _SHOWN_REFUSALS:
        yield f"{indent}... and {len(common) - _SHOWN_REFUSALS} more reasons in to_json()"


def _layer_lines(layers: list[LayerNoise]) -> Iterable[str]:
    if not layers:
        return
    worst = sorted(layers, key=lambda layer: layer.snr_db)[:_SHOWN_LAYERS]
    listed = ", ".join(f"{layer.layer} {layer.snr_db:.1f}" for layer in worst)
    yield f"  int8       {len(layers)} layers; the least signal-to-noise ratios, in dB: {listed}"


def _accuracy_lines(accuracy: list[OutputError]) -> Iterable[str]:
    for output in accuracy:
        plain = f"plain PyTorch {output.yardstick:.2e}, " if output.yardstick is not None else ""
        verdict = "" if output.ok else "  <-- MORE THAN ALLOWED"
        yield f"  error      {output.name}: {output.error:.2e} against float64 ({plain}allowed {output.allowed:.2e}){verdict}"
