"""Where engines come from: the cache on disk, else the backend; and what checking them found, remembered beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from accelkit.accuracy import OutputError
from accelkit.backend_api import Backend, CompileContext
from accelkit.capture import Program
from accelkit.errors import LoweringError, warn
from accelkit.lowering import AlwaysCompile, EngineStore, Lowered, Stored
from accelkit.measure import Timing
from accelkit.pass_api import Refusal
from accelkit.pass_runner import PassRecord

if TYPE_CHECKING:
    from accelkit.cache import EngineCache

Findings = tuple[list[OutputError], dict[str, Timing], list[str]]


def open_store(cache: bool) -> EngineStore:
    """The user's engine cache, or a store that keeps nothing."""
    if not cache:
        return AlwaysCompile()
    from accelkit.cache import EngineCache

    return CachedStore(EngineCache())


class CachedStore:
    """Engines from the cache on disk; what is not there is compiled and put there."""

    def __init__(self, cache: EngineCache) -> None:
        self.cache = cache

    def build(
        self, backend: Backend, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Stored:
        from accelkit.fingerprint import engine_key

        key = engine_key(graph, backend, context.precision, context.onnx_passes, inputs)
        with self.cache.building(key):
            blobs = self.cache.get(key)
            if blobs is not None:
                records = _read_records(blobs.pop("records.json", b"[]"))
                try:
                    engine = backend.load(blobs, graph, inputs, context)
                except LoweringError as error:
                    warn(f"a cached engine does not load, compiling anew: {error}")
                else:
                    context.records += records
                    return Stored(engine, "cache", key)
            before = len(context.records)
            engine = backend.compile(graph, inputs, context)
            blobs = engine.serialize()
            if blobs:
                records_blob = _write_records(context.records[before:])
                self.cache.put(key, {**blobs, "records.json": records_blob}, {"backend": str(backend)})
            return Stored(engine, "compiled", key)

    def recall(
        self, program: Program, lowered: Lowered, tolerance: float | None, results: Sequence[Any]
    ) -> Findings | None:
        """What an earlier check of these engines, weights and inputs found, or None."""
        key = _check_key(program, lowered, tolerance)
        blobs = self.cache.get(key) if key is not None else None
        if blobs is None or "findings.json" not in blobs:
            return None
        found = json.loads(blobs["findings.json"])
        accuracy = [OutputError(**{k: v for k, v in o.items() if k != "ok"}) for o in found["accuracy"]]
        timings = {name: Timing(**t) for name, t in found["timings"].items()}
        return (
            accuracy,
            timings,
            [*found["notes"], "checks and timings are remembered from an earlier build on this machine"],
        )

    def remember(self, program: Program, lowered: Lowered, tolerance: float | None, findings: Findings) -> None:
        """Keep what a check found for the next build of the same."""
        key = _check_key(program, lowered, tolerance)
        if key is None:
            return
        accuracy, timings, notes = findings
        content = {
            "accuracy": [o.to_json() for o in accuracy],
            "timings": {name: t.to_json() for name, t in timings.items()},
            "notes": notes,
        }
        self.cache.put(key, {"findings.json": json.dumps(content).encode()}, {"kind": "check"})


def _check_key(program: Program, lowered: Lowered, tolerance: float | None) -> str | None:
    from accelkit.fingerprint import graph_fingerprint, tensors_fingerprint, weights_fingerprint

    keys = [piece.key for piece in lowered.pieces]
    if (
        not keys
        or lowered.graph is None
        or any(piece.origin != "cache" and not piece.engine.serialize() for piece in lowered.pieces)
    ):
        return None  # engines that are compiled anew each time are checked anew each time
    parts = [
        "check",
        *keys,
        graph_fingerprint(program.graph, embeds_weights=False),
        weights_fingerprint(program.graph),
        # the passes' work too: what stays in PyTorch and what they folded is in no engine's key
        graph_fingerprint(lowered.graph, embeds_weights=False),
        weights_fingerprint(lowered.graph),
        tensors_fingerprint(program.inputs),
        repr(tolerance),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_records(records: Sequence[PassRecord]) -> bytes:
    return json.dumps([record.to_json() for record in records]).encode()


def _read_records(blob: bytes) -> list[PassRecord]:
    def record(data: dict[str, Any]) -> PassRecord:
        refusals = tuple(Refusal(**r) for r in data["refusals"])
        return PassRecord(**{**data, "rewrites": tuple(data["rewrites"]), "refusals": refusals})

    return [record(data) for data in json.loads(blob)]
