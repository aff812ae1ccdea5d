"""How large the values of a graph become, found by running it in float32 before a pass sets a narrower precision.

    graph, inputs, more inputs, ...  --node by node-->  node.meta["range"] = Range(largest=7.1e+04)

float16 ends at 65504, and what a model's residual stream or attention scores reach is in no weight: it has to be seen. A
pass asks (`GraphPass.wants_ranges`), the graph is run as it is when that pass's turn comes, and the pass decides what
stays wide. bfloat16 needs none of it: it has float32's exponents, and ends at 3.39e+38 where float32 ends at 3.40e+38.

One more forward per batch on the model's own device. Values are let go as soon as their last reader has run; a node's
extremes are one pass over its memory, none for a view; numbers are brought to the host once, at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.errors import InputError
from accelkit.pass_api import GraphPass, Range
from accelkit.twin import clone_inputs, preserved

KEY = "range"  # of node.meta


def measure(graph: fx.GraphModule, wanted: Mapping[fx.Node, float], batches: Iterable[Sequence[torch.Tensor]]) -> None:
    """Run `graph` on each batch and put a `Range` over all of them into the wanted nodes' metadata.

    Args:
        graph: an accelkit graph in the model's own precision; it is left as it was, buffers that it writes to included.
        wanted: the nodes, and for each the magnitude from which on values do not count.
        batches: the graph's inputs, flat: the example, then calibration batches; taken one at a time.

    Raises:
        InputError: the model fails on a calibration batch.
        Exception: what the model raises on the example.
    """
    found: list[torch.Tensor] = []
    run = _Run(graph, wanted)
    for number, batch in enumerate(batches):
        try:
            seen = run.extremes(batch)
        except Exception as error:
            if number == 0:
                raise
            text = f"{type(error).__name__}: {error}"
            raise InputError(f"calibration: the model fails on the batch used as number {number}: {text}") from error
        found = [torch.maximum(a, b) for a, b in zip(found, seen, strict=True)] if found else seen
    numbers = [row for stacked in found for row in stacked.tolist()]
    ranges = dict.fromkeys(wanted, Range(0.0))
    for node, (raw, counted, inside) in zip(run.order, numbers, strict=True):
        old = ranges[node]
        special = "NaN" if math.isnan(raw) or old.special == "NaN" else "infinity" if math.isinf(raw) else old.special
        ranges[node] = Range(max(old.largest, counted), special, max(old.inside, inside))
    for node, one in ranges.items():
        node.meta[KEY] = one


class _Run(fx.Interpreter):
    """One forward after the other; `order` says which node each row of extremes belongs to (a tuple's has several)."""

    def __init__(self, graph: fx.GraphModule, wanted: Mapping[fx.Node, float]) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.extra_traceback = False  # an exception of the model's own stays as it is
        self.graph_module, self.wanted = graph, wanted
        self.laid_out = graphs.laid_out(graph)
        self.written = graphs.written_roots(graph.graph)
        self.changes_state = bool(self.written) or any(graphs.is_random(n) for n in graph.graph.nodes)
        self.constants: dict[fx.Node, list[torch.Tensor]] = {}
        self.rows: dict[torch.device, list[tuple[fx.Node, torch.Tensor]]] = {}
        self.latest: dict[fx.Node, torch.Tensor] = {}
        self.order: list[fx.Node] = []

    def extremes(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """For each device [rows, 3]: the largest magnitude (NaN or infinite where there is one), the largest that
        counts, and `Range.inside`."""
        self.rows, self.latest = {}, {}
        with preserved(self.graph_module) if self.changes_state else contextlib.nullcontext(), torch.no_grad():
            self.run(*self.laid_out(clone_inputs(tuple(inputs)) if self.written else inputs))
        self.order = [node for rows in self.rows.values() for node, _ in rows]
        return [torch.stack([row for _, row in rows]) for rows in self.rows.values()]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.wanted:
            return value
        if n.op == "get_attr" and n not in self.written:  # a weight: once for all batches
            rows = self.constants[n] = self.constants.get(n) or [self._row(n, value)]
        else:
            tensors = value if isinstance(value, (tuple, list)) else (value,)
            rows = [self._row(n, t) for t in tensors if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
        for row in rows:
            self.rows.setdefault(row.device, []).append((n, row))
        if len(rows) == 1:
            self.latest[n] = rows[0]
        return value

    def _row(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        if (known := self._same_elements(node, value)) is not None:
            return known
        raw = counted = inside = value.new_zeros(())
        if value.numel():
            raw, counted = _magnitudes(value, self.wanted[node])
        if "scaled_dot_product" in str(node.target) and node.op == "call_function":
            inside = self._scores(node)
        return torch.stack([raw, counted, inside])

    def _same_elements(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        """What was found of an argument that holds the very elements (reshape, permute, a cast that does nothing)."""
        if graphs.is_mutating(node) or node.target is torch.ops.aten.as_strided.default:
            return None
        for source in node.all_input_nodes:
            other = self.env.get(source)
            if (
                source in self.latest
                and self.wanted[source] == self.wanted[node]
                and isinstance(other, torch.Tensor)
                and other.dtype == value.dtype
                and other.numel() == value.numel()
                and other.storage_offset() == value.storage_offset()
                and other.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            ):
                return self.latest[source]
        return None

    def _scores(self, node: fx.Node) -> torch.Tensor:
        query, key = (self.env[a] for a in node.args[:2])  # type: ignore[index]
        if not query.numel() or not key.numel():
            return torch.zeros((), device=query.device)
        given = (graphs.bound_arguments(node) or {}).get("scale")
        scale = query.shape[-1] ** -0.5 if given is None else abs(given)
        q, k = (torch.nan_to_num(t.float(), 0.0, 0.0, 0.0).square().sum(-1).amax(-1).sqrt() for t in (query, key))
        if q.shape != k.shape:  # fewer key heads than query heads
            q, k = q.amax(), k.amax()
        return torch.amax(q * k) * float(scale)


def _magnitudes(value: torch.Tensor, ceiling: float) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = torch.aminmax(value)
    raw = torch.maximum(-low, high)
    if value.device.type == "cpu" and bool(raw < ceiling):  # elsewhere a look would make the host wait
        return raw, raw
    if ceiling == math.inf:
        counting = torch.nan_to_num(value, 0.0, 0.0, 0.0)
    else:
        counting = torch.where(value.abs() < ceiling, value, 0.0)
    low, high = torch.aminmax(counting)
    return raw, torch.maximum(-low, high)


def non_finite(graph: fx.GraphModule, wanted: Mapping[fx.Node, float]) -> str | None:
    """A sentence on the operators that made NaN or infinity of finite values, or None; to be told, and no overflow.

    Infinities that the author wrote (`masked_fill(mask, -inf)`, a mask in a buffer or an input), that masks add up to, or
    that are made of positions alone (the logarithm of distance 0, which a `where` hides) are none.
    """
    data: set[fx.Node] = set()  # made of floating-point inputs or of parameters
    found = []
    for node in graph.graph.nodes:
        if not data.isdisjoint(node.all_input_nodes) or _is_data(graph, node):
            data.add(node)
        special = node.meta[KEY].special if node in wanted else ""
        if not special or node.op != "call_function" or node not in data:
            continue
        before = {i.meta[KEY].special for i in node.all_input_nodes if i in wanted}
        no_mask = wanted[node] == math.inf and not _names_infinity(node)
        if special not in before if special == "NaN" else no_mask and before <= {""}:
            found.append(f"{special} in {graphs.describe_node(node)}")
    if not found:
        return None
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"float32 itself gives {', '.join(found[:3])}{more} on the inputs tried; that is not taken for an overflow"


def _is_data(graph: fx.GraphModule, node: fx.Node) -> bool:
    value = graphs.val(node)
    if node.op == "placeholder":
        return isinstance(value, torch.Tensor) and value.is_floating_point()
    return node.op == "get_attr" and isinstance(graphs.attribute(graph, str(node.target)), torch.nn.Parameter)


def _names_infinity(node: fx.Node) -> bool:
    return any(
        isinstance(a, float) and math.isinf(a) for a in torch.utils._pytree.tree_leaves((node.args, node.kwargs))
    )


# --- for one build


@dataclass(frozen=True)
class Measured:
    """What one pass was given, to be kept in a file: the ranges in the graph's order, and which operators they are of."""

    operators: str
    ranges: tuple[Range, ...]

    def to_json(self) -> dict[str, Any]:
        return {"operators": self.operators, "ranges": [list(astuple(r)) for r in self.ranges]}

    @classmethod
    def from_json(cls, data: Any) -> Measured:
        """Raises KeyError, TypeError, ValueError or IndexError where `data` is no such thing."""
        return cls(str(data["operators"]), tuple(Range(float(r[0]), str(r[1]), float(r[2])) for r in data["ranges"]))


@dataclass
class RangeFinder:
    """Gives each pass of one build the ranges that it wants, just before it runs.

    Attributes:
        graph: the graph that the passes rewrite.
        batches: gives all inputs to run on, flat; called once for each pass that wants ranges.
        known: what a saved model's passes were given; used instead of a run where the operators are the same.
        measured: what was given, one entry a pass that wanted any.
        notes: for the report. seconds: spent. ran: whether the graph was run, not only looked up.
    """

    graph: fx.GraphModule
    batches: Callable[[], Iterable[Sequence[torch.Tensor]]]
    known: Sequence[Measured] = ()
    measured: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ran: bool = False

    def prepare(self, one: GraphPass) -> None:
        """Put ranges into the nodes' metadata, if `one` wants them."""
        started = time.perf_counter()
        if wanted := one.wants_ranges(self.graph):
            self._find(wanted)
            self.seconds += time.perf_counter() - started

    def _find(self, wanted: Mapping[fx.Node, float]) -> None:
        ordered = {node: wanted[node] for node in self.graph.graph.nodes if node in wanted}
        operators = _digest(ordered)
        known = next((k for k in self.known if k.operators == operators and len(k.ranges) == len(ordered)), None)
        if known is not None:
            for node, value in zip(ordered, known.ranges, strict=True):
                node.meta[KEY] = value
        else:
            measure(self.graph, ordered, self.batches())
            self.ran = True
        if known is None and self.known:
            self.notes.append("the file's ranges are of other operators than here: measured anew, on its sample inputs")
        self.measured.append(Measured(operators, tuple(node.meta[KEY] for node in ordered)))
        if (note := non_finite(self.graph, ordered)) is not None:
            self.notes.append(note)


def _digest(nodes: Iterable[fx.Node]) -> str:
    """SHA-256 of the operators in their order: a file may be read by another version, whose graph is another."""
    lines = [str(node.target) if node.op == "call_function" else node.op for node in nodes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
