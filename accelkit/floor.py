"""The least time that this machine could take for a program, and so how much of what is possible was reached.

    floor = max(operations / rate of one large matrix product, bytes / rate of one large copy)

Operations are those of matrix products, convolutions and attention alone, two for a multiplication with its addition; bytes
are each weight and each input once, as if all in between stayed on the chip. No program is faster, except where weights
stay in the caches from one call to the next, and none that writes its activations to memory gets there. Rates are measured
(`accelkit.rates`): a data sheet's are not reached by any product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from accelkit import graph as graphs
from accelkit.ops import OPERATORS, operator_of
from accelkit.rates import Rates, rates_of

if TYPE_CHECKING:
    from accelkit.compiled import Variant
    from accelkit.report import VariantReport

NUMBER_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_WORDS = (
    "linear",
    "matmul",
    "mm",
    "mv",
    "conv",
    "patch",
    "attention",
    "einsum",
    "tensordot",
    "lstm",
    "gru",
    "rnn",
    "cdist",
)
"""What the names of operators that multiply matrices have in common."""
_KNOWN = ("aten", "accelkit", "prims", "quantized_decomposed")


@dataclass(frozen=True)
class Work:
    """One forward.

    Attributes:
        operations: of its products. bytes: that it cannot avoid to read.
        by_operator: the operations by operator; empty where they were counted together.
        uncounted: operators whose operations are not known: there may be more.
    """

    operations: float
    bytes: float
    by_operator: Mapping[str, float] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Floor:
    """The least time.

    Attributes:
        ms: milliseconds. bound: what sets it, "operations" or "bytes".
        work: what has to be done. tflops, copy_tb_s: the measured rates, in 1e12 a second.
    """

    ms: float
    bound: str
    work: Work
    tflops: float
    copy_tb_s: float

    def reached(self, ms: float) -> str:
        """The floor, and its share of what was measured: `4.82 ms (3.55 TFLOP at 736 TFLOP/s), reached 72 %`."""
        if self.bound == "operations":
            sets = f"{_scaled(self.work.operations, 'FLOP')} at {_scaled(1e12 * self.tflops, 'FLOP')}/s"
        else:
            sets = f"{_scaled(self.work.bytes, 'B')} at {_scaled(1e12 * self.copy_tb_s, 'B')}/s"
        more = f"; not counted: {', '.join(self.work.uncounted)}" if self.work.uncounted else ""
        if self.ms > 1.05 * ms:  # nothing runs faster than the machine: its rate was measured while it was busy
            advice = "delete rates/ in the cache folder to measure again"
            return f"not known: the model ran faster than {sets}, measured while the machine was busy; {advice}"
        return f"{self.ms:.3g} ms ({sets} measured{more}), reached {100 * self.ms / ms:.2g} %"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def floor_of(work: Work, rates: Rates, precision: str) -> Floor:
    """The least time at these rates, which have to have the precision's."""
    by_operations = work.operations / rates.tflops[precision] / 1e9
    by_bytes = work.bytes / rates.copy_tb_s / 1e9
    bound = "operations" if by_operations >= by_bytes else "bytes"
    return Floor(max(by_operations, by_bytes), bound, work, rates.tflops[precision], rates.copy_tb_s)


# --- counting


def counted(call: Callable[[], object]) -> int:
    """The operations of a call, by running it; attention by its products, which its fused kernels would hide: for as long as it
    runs the whole process has them switched off.

    >>> counted(lambda: torch.nn.functional.linear(torch.empty(2, 3, device="meta"), torch.empty(5, 3, device="meta")))
    60
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return _counted(call)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _counted(call: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def work_of(graph: fx.GraphModule, precision: str) -> Work:
    """What one forward of a graph has to do, at its example's sizes where these are dynamic; nothing is run.

    Raises:
        KeyError: a precision whose numbers have no size in NUMBER_BYTES.
    """
    by_operator: dict[str, float] = {}
    uncounted: dict[str, None] = {}
    known: dict[str, float | None] = {}
    varying: set[fx.Node] = set()  # what depends on the inputs; the rest is computed once
    for node in graph.graph.nodes:
        if node.op != "placeholder" and not any(i in varying for i in node.all_input_nodes):
            continue
        varying.add(node)
        if node.op in ("placeholder", "get_attr", "output") or graphs.is_size(node) or _counts_nothing(node):
            continue
        operations = _operations_once(node, known)
        if operations is None:
            uncounted[_name(node)] = None
        elif operations:
            by_operator[_name(node)] = by_operator.get(_name(node), 0.0) + operations
    total = sum(by_operator.values())
    return Work(total, _bytes(graph, varying, NUMBER_BYTES[precision]), by_operator, tuple(uncounted))


def _name(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def _counts_nothing(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") in ("_operator", "math")  # getitem, arithmetic on sizes
    return target.namespace in _KNOWN and not any(word in target._schema.name for word in _WORDS)


def _operations_once(node: fx.Node, known: dict[str, float | None]) -> float | None:
    """Layers of a model are alike: what is known of one holds for the next."""
    try:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _shaped(graphs.val(n)))
    except ValueError:
        return None
    key = f"{node.target} {_sizes((args, kwargs))}"
    if key not in known:
        known[key] = _operations(node, args, kwargs)
    return known[key]


def _operations(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """None where they are not known."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        bound = graphs.bound_arguments(node) or {}
        query, key, value = (_shaped(graphs.val(bound[name])) for name in ("query", "key", "value"))
        return _attention(query, key, value, bool(bound["is_causal"]))
    if node.target is OPERATORS["attention"].overload:
        bound = graphs.bound_arguments(node) or {}
        query, key, value = (_shaped(graphs.val(bound[name])).transpose(1, 2) for name in ("query", "key", "value"))
        return _attention(query, key, value, bool(bound["causal"]))
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in _KNOWN:
        return None
    if (operator := operator_of(node)) is not None:
        target = operator.meaning
    try:
        return float(_counted(lambda: target(*args, **kwargs)))
    except (RuntimeError, NotImplementedError, ValueError):  # an operator that needs numbers, not only sizes
        return None


