"""optimize(): the whole story on one page.

nn.Module --capture--> fx graph --passes--> fx graph --partition + lower--> engines --> CompiledModel
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from accelkit.backend_api import Backend, CompileContext
from accelkit.calibration import Calibration, as_calibration, one_shot
from accelkit.capture import Program, capture, specialise
from accelkit.checks import Checked, check, run_original
from accelkit.compiled import Built, CompiledModel, Variant
from accelkit.dims import Dim
from accelkit.errors import AccelkitError, CaptureError, InputError, LoweringError, warn
from accelkit.lowering import EngineStore, lower
from accelkit.measure import peak_memory
from accelkit.options import (
    as_kernels_want,
    canonical_example,
    device_type,
    resolve_backend,
    resolve_passes,
    sizes_of,
)  # fmt: skip
from accelkit.overflow import Measured, RangeFinder
from accelkit.pass_api import GraphPass, OnnxPass
from accelkit.pass_runner import count_operators, run_passes
from accelkit.precision import Int8, Precision, as_precision, needs_calibration
from accelkit.progress import Progress
from accelkit.quantization import Calibration as Seen
from accelkit.quantization.collect import Source
from accelkit.quantization.qat import unwrapped
from accelkit.report import PieceReport, Report, VariantReport
from accelkit.size_one import without_wrong_ones
from accelkit.store import open_store
from accelkit.tensor_hash import each_tensor_read_once
from accelkit.twin import eval_twin, require_usable
from accelkit.yardstick import Yardstick, judge_of


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    target: str | Backend = "auto",
    precision: str | Precision = "fp32",
    passes: Iterable[GraphPass | OnnxPass | str] | None = None,
    dynamic_shapes: Any = None,
    buckets: Mapping[str, Sequence[int]] | None = None,
    calibration: Iterable[Any] | Seen | None = None,
    tolerance: float | None = None,
    fallback: bool = True,
    cache: bool = True,
    progress: bool = True,
) -> CompiledModel:
    """Compile a model for inference and prove that it still computes the same.

    Args:
        model: any nn.Module. It is not changed: parameters are shared, training flags and hooks stay.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; None: the first call is
            the example.
        target: a backend's name or value (`OnnxRuntime(threads=2)`); "auto": the first one available, see `accelkit targets`.
        precision: "fp32", "bf16", "fp16", "int8" or a Precision value such as `Int8(scheme="ft2")`. Inputs and outputs keep the
            model's own dtypes.
        passes: None for the default pipeline, or passes (values or names) in the order they shall run.
        dynamic_shapes: by input name and dimension: `{"input_ids": {0: accelkit.Dim("batch", max=64)}}`.
        buckets: sizes of dynamic dimensions to build separate engines for: `{"batch": (1, 8)}`; None: one engine for all. A
            batch in between runs in the larger one where rows are proved independent and that measured faster (the report
            says so).
        calibration: an iterable of inputs (a DataLoader will do), each as `example_inputs`: for int8, whose ranges come from
            them; for fp16, whose overflow is then looked for on them as well as on the example. It is gone through at each build
            and refit, one batch at a time. For int8 also a `quantization.Calibration`, collected before.
        tolerance: largest relative error allowed against float64; None: twice plain PyTorch's own in this precision.
        fallback: inputs that no engine covers run on the original model, counted in `stats()`; False: an InputError.
        cache: keep compiled engines on disk and reuse them.
        progress: show a progress line on a terminal.

    Returns:
        the compiled model; call it as the model itself.

    Raises:
        InputError: an argument that does not fit.
        BackendUnavailableError: the target cannot run here; the message says what to install.
        PassError, LoweringError: a pass or the backend failed.
        AccuracyError: the result is further from float64 than allowed.
        Exception: whatever the model's own forward raises on the example, as it is.
    """
    plan = make_plan(
        model, target=target, precision=precision, passes=passes, dynamic_shapes=dynamic_shapes, buckets=buckets,
        calibration=calibration, tolerance=tolerance, fallback=fallback, cache=cache, progress=progress,
    )  # fmt: skip
    if example_inputs is None:
        return CompiledModel(plan)
    args, kwargs = canonical_example(example_inputs)
    return CompiledModel(plan, plan.build(args, kwargs))


@dataclass(frozen=True)
class Plan:
    """`optimize()`'s arguments, resolved; `build` carries them out."""

    twin: nn.Module
    model_name: str
    backend: Backend
    precision: Precision
    graph_passes: tuple[GraphPass, ...]
    onnx_passes: tuple[OnnxPass, ...]
    store: EngineStore
    dynamic_shapes: Any = None
    buckets: Mapping[str, Sequence[int]] | None = None
    tolerance: float | None = None
    fallback: bool = True
    progress: Progress = field(default_factory=Progress)
    calibration: Calibration | None = None
    known_ranges: Mapping[str, Sequence[Measured]] = field(default_factory=dict)  # by label: of a saved model
    known_calibrations: Mapping[str, Seen] = field(default_factory=dict)  # the same; "" is for all labels

    def empty_report(self) -> Report:
        return Report(self.model_name, str(self.backend), str(self.precision))

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        """Capture, rewrite, lower and check, for an example call; several times where there are buckets."""
        with self.progress.running(f"optimizing {self.model_name}"), each_tensor_read_once():
            try:
                with self.progress.stage("capture") as stage:
                    program = capture(self.twin, args, kwargs, self.dynamic_shapes)
            except CaptureError as refusal:
                from accelkit.dynamo import build_in_pieces

                if needs_calibration(self.precision):
                    raise InputError(
                        f"{self.precision} needs calibration, whose batches are inputs of the whole model, and {self.model_name} "
                        f"can be captured in pieces at best ({refusal}). Int8(scheme='dynamic') needs none"
                    ) from refusal
                return build_in_pieces(self, refusal, args, kwargs)
            program, notes = without_wrong_ones(program, self.twin)
            return self.build_program(program, stage.seconds, self.twin, notes)

    def build_program(
        self, program: Program, capture_seconds: float, model: nn.Module | None, notes: Sequence[str] = ()
    ) -> Built:
        """The same from a captured program on; without the original model where a saved one is loaded."""
        report = self.empty_report()
        variants = []
        for label, sizes in self._bucket_sizes(program):
            captured = specialise(program, sizes_of(program, sizes)) if sizes else program
            variant, found = self._build_variant(label, captured, model, program, sizes)
            found.seconds = {"capture": capture_seconds} | found.seconds
            found.notes += notes
            variants.append(variant)
            report.variants.append(found)
        return Built(tuple(variants), model, report, program)

    def build_piece(self, program: Program, model: nn.Module) -> tuple[Variant, VariantReport]:
        """One captured piece of a model that torch.export refused."""
        variant, found = dataclasses.replace(self, calibration=None)._build_variant(
            "piece", program, model, program, {}
        )
        if self.calibration is not None:
            found.notes.append(
                "calibration is not used: its batches are inputs of the whole model, and this is a piece"
            )
        return variant, found

    def _build_variant(
        self, label: str, program: Program, model: nn.Module | None, whole: Program, sizes: dict[str, int]
    ) -> tuple[Variant, VariantReport]:
        found = VariantReport(label, program.signature.coverage(), count_operators(program.graph))
        graph = copy_graph(program.graph)
        ranges = RangeFinder(graph, lambda: self._batches(program, whole, sizes), self.known_ranges.get(label, ()))
        seen = self.known_calibrations.get(label) or self.known_calibrations.get("")
        batches = None
        if (given := self.calibration) is not None:
            batches = lambda: given.through(program, whole, sizes)  # noqa: E731
        source = Source(graph, batches, seen, self.progress.say)
        with peak_memory() as memory:
            variant = self._lower_and_check(label, program, model, found, graph, ranges, source)
        found.peak_memory_bytes = memory.peak_bytes - memory.before_bytes
        return variant, found

    def _batches(self, program: Program, whole: Program, sizes: dict[str, int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """What the ranges of values are measured on: the example, then the calibration inputs."""
        yield program.inputs
        if self.calibration is not None:
            yield from self.calibration.through(program, whole, sizes)

    def _lower_and_check(
        self,
        label: str,
        program: Program,
        model: nn.Module | None,
        found: VariantReport,
        graph: fx.GraphModule,
        ranges: RangeFinder,
        source: Source,
    ) -> Variant:
        def before(one: GraphPass) -> None:
            ranges.prepare(one)
            if one.calibrates:
                source.leave()

        with self.progress.stage("passes", found.seconds):
            try:
                found.ledger += run_passes(graph, self.graph_passes, before)
            except AccelkitError:
                raise
            except Exception:  # the graph, run for its ranges, fails on the example
                run_original(program, model)
                raise
        if ranges.measured:
            found.seconds["passes"] -= ranges.seconds
            found.seconds["ranges"] = ranges.seconds
        found.notes += ranges.notes
        if source.used is not None:
            found.seconds["passes"] -= source.seconds
            found.seconds["calibration"] = source.seconds
            found.notes.append(f"{self.precision}: ranges are from {source.told()}")
        elif self.calibration is not None:
            found.notes.append(
                self.calibration.note() if ranges.ran else "calibration is not used: no pass asked for ranges"
            )
        found.notes += [record.meaning.note() for record in found.ledger if record.meaning is not None]
        with self.progress.stage("lowering", found.seconds), torch.no_grad():
            yardstick = Yardstick(program, model, self.precision)
            judge = judge_of(yardstick, graph, found.ledger, self.tolerance)
            context = CompileContext(self.precision, self.onnx_passes, found.ledger, self.progress.say, judge)
            try:
                lowered = lower(graph, self.backend, program.inputs, context, self.store)
            except LoweringError:
                run_original(program, model)
                raise
        found.pieces = [PieceReport(p.operators, p.origin, p.engine.describe()) for p in lowered.pieces]
        found.refusals, found.torch_operators = lowered.refusals, lowered.torch_operators
        with self.progress.stage("checks", found.seconds):
            checked = check(
                program, graph, lowered, model, self.precision, self.tolerance, self.store, found.ledger, yardstick
            )
        _tell(found, checked, str(self.backend))
        return Variant(label, program, lowered, checked.samples, tuple(ranges.measured), source.used)

    def _bucket_sizes(self, program: Program) -> list[tuple[str, dict[str, int]]]:
        if not self.buckets:
            return [("dynamic" if program.signature.dims else "as captured", {})]
        names = set(program.signature.dims.values())
        if unknown := set(self.buckets) - names:
            raise InputError(
                f"buckets names {sorted(unknown)}, which dynamic_shapes does not declare (declared: {sorted(names) or 'none'})"
            )
        combinations = itertools.product(
            *([(name, int(size)) for size in sizes] for name, sizes in self.buckets.items())
        )
        return [(", ".join(f"{n}={s}" for n, s in sizes), dict(sizes)) for sizes in combinations]


def make_plan(
    model: nn.Module,
    *,
    target: str | Backend = "auto",
    precision: str | Precision = "fp32",
    passes: Iterable[GraphPass | OnnxPass | str] | None = None,
    dynamic_shapes: Any = None,
    buckets: Mapping[str, Sequence[int]] | None = None,
    calibration: Iterable[Any] | Seen | None = None,
    tolerance: float | None = None,
    fallback: bool = True,
    cache: bool = True,
    progress: bool = True,
    store: EngineStore | None = None,
    device: str | None = None,
) -> Plan:
    """Check and resolve `optimize()`'s arguments, without running anything of the model."""
    model, precision, calibration = unwrapped(model, precision, calibration)
    require_usable(model)
    wanted = as_precision(precision)
    backend = resolve_backend(target, wanted, device or device_type(model))
    wanted = as_kernels_want(wanted, backend)
    graph_passes, onnx_passes = resolve_passes(passes, wanted)
    if calibration is not None and not wanted.takes_calibration:
        raise InputError(f"calibration is for precisions that need it; {wanted} does not. Leave calibration out")
    known = {"": calibration} if isinstance(calibration, Seen) else {}
    if known and not isinstance(wanted, Int8):
        raise InputError(f"a collected Calibration is for int8; for {wanted} calibration is an iterable of inputs")
    if calibration is None and needs_calibration(wanted):
        raise InputError(
            f"{wanted} needs calibration data: calibration=batches, an iterable of inputs (a DataLoader will do), or a collected "
            "Calibration. Int8(scheme='dynamic') needs none"
        )
    if isinstance(wanted, Int8) and wanted.smooth is not None and one_shot(calibration):
        raise InputError(
            "Int8(smooth=...) goes through calibration twice, and this is an iterator: give a list or a DataLoader"
        )
    batches = None if calibration is None or known else as_calibration(calibration)
    if buckets is not None and one_shot(calibration):
        raise InputError("calibration is an iterator, and buckets go through it once each: give a list or a DataLoader")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise InputError(f"tolerance is a relative error such as 1e-3, not {tolerance!r}")
    if buckets is not None and dynamic_shapes is None:
        raise InputError(
            "buckets needs dynamic_shapes, whose Dims it names: dynamic_shapes={'x': {0: Dim('batch', max=8)}}"
        )
    return Plan(
        eval_twin(model), type(model).__name__, backend, wanted, graph_passes, onnx_passes, store or open_store(cache),
        dynamic_shapes, buckets, tolerance, fallback, Progress(progress), batches, {}, known,
    )  # fmt: skip


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes can be rewritten; tensors are shared."""
    return fx.GraphModule(graph, copy.deepcopy(graph.graph), type(graph).__name__)


def _tell(found: VariantReport, checked: Checked, target: str) -> None:
    found.accuracy, found.timings, found.layers = checked.accuracy, checked.timings, checked.layers
    found.notes += checked.notes
    slow = {"original", "compiled"} <= set(found.timings)
    if slow and found.timings["compiled"].slower_than(found.timings["original"]):
        text = f"{target} is slower than the original model here: {found.timings['compiled']} against {found.timings['original']}"
        found.notes.append(text)
        warn(f"{text}; try another target, or keep the model as it is")


__all__ = ["Dim", "Plan", "copy_graph", "make_plan", "optimize"]
