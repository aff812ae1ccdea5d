"""linear(x, w) -> to(linear(to(x, bf16), to(w, bf16)), f32): the inside of the graph in bfloat16 or float16

Half the memory traffic, and the matrix units of current CPUs and GPUs. The graph's inputs and outputs keep their
dtypes. What runs in which dtype follows PyTorch's own `model.bfloat16()`, as far as a float32 graph tells what its
author meant:

1. Weights and floating-point inputs are cast once; matrix products run in the low precision, everything else in what
   PyTorch's type promotion makes of its inputs.
2. What is made of integers, buffers and constants alone (positions, rotary angles, additive masks) stays float32 until
   it meets a low-precision activation and is cast there: position 4097 and the angle made of it have no bfloat16.
3. The author's own upcasts (`.float()`, `softmax(dtype=torch.float32)`) stay float32 until cast back; see
   `_author_casts`.
4. Mask constants out of the low precision's range are clamped to it; see `_mask_constants`.
5. Operators that lose too much, or that have no kernel, stay in float32 (`_precision_rules.KEEP`, with reasons), and
   so does what `keep` names. What they give is cast where it next meets the low precision.
6. In float16, what the float32 run of the example shows to be beyond 65504 stays in float32, with all that reads it;
   see `_overflow`. bfloat16 ends where float32 does.

float64, complex and integer values are left alone. The pass has to run before remove_no_ops, which would take the
author's casts away, and before fold_constants, which folds the casts of weights.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_api import GraphPass, PassResult
from accelkit.precision import Precision, as_precision
from accelkit_passes._author_casts import leaves_module, module_paths, says_float32
from accelkit_passes._mask_constants import operator_name
from accelkit_passes._overflow import Overflow
from accelkit_passes._precision_rules import (
    BATCH_NORMS,
    CASTS,
    COMPARISONS,
    KEEP,
    LOOK_UPS,
    MATRIX_PRODUCTS,
    MOVES,
    SAME_DTYPE,
    SHAPE_ONLY,
)  # fmt: skip
from accelkit_passes._precision_values import Kind, Values, is_of

aten = torch.ops.aten


@dataclass(frozen=True)
class SetPrecision(GraphPass):
    """The inside of the graph in a low precision.

    Attributes:
        precision: "bf16" or "fp16" (float32 precisions leave the graph as it is). keep: what stays in float32: fnmatch
        patterns over node names (`linear_3`), operators (`aten.layer_norm`) and module paths
            (`encoder.layer.11.*`).

    Raises:
        InputError: an unknown precision.
    """

    precision: str | Precision = "bf16"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        as_precision(self.precision)

    def wants_ranges(self, graph: fx.GraphModule) -> Mapping[fx.Node, float]:
        precision = as_precision(self.precision)
        if not precision.overflows or _impossible(graph):
            return {}
        return Overflow(graph, precision.dtype).wanted()

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        precision = as_precision(self.precision)
        if precision.dtype == torch.float32:
            return result
        if impossible := _impossible(graph):
            node, reason = impossible
            result.refused(node, f"{reason}, so the whole graph stays in float32")
            return result
        _Rewriter(graph, precision, self.keep, result).run()
        return result


class _Rewriter(Values):
    """Walks the graph once, from inputs to outputs."""

    def __init__(self, graph: fx.GraphModule, precision: Precision, keep: tuple[str, ...], result: PassResult) -> None:
        super().__init__(graph, precision.dtype, result)
        self.precision, self.keep = precision, keep
        self.runtime: set[fx.Node] = set()  # depends on the graph's inputs
        self.used_patterns: set[str] = set()
        self.overflow = Overflow(graph, precision.dtype)
        self.saturating = self.overflow.saturating()
        for node in graph.graph.nodes:
            if self.overflow.reason(node):
                self.masks.protect(node)
        self.outputs = [graphs.val(r) if isinstance(r, fx.Node) else r for r in graph.graph.output_node().args[0]]  # type: ignore[union-attr]
        self.moved_inputs = _moved_inputs(graph)

    def run(self) -> None:
        steps = {
            "placeholder": self.placeholder,
            "get_attr": self.attribute,
            "call_function": self.call,
            "output": self.output,
        }
        for node in list(self.graph.graph.nodes):
            if node in self.moved_inputs:
                self.kinds[node] = Kind.OTHER
            else:
                steps[node.op](node)
        for unused in reversed([one for one in self.casts.values() if not one.users]):
            self.graph.graph.erase_node(unused)
        for pattern in self.keep:
            if pattern not in self.used_patterns:
                self.result.refused(pattern, "keep names no node, operator or module of this graph")

    # --- inputs, weights, outputs

    def placeholder(self, node: fx.Node) -> None:
        self.runtime.add(node)
        self.kinds[node] = Kind.LOW if is_of(node, torch.float32, self.dtype) else Kind.OTHER
        if reason := self.overflow.reason(node):
            self.kinds[node] = Kind.WIDE
            self.result.refused(node, reason)
            self.overflow.stayed(node)

    def attribute(self, node: fx.Node) -> None:
        self.kinds[node] = Kind.OTHER
        if is_of(node, torch.float32):
            self.kinds[node] = Kind.WAITING
            if isinstance(graphs.attribute(self.graph, str(node.target)), torch.nn.Parameter):
                self.weights.add(node)
        elif is_of(node, self.dtype):
            self.kinds[node] = Kind.LOW

    def output(self, node: fx.Node) -> None:
        def restored(value: Any, before: Any) -> Any:
            if isinstance(before, torch.Tensor) and graphs.val(value).dtype != before.dtype:
                return self.cast(value, before.dtype, node)
            return value

        (results,) = node.args
        assert isinstance(results, (tuple, list))
        node.args = (tuple(restored(r, b) for r, b in zip(results, self.outputs, strict=True)),)

    # --- operators

    def call(self, node: fx.Node) -> None:
        if any(i in self.runtime for i in node.all_input_nodes) or graphs.is_random(node):
            self.runtime.add(node)
        for value in node.all_input_nodes:
            if value in self.before_cast and leaves_module(value, node):
                node.replace_input_with(value, self.before_cast[value])
        floats = [i for i in node.all_input_nodes if self.kinds[i] != Kind.OTHER]
        name = operator_name(node)
        if node.target is operator.getitem:
            self.item(node)
        elif not name or (not floats and not self.is_wider(node)):
            self.kinds[node] = Kind.WAITING if is_of(node, torch.float32) else Kind.OTHER
        elif graphs.is_mutating(node):
            self.mutation(node)
        elif name in CASTS and is_of(node, torch.float32):
            self.float32_cast(node)
        elif name in CASTS:
            self.other_cast(node)
        elif name in SHAPE_ONLY:
            self.finish(
                node, *fx.node.map_arg((node.args, node.kwargs), lambda value: self.natural(value, node)), Kind.WAITING
            )
        elif not self.is_active(node, floats):
            self.weights.update([node] if any(f in self.weights for f in floats) else [])
            self.kinds[node] = Kind.WAITING if is_of(node, torch.float32) else Kind.OTHER
        elif reason := self.kept(node):
            self.stay_wide(node, reason)
        elif reason := self.overflow.reason(node):
            self.overflow.stayed(node)
            by_author = all(self.kinds[f] == Kind.AUTHOR for f in floats)  # who has it in float32 anyway
            self.stay_wide(node, "" if by_author else reason)
        else:
            self.run_low(node, floats, name)

    def is_active(self, node: fx.Node, floats: list[fx.Node]) -> bool:
        """Whether the node computes an activation: from another, or from a weight and the graph's inputs."""
        if any(self.kinds[f] != Kind.WAITING for f in floats):
            return True
        uses_weight = any(f in self.weights for f in floats)
        return uses_weight and (node in self.runtime or operator_name(node) in LOOK_UPS)

    def is_wider(self, node: fx.Node) -> bool:
        """Whether float64 or complex values go in: float32 that comes out is an activation again, if they were."""
        return any(is_of(i, torch.float64, torch.complex64, torch.complex128) for i in node.all_input_nodes)

    def item(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source in self.inferred:
            self.set_value(node, graphs.val(source)[node.args[1]])
        inherited = self.kinds[source]
        self.kinds[node] = (
            Kind.LOW if is_of(node, self.dtype) else inherited if is_of(node, torch.float32) else Kind.OTHER
        )
        if self.kinds[node] == Kind.LOW and not is_of(node, self.dtype):
            self.kinds[node] = Kind.WIDE
        if source in self.weights:
            self.weights.add(node)

    def mutation(self, node: fx.Node) -> None:
        """Memory keeps its dtype: what is written is cast to it. What is read back is cast where it meets the low
        precision."""
        if operator_name(node) != "copy_":  # which casts by itself
            self.rearrange(node, lambda value: self.wide(value, node))
        elif self.kinds[written := node.all_input_nodes[0]] == Kind.LOW:
            node.args = (self.wide(written, node), *node.args[1:])
        self.finish(node, node.args, node.kwargs, Kind.WIDE)

    def float32_cast(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        kind = self.kinds[source]
        before = self.original[source].dtype if source in self.original else torch.float32  # the rest is our own casts
        meant = False if operator_name(node) == "type_as" or node.target == aten.to.other else says_float32(node)
        if kind == Kind.WAITING:
            self.kinds[node] = Kind.AUTHOR if meant and source in self.weights else Kind.WAITING
            self.weights.update([node] if source in self.weights else [])
        elif kind == Kind.OTHER and not before.is_floating_point:
            self.kinds[node] = Kind.WAITING
        elif before == torch.float32 and (source.op == "placeholder" or (kind == Kind.LOW and meant is False)):
            self.back_to_low(node)  # a no-op once more
        elif source in self.before_cast and meant is not False:
            self.stand_in(node, source)  # x.float() twice: nobody casts back what was only just cast
            self.kinds[node] = Kind.AUTHOR
        elif kind == Kind.LOW:
            if before == torch.float32:
                self.before_cast[node] = source
            self.to_dtype(node, torch.float32)
            self.kinds[node] = Kind.AUTHOR
        elif kind == Kind.OTHER and source not in self.runtime:
            self.kinds[node] = Kind.WAITING
        elif meant:  # AUTHOR, WIDE, or float64
            self.to_dtype(node, torch.float32)
        else:
            self.back_to_low(node)

    def back_to_low(self, node: fx.Node) -> None:
        """The author casts back to what the activations have; where that cannot hold the values, it stays float32."""
        if not (reason := self.overflow.reason(node)):
            return self.to_dtype(node, self.dtype)
        self.result.refused(node, reason)
        self.overflow.stayed(node)
        return self.finish(node, node.args, node.kwargs, Kind.WIDE)

    def to_dtype(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Turn a cast that did nothing into one that gives `dtype`."""
        device = (graphs.bound_arguments(node) or {}).get("device")
        source = node.all_input_nodes[0]
        if dtype == self.dtype and (device is None or device == graphs.val(source).device):
            return self.stand_in(node, self.narrow(source, node))
        bound = graphs.bound_arguments(node) or {}
        if "dtype" in bound:
            position = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == "dtype")  # type: ignore[union-attr]
            if position < len(node.args):
                node.update_arg(position, dtype)
            else:
                node.update_kwarg("dtype", dtype)
        else:
            node.target, node.args, node.kwargs = aten.to.dtype, (source, dtype), {}
        self.finish(node, node.args, node.kwargs, Kind.AUTHOR)

    def other_cast(self, node: fx.Node) -> None:
        """A cast to an integer, to float64, or already to the low precision."""
        source = node.all_input_nodes[0]
        self.kinds[node] = Kind.LOW if is_of(node, self.dtype) else Kind.OTHER
        if self.kinds[node] == Kind.LOW:
            self.casts.setdefault((source, self.dtype), node)
        elif source.op != "placeholder":  # an input is cast from what it really holds
            self.finish(node, node.args, node.kwargs)

    def run_low(self, node: fx.Node, floats: list[fx.Node], name: str) -> None:
        kinds = {self.kinds[f] for f in floats}
        self.masks.clamp_arguments(node)
        by_author = Kind.AUTHOR in kinds
        only_by_author = by_author and not kinds & {Kind.LOW, Kind.WIDE} and not any(
            f in self.weights and self.kinds[f] == Kind.WAITING for f in floats
        )  # fmt: skip
        if name in MATRIX_PRODUCTS:
            wide = only_by_author
        elif name in SAME_DTYPE:
            wide = self.kinds[floats[0]] == Kind.AUTHOR
        elif name in BATCH_NORMS:
            return self.batch_norm(node, floats)
        elif name in COMPARISONS or by_author:
            return self.try_low(node, lambda value: self.natural(value, node))
        else:
            wide = kinds <= {Kind.WIDE, Kind.WAITING} and not any(f in self.weights for f in floats)
        if wide:
            self.rearrange(node, lambda value: self.wide(value, node))
            return self.finish(node, node.args, node.kwargs)
        return self.try_low(node, lambda value: self.narrow(value, node))

    def batch_norm(self, node: fx.Node, floats: list[fx.Node]) -> None:
        source = floats[0]
        first = self.natural(source, node) if self.kinds[source] == Kind.AUTHOR else self.narrow(source, node)
        self.try_low(node, lambda value: first if value is source else self.wide(value, node))

    def try_low(self, node: fx.Node, change: Any) -> None:
        arguments = fx.node.map_arg((node.args, node.kwargs), change)
        try:
            self.finish(node, *arguments)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            self.stay_wide(node, f"it does not run in {self.precision}: {str(error).splitlines()[0]}")

    def stay_wide(self, node: fx.Node, reason: str) -> None:
        if reason:
            self.result.refused(node, reason)
        self.rearrange(node, lambda value: self.wide(value, node))
        self.finish(node, node.args, node.kwargs)

    def finish(self, node: fx.Node, args: Any, kwargs: Any, kind: Kind | None = None) -> None:
        """Give the node its arguments, infer its value, and say what it is; `kind` is for a float32 result."""
        stale = (args, kwargs) != (node.args, node.kwargs) or any(i in self.inferred for i in node.all_input_nodes)
        value = self.infer(node, args, kwargs) if stale else graphs.val(node)
        floats = [i for i in node.all_input_nodes if self.kinds[i] != Kind.OTHER]
        if stale:
            node.args, node.kwargs = args, kwargs
            self.set_value(node, value)
            self.result.rewrote(node)
        if kind is None:
            asked = (graphs.bound_arguments(node) or {}).get("dtype") == torch.float32
            author = asked or any(self.kinds[f] == Kind.AUTHOR for f in floats)
            kind = Kind.AUTHOR if author else Kind.WIDE
        tensors = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]
        dtypes = {v.dtype for v in tensors}
        self.kinds[node] = Kind.LOW if self.dtype in dtypes else kind if torch.float32 in dtypes else Kind.OTHER

    def kept(self, node: fx.Node) -> str:
        """Why the node stays in float32; empty where it need not."""
        full = str(node.target)
        names = [full, full.rpartition(".")[0], node.name, *module_paths(node)]
        for pattern in self.keep:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self.used_patterns.add(pattern)
                return f"kept in float32 by {pattern!r}"
        for rule in KEEP:
            if self.precision.name in rule.precisions and any(fnmatch.fnmatchcase(names[1], p) for p in rule.operators):
                return f"{names[1]} stays in float32: {rule.reason}"
        if not full.startswith(("aten.", "prims.", "accelkit.")):
            return f"{names[1]} stays in float32: whether its kernel takes {self.precision} is unknown"
        return ""


def _impossible(graph: fx.GraphModule) -> tuple[fx.Node, str] | None:
    """The node that makes the pass leave the whole graph alone, and why."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op in ("call_module", "call_method"):
            return node, f"{node.target} holds a graph of its own"
    rereads = _read_after_write(graph)
    return None if rereads is None else (rereads, "it reads memory that the graph writes to before")


def _read_after_write(graph: fx.GraphModule) -> fx.Node | None:
    """A node that reads an input or buffer after the graph has written to it: a cast made earlier would be out of
    date."""
    written: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if (
            written
            and node.op == "call_function"
            and any(graphs.storage_roots(i) & written for i in node.all_input_nodes)
        ):
            return cast("fx.Node", node)
        if graphs.is_mutating(node):
            written |= {root for i in graphs.aliases(node) for root in graphs.storage_roots(i)}
    return None


def _moved_inputs(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes that only move a floating-point input to an output: they stay exact."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        moves = operator_name(node) in MOVES and len(node.all_input_nodes) == 1 and is_of(node, torch.float32)
        if moves and all(user.op == "output" or user in found for user in node.users):
            found.add(node)
    reached: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node in found and (node.args[0] in reached or node.all_input_nodes[0].op == "placeholder"):
            reached.add(node)
    return reached