def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> float:
    """Of [..., heads, length, width] operands; a causal one needs no pair of a query with a later key."""
    length, keys = query.shape[-2], key.shape[-2]
    pairs = sum(min(i + 1, keys) for i in range(length)) if causal else length * keys
    return 2.0 * query.shape[:-2].numel() * pairs * (query.shape[-1] + value.shape[-1])


def _shaped(value: Any) -> Any:
    """A value without its numbers, dynamic sizes those of the example."""
    if isinstance(value, Tensor):
        return torch.empty([_hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_shaped(v) for v in value)
    return _hint(value)


def _hint(size: Any) -> Any:
    """A number, of a dynamic size the example's; ValueError where only a run knows it."""
    if not isinstance(size, torch.SymInt):
        return size
    if not size.node.has_hint():
        raise ValueError(f"{size} is known at run time only")
    return int(size.node.hint)


def _sizes(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v, value)


def _bytes(graph: fx.GraphModule, varying: set[fx.Node], number_bytes: int) -> float:
    """Of the inputs, and of the weights that what varies reads; of a table that is only looked up in, the rows."""
    read = set(varying)
    for node in reversed(graph.graph.nodes):  # weights that are prepared before they are read
        if any(user in read for user in node.users):
            read.add(node)
    total = 0.0
    for node in graph.graph.find_nodes(op="placeholder"):
        total += _width(value := _shaped(graphs.val(node)), number_bytes) * value.numel()
    seen: set[int] = set()
    for node, tensor in graphs.tensor_attributes(graph):
        if node not in read or (storage := tensor.untyped_storage()._cdata) in seen:
            continue
        seen.add(storage)
        total += _width(tensor, number_bytes) * _numbers_read(node, tensor)
    return total


def _numbers_read(node: fx.Node, tensor: Tensor) -> int:
    users = list(node.users)
    if any(user.target is not torch.ops.aten.embedding.default or user.args[0] is not node for user in users):
        return tensor.numel()
    try:
        indices = [(graphs.bound_arguments(user) or {})["indices"] for user in users]
        rows = sum(_shaped(graphs.val(one)).numel() for one in indices)
    except ValueError:
        rows = 1
    return int(min(rows, tensor.shape[0]) * tensor.shape[1])


def _width(tensor: Tensor, number_bytes: int) -> int:
    return number_bytes if tensor.is_floating_point() else tensor.element_size()


def _scaled(value: float, unit: str) -> str:
    """
    >>> _scaled(1.11e11, "FLOP"), _scaled(950.0, "B"), _scaled(4.25e12, "B")
    ('111 GFLOP', '950 B', '4.25 TB')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


# --- for the report


def tell_floors(variants: Sequence[Variant], reports: Sequence[VariantReport], precision: str) -> None:
    """Write each variant's floor into its report, or a note why there is none."""
    for variant, found in zip(variants, reports, strict=False):  # a model captured in pieces has reports alone
        floor = floor_for(variant, found, precision)
        if isinstance(floor, str):
            found.notes.append(floor)
        else:
            found.floor = floor


def floor_for(variant: Variant, found: VariantReport, precision: str) -> Floor | str | None:
    """The floor of a variant whose time was measured here; why there is none, or None where that needs no words."""
    program, graph = variant.program, variant.lowered.graph
    if "compiled" not in found.timings or precision not in NUMBER_BYTES or not program.inputs:
        return None
    if found.pieces and all(piece.origin == "artifact" for piece in found.pieces):
        return None  # the time is another machine's
    if any(record.meaning is not None for record in found.ledger):
        return "no floor: a pass changes what the model computes"
    if graph is not None and graph.graph.find_nodes(op="call_function", target=OPERATORS["pack_rows"].overload):
        return "no floor: tokens of padding are left out, and how many there are is known at run time only"
    if (rates := rates_of(program.inputs[0].device, precision)) is None:
        return None
    try:
        return floor_of(work_of(program.graph, precision), rates, precision)
    except ValueError as error:
        return f"no floor: {error}"
