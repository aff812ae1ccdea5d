"""CompiledModel to a .accel file and back.

    save: program, engines, sample inputs and outputs, report  ->  one file
    load: hashes checked -> program -> passes -> engines from the file where their keys fit this machine, else compiled anew
          -> the sample is run and compared -> CompiledModel

Engines are kept under the same keys as in the cache: graph, options, shapes, versions. What differs here has another key, is
rebuilt from the program, and the report says so. No pickle is read or written.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from accelkit import plugins
from accelkit.accuracy import OutputError, relative_error
from accelkit.attention_patterns import Pattern, pattern_from_json
from accelkit.backend_api import Backend, CompileContext
from accelkit.capture import Program, from_exported
from accelkit.compiled import Built, CompiledModel
from accelkit.errors import ArtifactError, InputError, LoweringError, warn
from accelkit.lowering import EngineStore, Lowered, Stored
from accelkit.measure import Timing, versions
from accelkit.overflow import Measured
from accelkit.pass_api import GraphPass, OnnxPass
from accelkit.precision import Precision, as_precision
from accelkit.progress import Progress
from accelkit.quantization import Calibration
from accelkit.store import Findings, open_store

if TYPE_CHECKING:
    from accelkit.artifact import Artifact, Member
    from accelkit.pipeline import Plan

_SELF_TEST_FACTOR = 2.0
"""The loaded engine may differ from the saved outputs by this many times what was allowed against float64 (either may err)."""


# --- saving


def save(plan: Plan, built: Built, path: str | Path) -> None:
    """Write a built model to `path`.

    Raises:
        ArtifactError: the model runs in pieces (there is no program to keep), or an option or constant cannot be stored.
    """
    from accelkit.artifact import write
    from accelkit.program_io import write_program
    from accelkit.signature_json import signature_to_json
    from accelkit.tensors_io import write_tensors

    if built.program is None:
        raise ArtifactError(
            f"{plan.model_name} was captured in pieces and has no program to save; save the PyTorch model instead"
        )
    program = built.program
    members: dict[str, Member] = {
        "program": lambda stream: write_program(stream, program.exported_with_weights()),
        "samples": lambda stream: write_tensors(stream, _samples(built)),
    }
    calibrations = {v.label: (f"calibrations/{i}", v.calibration) for i, v in enumerate(built.variants)}
    members.update({name: c.write for name, c in calibrations.values() if c is not None})
    engines: dict[str, dict[str, str]] = {}
    for variant in built.variants:
        for key, blobs in variant.lowered.serialized(except_for=engines):
            names = {name: f"engines/{len(engines)}/{number}" for number, name in enumerate(blobs)}
            members.update({names[name]: blob for name, blob in blobs.items()})
            if blobs:
                engines[key] = names
    manifest = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "model": plan.model_name,
        "backend": value_to_json(plan.backend),
        "precision": plan.precision.to_json(),
        "passes": [*map(value_to_json, plan.graph_passes), *map(value_to_json, plan.onnx_passes)],
        "buckets": {name: list(sizes) for name, sizes in plan.buckets.items()} if plan.buckets else None,
        "tolerance": plan.tolerance,
        "fallback": plan.fallback,
        "signature": signature_to_json(program.signature),
        "engines": engines,
        "variants": [v.label for v in built.variants],
        "ranges": {v.label: [m.to_json() for m in v.ranges] for v in built.variants},
        "calibrations": {label: name for label, (name, c) in calibrations.items() if c is not None},
        "report": built.report.to_json(),
    }
    write(path, manifest, members)


def _samples(built: Built) -> dict[str, torch.Tensor]:
    assert built.program is not None
    tensors = {f"inputs/{i}": t for i, t in enumerate(built.program.inputs)}
    for number, variant in enumerate(built.variants):
        results = variant.samples[1]
        tensors |= {f"outputs/{number}/{i}": r for i, r in enumerate(results) if isinstance(r, torch.Tensor)}
    return tensors


def value_to_json(value: Backend | GraphPass | OnnxPass) -> dict[str, Any]:
    """A pass or backend as its registered name and options.

    Raises:
        ArtifactError: it is not registered under its name, or an option is not plain data.
    """
    group = plugins.BACKENDS if isinstance(value, Backend) else plugins.PASSES
    if value.name not in plugins.names(group) or plugins.find(group, value.name) is not type(value):
        raise ArtifactError(
            f"{value.name} ({type(value).__module__}.{type(value).__qualname__}) is not registered as an entry point of "
            f"{group}, so a file could not name it; register it, or save without it"
        )
    options = {}
    for option in dataclasses.fields(value):  # type: ignore[arg-type]
        options[option.name] = _plain(getattr(value, option.name), f"{value.name}.{option.name}")
    return {"name": value.name, "options": options}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Precision):
        return {"precision": value.to_json()}
    if isinstance(value, Pattern):
        return value.to_json()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v, where) for v in value]
    raise ArtifactError(f"option {where} is a {type(value).__name__}, which a file cannot hold; use plain values")


def value_from_json(group: str, data: Any) -> Any:
    """The pass or backend that `value_to_json` described.

    Raises:
        ArtifactError: it is not installed here, or takes other options.
    """
    try:
        kind = plugins.find(group, str(data["name"]))
        return kind(**{name: _restored(option) for name, option in data["options"].items()})
    except InputError as error:
        raise ArtifactError(f"the file needs something that is not installed here: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"the file's options of {data!r} do not fit the version installed here: {error}") from error


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and "pattern" in value:
        return pattern_from_json(value)
    if isinstance(value, dict):
        return as_precision(value["precision"])
    return tuple(_restored(v) for v in value) if isinstance(value, list) else value


# --- loading


def load(path: str | Path, *, cache: bool = True, progress: bool = True) -> CompiledModel:
    """A compiled model from a .accel file.

    What in it fits this machine is used; the rest is rebuilt from the program in the file, with a warning. The file's sample
    inputs are run and the outputs compared before the model is handed out. Inputs that no engine covers run on the program,
    where its dynamic dimensions cover them.

    Args:
        path: the file.
        cache: look for, and keep, rebuilt engines in the engine cache.
        progress: show a progress line on a terminal.

    Raises:
        ArtifactError: damaged, too new, not an .accel file, or in need of a package that is not installed here.
        BackendUnavailableError: its target cannot run here.
    """
    from accelkit.artifact import read
    from accelkit.program_io import program_from_bytes
    from accelkit.signature_json import signature_from_json
    from accelkit.tensors_io import tensors_from_bytes

    artifact = read(path)
    manifest = artifact.manifest
    try:
        signature = signature_from_json(manifest["signature"])
        samples = tensors_from_bytes(artifact.view("samples"), to_saved_devices=True)  # beside the weights
        exported = program_from_bytes(artifact.view("program"))
        inputs = tuple(samples[f"inputs/{i}"] for i in range(len(signature.tensors)))
        plan = _plan(manifest, cache, progress)
        ranges = {
            label: [Measured.from_json(one) for one in some] for label, some in manifest.get("ranges", {}).items()
        }
        calibrations = {
            label: Calibration.read(io.BytesIO(artifact.member(name)), f"{name} in {path}")
            for label, name in manifest.get("calibrations", {}).items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: the manifest is incomplete ({type(error).__name__}: {error}); save it again"
        ) from error
    program = _program(exported, signature, inputs)
    if (reason := plan.backend.unavailable()) is not None:
        from accelkit.errors import BackendUnavailableError

        raise BackendUnavailableError(
            f"{path} was saved for target {plan.backend.name!r}, which cannot run here: {reason}"
        )
    store = ArtifactStore(artifact, samples, plan.store)
    fallback = ProgramModule(program)
    as_saved = dataclasses.replace(
        plan, known_ranges=ranges, known_calibrations=calibrations
    )  # a refit's weights have others
    with plan.progress.running(f"loading {plan.model_name}"):
        try:
            built = dataclasses.replace(as_saved, store=store).build_program(program, 0.0, None)
        except _SelfTestFailed as failure:
            warn(f"{path}: {failure}; its engines are rebuilt from the program")
            built = as_saved.build_program(program, 0.0, None)
    if store.rebuilt:
        text = (
            f"{store.rebuilt} engine(s) rebuilt: the saved ones are for other versions, options or hardware than here"
        )
        for variant in built.report.variants:
            variant.notes.append(text)
        warn(f"{path}: {text}")
    return CompiledModel(plan, dataclasses.replace(built, fallback=fallback))


def _plan(manifest: dict[str, Any], cache: bool, progress: bool) -> Plan:
    from accelkit.pipeline import Plan

    passes = [value_from_json(plugins.PASSES, p) for p in manifest["passes"]]
    return Plan(
        nn.Module(),
        str(manifest["model"]),
        value_from_json(plugins.BACKENDS, manifest["backend"]),
        as_precision(manifest["precision"]),
        tuple(p for p in passes if isinstance(p, GraphPass)),
        tuple(p for p in passes if isinstance(p, OnnxPass)),
        open_store(cache),
        None,
        manifest["buckets"],
        manifest["tolerance"],
        bool(manifest["fallback"]),
        Progress(progress),
    )


def _program(exported: torch.export.ExportedProgram, signature: Any, inputs: tuple[torch.Tensor, ...]) -> Program:
    from torch.utils import _pytree as pytree

    from accelkit.signature import TensorSpec

    tensors = iter(inputs)
    leaves = [next(tensors) if isinstance(i, TensorSpec) else i.value for i in signature.inputs]
    canonical = pytree.tree_unflatten(leaves, signature.in_spec)
    return dataclasses.replace(from_exported(exported, signature.binder, canonical, {}, inputs), signature=signature)


class _SelfTestFailed(Exception):
    """The engine from the file computes something else here than where it was saved."""


class ArtifactStore:
    """Engines from an artifact where their keys fit; the others come from `inner`."""

    def __init__(self, artifact: Artifact, samples: dict[str, torch.Tensor], inner: EngineStore) -> None:
        self.artifact, self.samples, self.inner = artifact, samples, inner
        self.rebuilt = 0
        self._checked = 0

    def build(
        self, backend: Backend, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext
    ) -> Stored:
        from accelkit.fingerprint import engine_key

        key = engine_key(graph, backend, context.precision, context.onnx_passes, inputs)
        members = self.artifact.manifest["engines"].get(key)
        if members is not None:
            blobs = {name: self.artifact.member(member) for name, member in members.items()}
            try:
                return Stored(backend.load(blobs, graph, inputs, context), "artifact", key)
            except LoweringError as error:
                warn(f"an engine in {self.artifact.path} does not load here: {error}")
        if self.artifact.manifest["engines"]:  # a target whose engines cannot be kept is not worth a warning
            self.rebuilt += 1
        return self.inner.build(backend, graph, inputs, context)

    def recall(
        self, program: Program, lowered: Lowered, tolerance: float | None, results: Sequence[Any]
    ) -> Findings | None:
        """The saved findings, if every engine is the saved one and the sample comes out as it did."""
        number, self._checked = self._checked, self._checked + 1
        if not lowered.pieces or any(piece.origin != "artifact" for piece in lowered.pieces):
            return None
        saved = self.artifact.manifest["report"]["variants"][number]
        accuracy = [OutputError(**{k: v for k, v in o.items() if k != "ok"}) for o in saved["accuracy"]]
        for index, result in enumerate(results):
            expected = self.samples.get(f"outputs/{number}/{index}")
            if expected is None:
                continue
            allowed = _SELF_TEST_FACTOR * (accuracy[index].allowed if index < len(accuracy) else 0.0)
            if accuracy and not relative_error(result, expected) <= allowed:
                raise _SelfTestFailed(
                    f"output {index} of the sample is off by {relative_error(result, expected):.2e} from the saved one "
                    f"(allowed {allowed:.2e})"
                )
        timings = {name: Timing(**t) for name, t in saved["timings"].items()}
        created = self.artifact.manifest["created"]
        return (
            accuracy,
            timings,
            [
                *saved["notes"],
                f"error and timings are those of {created}, from the file; the sample came out the same here",
            ],
        )

    def remember(self, program: Program, lowered: Lowered, tolerance: float | None, findings: Findings) -> None:
        self.inner.remember(program, lowered, tolerance, findings)


class ProgramModule(nn.Module):
    """A captured program as a module that is called like the original model."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.graph_module = program, program.graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature = self.program.signature
        tensors = signature.tensors_of(signature.leaves(args, kwargs))
        if (reason := signature.covers(tensors)) is not None:
            raise InputError(f"the saved program does not cover this call: {reason}. Covered: {signature.coverage()}")
        with torch.no_grad():
            return signature.unflatten(self.graph_module(*tensors))


def read_manifest(path: str | Path) -> str:
    """A .accel file's manifest as indented JSON, for a look at what is in it."""
    from accelkit.artifact import read

    return json.dumps(read(path).manifest, indent=1)
