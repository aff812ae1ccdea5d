"""CompiledModel: the callable that `optimize` gives back.

    call -> flat tensors -> the variant built for these shapes -> the model's own output type
                         -> a batch between two buckets: the larger one, where rows are independent (accelkit.padding)
                         -> none covers them: the captured program or the model itself, counted, or an InputError

Calls may come from several threads. Results carry no gradients: a compiled model is for inference.

Its weights are the model's as they were when it was built. Engines copy, fold or share them, so weights that are changed in
place afterwards may reach some engines and not others: the next call warns, and `refit(model.state_dict())` brings all in line.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.capture import Program
from accelkit.errors import AccelkitError, InputError, LoweringError, warn
from accelkit.lowering import Lowered
from accelkit.padding import Padded, Padding, padding_of, sentence
from accelkit.report import Report
from accelkit.signature import Signature, TensorSpec
from accelkit.twin import same_buffers, version

if TYPE_CHECKING:
    from accelkit.overflow import Measured
    from accelkit.pipeline import Plan
    from accelkit.quantization import Calibration

_MAX_ROUTES = 4096
_MAX_REASONS = 100  # each uncovered shape is a reason of its own


@dataclass
class Variant:
    """One built program and the inputs it serves.

    Attributes:
        label: the bucket's name in reports and stats.
        program: as captured, before any pass.
        lowered: what runs.
        samples: the example's inputs (flat tensors) and the results that were checked, for artifacts.
        ranges: what passes were told of the values' ranges, for artifacts.
        calibration: what an int8 build was quantised by, for artifacts and for other builds.
    """

    label: str
    program: Program
    lowered: Lowered
    samples: tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]
    ranges: tuple[Measured, ...] = ()
    calibration: Calibration | None = None

    @property
    def signature(self) -> Signature:
        return self.program.signature

    @functools.cached_property
    def gives_one_tensor(self) -> bool:
        """Whether the model returns the first result as it is."""
        outputs, tree = self.signature.outputs, self.signature.out_spec
        return outputs == (0,) and isinstance(tree, pytree.TreeSpec) and tree.is_leaf()


@dataclass(frozen=True)
class Built:
    """All that a build made; a CompiledModel swaps it whole, so a call never sees half of a refit."""

    variants: tuple[Variant, ...]
    fallback: nn.Module | None
    report: Report
    program: Program | None = None  # as captured, with its dynamic dimensions; None where captured in pieces
    call: Callable[..., Any] | None = None  # where the model was captured in pieces: the stitched callable


class CompiledModel:
    """A model compiled by `accelkit.optimize`; call it as you call the model.

    Not built yet where `optimize` got no example inputs: the first call is the example.
    """

    def __init__(self, plan: Plan, built: Built | None = None) -> None:
        self._plan = plan
        self._lock = threading.RLock()  # builds and refits, one at a time; calls go on meanwhile
        self._counting = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._padded: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._built: Built | None = None
        self._routes: dict[Any, Variant | Padded | str] = {}
        self._padding: Padding | None = None
        self._before: dict[str, Counter[str]] = {}  # what engines counted while they were built
        self._binders: dict[Any, Callable[..., list[Any] | None] | None] = {}
        self._watched: tuple[tuple[torch.Tensor, int | None], ...] = ()
        if built is not None:
            self._install(built)

    def _install(self, built: Built) -> None:
        from accelkit.floor import tell_floors

        padding = padding_of(self._plan, built)
        built.report.padding = "" if padding is None else sentence(padding)
        tell_floors(built.variants, built.report.variants, self._plan.precision.name)
        with self._counting:
            self._routes, self._binders = {}, {}
            self._padding = padding if isinstance(padding, Padding) else None
            self._before = _counters(built)
            self._watched = weights_of(built.program)
            self._built = built

    # --- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these inputs, in the model's own output type, without gradients.

        Raises:
            InputError: arguments that the model's forward does not take; or, with `fallback=False`, shapes, dtypes or
                constants that no variant covers.
        """
        built = self._built
        if built is None:
            built = self._build(args, kwargs)
        result = self._call(built, args, kwargs)
        for tensor, seen in self._watched:  # now, while a GPU is at work: a model has hundreds
            if tensor._version != seen:
                self._tell_changed()
                break
        return result

    forward = __call__

    def _call(self, built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if built.call is not None:
            self._count("captured pieces")
            return built.call(*args, **kwargs)
        key = (len(args), *kwargs)
        quick = self._binders.get(key, _UNSEEN)
        if quick is _UNSEEN:
            quick = self._binders[key] = _quick_binder(built.variants[0].signature, len(args), tuple(kwargs))
        if quick is not None and (tensors := quick(args, kwargs)) is not None:
            shapes = tuple([(t.shape, t.dtype, t.device) for t in tensors])
            route = self._routes.get(shapes)
            if route is None:
                route = self._route(built, shapes, tensors)
            if not isinstance(route, str):
                return self._run(built, route, tensors, args, kwargs)
            return self._fall_back(built, route, args, kwargs)
        return self._general_call(built, args, kwargs)

    def _general_call(self, built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # nested inputs, constants, tensor subclasses, or arguments of another structure than was captured
        reason = ""
        for variant in built.variants:
            try:
                tensors = variant.signature.tensors_of(variant.signature.leaves(args, kwargs))
            except InputError as error:
                reason = reason or str(error)
                continue
            route = self._route_of(built, tensors)
            if not isinstance(route, str):
                return self._run(built, route, tensors, args, kwargs)
            reason = route
            break  # the others take the same leaves
        built.variants[0].signature.binder.bind(args, kwargs)  # what forward does not take is an error, fallback or not
        return self._fall_back(built, reason, args, kwargs)

    def _run(
        self,
        built: Built,
        route: Variant | Padded,
        tensors: list[torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        padded = isinstance(route, Padded)
        variant = route.variant if isinstance(route, Padded) else route
        try:
            results = route.run(tensors) if isinstance(route, Padded) else variant.lowered.call(*tensors)
        except (LoweringError, InputError) as error:
            # an engine that cannot take these very values (a size of 0, an index out of range): the model itself decides
            if not self._plan.fallback or built.fallback is None:
                raise
            reason = f"{variant.label}: {error}"
            warn(f"an engine failed, so this call runs on the original model: {reason}")
            return self._fall_back(built, reason, args, kwargs)
        self._count(variant.label, padded)
        return results[0] if variant.gives_one_tensor else variant.signature.unflatten(results)

    def _tell_changed(self) -> None:
        with self._counting:
            told, self._watched = not self._watched, ()
        if not told:
            warn(
                "the model's weights were changed after optimize(): the compiled model may hold the old ones, in whole or in part; "
                "call refit(model.state_dict())"
            )

    def _route(self, built: Built, shapes: Any, tensors: list[torch.Tensor]) -> Variant | Padded | str:
        route = self._route_of(built, tensors)
        with self._counting:
            if len(self._routes) >= _MAX_ROUTES:
                self._routes.clear()
            if self._built is built:
                self._routes[shapes] = route
        return route

    def _route_of(self, built: Built, tensors: list[torch.Tensor]) -> Variant | Padded | str:
        """The variant for these inputs, the one that they are padded to, or why no variant runs them."""
        reason = ""
        for variant in built.variants:
            uncovered = variant.signature.covers(tensors)
            if uncovered is None:
                return variant
            reason = uncovered
        padding = self._padding
        if padding is None or padding.variants is not built.variants:  # none, or a refit's
            return reason
        route = padding.route(tensors)
        return f"{reason}; {route}" if isinstance(route, str) and route else route or reason

    def _fall_back(self, built: Built, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._plan.fallback or built.fallback is None:
            covered = " | ".join(v.signature.coverage() for v in built.variants)
            without = "fallback=False" if built.fallback is not None else "the original model is not at hand"
            padding = f". Padding: {built.report.padding}" if built.report.padding else ""
            raise InputError(
                f"no compiled variant covers this call ({reason}), and {without}. Covered: {covered}{padding}"
            )
        with self._counting:
            self._counts["fallback"] += 1
            self._reasons[
                reason if reason in self._reasons or len(self._reasons) < _MAX_REASONS else "other reasons"
            ] += 1
        stateful = built.program is not None and bool(graphs.written_roots(built.program.graph.graph))
        with torch.no_grad(), same_buffers(built.fallback) if stateful else contextlib.nullcontext():
            return built.fallback(*args, **kwargs)

    def _count(self, label: str, padded: bool = False) -> None:
        with self._counting:
            self._counts[label] += 1
            if padded:
                self._padded[label] += 1

    # --- building

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        with self._lock:
            if self._built is None:
                self._install(self._plan.build(args, kwargs))
            assert self._built is not None
            return self._built

    def _require_built(self, what: str) -> Built:
        if self._built is None:
            raise AccelkitError(f"{what} needs a built model: call it once, or give optimize() example_inputs")
        return self._built

    # --- asking

    def report(self) -> Report:
        """What was captured, rewritten, refused and why, lowered where, how wrong, how fast."""
        return self._built.report if self._built is not None else self._plan.empty_report()

    @property
    def calibration(self) -> Calibration | None:
        """What an int8 build was quantised by: to save, draw, and use again. None for other precisions."""
        return self._require_built("calibration").variants[0].calibration

    def stats(self) -> dict[str, Any]:
        """Calls so far: in all, by variant, those of them that were padded to it, how each variant's engines ran theirs (where
        they tell), on the fallback, and why calls fell back (reason -> calls)."""
        with self._counting:
            counts, padded, reasons = dict(self._counts), dict(self._padded), dict(self._reasons)
        fallback = counts.pop("fallback", 0)
        return {
            "calls": sum(counts.values()) + fallback,
            "variants": counts,
            "padded": padded,
            "engines": _without(_counters(self._built), self._before),
            "fallback": fallback,
            "fallback_reasons": reasons,
        }

    @property
    def signature(self) -> Signature:
        """How the model is called (of the first variant)."""
        return self._require_built("signature").variants[0].signature

    # --- changing and keeping

    def refit(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Give the compiled model new weights; without recompiling where the engine allows it.

        The user's model keeps its own weights: the compiled model stops sharing them. A call in flight finishes with the old ones.

        Args:
            state_dict: a full state dict of the original model.

        Raises:
            InputError: missing or unexpected keys, or other shapes.
        """
        from accelkit.refit import refitted

        with self._lock:
            self._install(refitted(self._plan, self._require_built("refit"), state_dict))

    def save(self, path: str | Path) -> None:
        """Write the compiled model to one file (.accel) that `accelkit.load` reads, here or on another machine.

        Raises:
            ArtifactError: something in it cannot be stored; the message names it.
        """
        from accelkit.persistence import save

        save(self._plan, self._require_built("save"), path)

    def __repr__(self) -> str:
        state = "not built" if self._built is None else f"{len(self._built.variants)} variant(s)"
        return f"CompiledModel({self._plan.model_name}, {self._plan.backend}, {self._plan.precision}, {state})"


_UNSEEN: Any = object()


def weights_of(program: Program | None) -> tuple[tuple[torch.Tensor, int | None], ...]:
    """The program's weights with their counts of writes; without buffers that the program itself writes to."""
    if program is None:
        return ()
    graph = program.graph
    written = {
        id(graphs.attribute(graph, str(n.target))) for n in graphs.written_roots(graph.graph) if n.op == "get_attr"
    }
    tensors = {id(t): t for _, t in graphs.tensor_attributes(graph) if id(t) not in written and not t.is_inference()}
    return tuple((t, version(t)) for t in tensors.values())


def _counters(built: Built | None) -> dict[str, Counter[str]]:
    """What the engines of each variant counted, those of its pieces added up."""
    variants = () if built is None else built.variants
    return {v.label: sum((Counter(p.engine.counters()) for p in v.lowered.pieces), Counter()) for v in variants}


def _without(counted: dict[str, Counter[str]], before: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """The counts beyond those of the build's own checks; without variants that counted nothing."""
    found = {label: dict(counts - before.get(label, Counter())) for label, counts in counted.items()}
    return {label: counts for label, counts in found.items() if counts}


def _quick_binder(
    signature: Signature, positional: int, names: tuple[str, ...]
) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Any] | None] | None:
    """For calls of this form that are nothing but tensors: how to pick the graph's inputs without walking trees.

    The binder gives None for a call that is not plain tensors after all. None instead of a binder: calls of this form always
    take the general way.
    """
    if not all(isinstance(i, TensorSpec) for i in signature.inputs):
        return None
    probes = [object() for _ in range(positional)]
    named = {name: object() for name in names}
    try:
        args, kwargs = signature.binder.bind(tuple(probes), named)
    except InputError:
        return None
    wanted = [i.name for i in signature.inputs]
    given = {signature.binder.positional_name(i): a for i, a in enumerate(args)} | kwargs
    if sorted(given) != sorted(wanted):
        return None
    where: list[int | str] = []
    for name in wanted:
        probe = given[name]
        where.append(
            next((i for i, p in enumerate(probes) if p is probe), next((n for n, p in named.items() if p is probe), ""))
        )

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        tensors = [args[w] if w.__class__ is int else kwargs[w] for w in where]  # type: ignore[index]
        for tensor in tensors:
            if tensor.__class__ is not torch.Tensor and not isinstance(tensor, nn.Parameter):
                return None
        return tensors

    return bind
