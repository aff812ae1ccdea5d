"""linear(x, w) -> to(linear(to(x, bf16), to(w, bf16)), f32): the inside of the graph in bfloat16 or float16

Half the memory traffic, and the matrix units of current CPUs and GPUs. The graph's inputs and outputs keep their dtypes. What runs in
which dtype follows PyTorch's own `model.bfloat16()`, as far as a float32 graph tells what its author meant:

1. Weights and floating-point inputs are cast once; matrix products run in the low precision, everything else in what PyTorch's
   type promotion makes of its inputs.
2. What is made of integers, buffers and constants alone (positions, rotary angles, additive masks) stays float32 until it meets a
   low-precision activation and is cast there: position 4097 and the angle made of it have no bfloat16.
3. The author's own upcasts (`.float()`, `softmax(dtype=torch.float32)`) stay float32 until cast back; see `_author_casts`.
4. Mask constants out of the low precision's range are clamped to it; see `_mask_constants`.
5. Operators that lose too much, or that have no kernel, stay in float32 (`_precision_rules.KEEP`, with reasons), and so does what `keep`
   names. What they give is cast where it next meets the low precision.

float64, complex and integer values are left alone. The pass has to run before remove_no_ops, which would take the author's casts away,
and before fold_constants, which folds the casts of weights.
"""

from __future__ import annotations

import fnmatch
import operator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.pass_api import GraphPass, PassResult
from accelkit.precision import Precision, as_precision
from accelkit_passes._author_casts import leaves_module, module_paths, says_float32
from accelkit_passes._mask_constants import MaskConstants, operator_name
from accelkit_passes._precision_rules import (
    BATCH_NORMS, CASTS, COMPARISONS, KEEP, LOOK_UPS, MATRIX_PRODUCTS, MOVES, SAME_DTYPE, SHAPE_ONLY,
)  # fmt: skip

aten = torch.ops.aten


@dataclass(frozen=True)
class SetPrecision(GraphPass):
    """The inside of the graph in a low precision.

    Attributes:
        precision: "bf16" or "fp16" (float32 precisions leave the graph as it is).
        keep: what stays in float32: fnmatch patterns over node names (`linear_3`), operators (`aten.layer_norm`) and module paths
            (`encoder.layer.11.*`).

    Raises:
        InputError: an unknown precision.
    """

    precision: str | Precision = "bf16"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        as_precision(self.precision)

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        precision = as_precision(self.precision)
        if precision.dtype == torch.float32:
            return result
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op in ("call_module", "call_method"):
                result.refused(node, f"{node.target} holds a graph of its own, so the whole graph stays in float32")
                return result
        _Rewriter(graph, precision, self.keep, result).run()
        return result


class _Kind(Enum):
    """What a node's value is to this pass."""

    OTHER = "not float32 and not of the low precision: integers, float64, complex, sizes"
    WAITING = "float32, not an activation (weights, buffers, what is made of integers): cast where it meets one"
    LOW = "an activation in the low precision"
    WIDE = "a float32 activation, because an operator stays in float32: cast where it next meets the low precision"
    AUTHOR = "a float32 activation, because the author says so: promotes what it meets"


class _Rewriter:
    def __init__(self, graph: fx.GraphModule, precision: Precision, keep: tuple[str, ...], result: PassResult) -> None:
        self.graph, self.precision, self.dtype, self.keep, self.result = graph, precision, precision.dtype, keep, result
        self.original = {node: graphs.val(node) for node in graph.graph.nodes}
        self.kinds: dict[fx.Node, _Kind] = {}
        self.weights: set[fx.Node] = set()  # made of parameters, and WAITING
        self.runtime: set[fx.Node] = set()  # depends on the graph's inputs
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.before_cast: dict[fx.Node, fx.Node] = {}  # the author's upcast -> the low-precision value it was made of
        self.inferred: set[fx.Node] = set()
        self.used_patterns: set[str] = set()
        self.masks = MaskConstants(graph, self.dtype, result.rewrote)
        tensors = [v for v in self.original.values() if isinstance(v, torch._subclasses.FakeTensor)]
        self.mode = tensors[0].fake_mode if tensors else None
        self.outputs = [graphs.val(r) if isinstance(r, fx.Node) else r for r in graph.graph.output_node().args[0]]  # type: ignore[union-attr]
        self.moved_inputs = _moved_inputs(graph)

    def run(self) -> None:
        steps = {"placeholder": self.placeholder, "get_attr": self.attribute, "call_function": self.call, "output": self.output}
        for node in list(self.graph.graph.nodes):
            if node in self.moved_inputs:
                self.kinds[node] = _Kind.OTHER
            else:
                steps[node.op](node)
        for cast in reversed(list(self.casts.values())):
            if not cast.users:
                self.graph.graph.erase_node(cast)
        for pattern in self.keep:
            if pattern not in self.used_patterns:
                self.result.refused(pattern, "keep names no node, operator or module of this graph")

    # --- inputs, weights, outputs

    def placeholder(self, node: fx.Node) -> None:
        self.runtime.add(node)
        self.kinds[node] = _Kind.LOW if _is(node, torch.float32, self.dtype) else _Kind.OTHER

    def attribute(self, node: fx.Node) -> None:
        self.kinds[node] = _Kind.OTHER
        if _is(node, torch.float32):
            self.kinds[node] = _Kind.WAITING
            if isinstance(graphs.attribute(self.graph, str(node.target)), torch.nn.Parameter):
                self.weights.add(node)
        elif _is(node, self.dtype):
            self.kinds[node] = _Kind.LOW

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
        floats = [i for i in node.all_input_nodes if self.kinds[i] != _Kind.OTHER]
        name = operator_name(node)
        if node.target is operator.getitem:
            self.item(node)
        elif not name or (not floats and not self.is_wider(node)):
            self.kinds[node] = _Kind.WAITING if _is(node, torch.float32) else _Kind.OTHER
        elif graphs.is_mutating(node):
            self.mutation(node)
        elif name in CASTS and _is(node, torch.float32):
            self.float32_cast(node)
        elif name in CASTS:
            self.other_cast(node)
        elif name in SHAPE_ONLY:
            self.finish(node, node.args, node.kwargs, _Kind.WAITING)
        elif not self.is_active(node, floats):
            self.weights.update([node] if any(f in self.weights for f in floats) else [])
            self.kinds[node] = _Kind.WAITING if _is(node, torch.float32) else _Kind.OTHER
        elif reason := self.kept(node):
            self.stay_wide(node, reason)
        else:
            self.run_low(node, floats, name)

    def is_active(self, node: fx.Node, floats: list[fx.Node]) -> bool:
        """Whether the node computes an activation: from another, or from a weight and the graph's inputs."""
        if any(self.kinds[f] != _Kind.WAITING for f in floats):
            return True
        uses_weight = any(f in self.weights for f in floats)
        return uses_weight and (node in self.runtime or operator_name(node) in LOOK_UPS)

    def is_wider(self, node: fx.Node) -> bool:
        """Whether float64 or complex values go in: float32 that comes out is an activation again, if they were."""
        return any(_is(i, torch.float64, torch.complex64, torch.complex128) for i in node.all_input_nodes)

    def item(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source in self.inferred:
            self.set_value(node, graphs.val(source)[node.args[1]])
        inherited = self.kinds[source]
        self.kinds[node] = _Kind.LOW if _is(node, self.dtype) else inherited if _is(node, torch.float32) else _Kind.OTHER
        if self.kinds[node] == _Kind.LOW and not _is(node, self.dtype):
            self.kinds[node] = _Kind.WIDE
        if source in self.weights:
            self.weights.add(node)

    def mutation(self, node: fx.Node) -> None:
        """Memory keeps its dtype: what is written is cast to it. What is read back is cast where it meets the low precision."""
        if operator_name(node) != "copy_":  # which casts by itself
            self.rearrange(node, lambda value: self.wide(value, node))
        elif self.kinds[written := node.all_input_nodes[0]] == _Kind.LOW:
            node.args = (self.wide(written, node), *node.args[1:])
        self.finish(node, node.args, node.kwargs, _Kind.WIDE)

    def float32_cast(self, node: fx.Node) -> None:
        source = node.all_input_nodes[0]
        kind, before = self.kinds[source], self.original[source].dtype
        meant = False if operator_name(node) == "type_as" or node.target == aten.to.other else says_float32(node)
        if kind == _Kind.WAITING:
            self.kinds[node] = _Kind.AUTHOR if meant and source in self.weights else _Kind.WAITING
            self.weights.update([node] if source in self.weights else [])
        elif kind == _Kind.OTHER and not before.is_floating_point:
            self.kinds[node] = _Kind.WAITING
        elif before == torch.float32 and (source.op == "placeholder" or (kind == _Kind.LOW and meant is False)):
            self.to_dtype(node, self.dtype)  # a no-op once more
        elif source in self.before_cast and meant is not False:
            self.stand_in(node, source)  # x.float() twice: nobody casts back what was only just cast
            self.kinds[node] = _Kind.AUTHOR
        elif kind == _Kind.LOW:
            if before == torch.float32:
                self.before_cast[node] = source
            self.to_dtype(node, torch.float32)
            self.kinds[node] = _Kind.AUTHOR
        elif kind == _Kind.OTHER and source not in self.runtime:
            self.kinds[node] = _Kind.WAITING
        else:  # AUTHOR, WIDE, or float64
            self.to_dtype(node, torch.float32 if meant else self.dtype)

    def other_cast(self, node: fx.Node) -> None:
        """A cast to an integer, to float64, or already to the low precision."""
        source = node.all_input_nodes[0]
        self.kinds[node] = _Kind.LOW if _is(node, self.dtype) else _Kind.OTHER
        if self.kinds[node] == _Kind.LOW:
            self.casts.setdefault((source, self.dtype), node)
        elif source.op != "placeholder":  # an input is cast from what it really holds
            self.finish(node, node.args, node.kwargs)

    def run_low(self, node: fx.Node, floats: list[fx.Node], name: str) -> None:
        kinds = {self.kinds[f] for f in floats}
        self.masks.clamp_arguments(node)
        by_author = _Kind.AUTHOR in kinds
        only_by_author = by_author and not kinds & {_Kind.LOW, _Kind.WIDE} and not any(
            f in self.weights and self.kinds[f] == _Kind.WAITING for f in floats
        )  # fmt: skip
        if name in MATRIX_PRODUCTS:
            wide = only_by_author
        elif name in SAME_DTYPE:
            wide = self.kinds[floats[0]] == _Kind.AUTHOR
        elif name in BATCH_NORMS:
            return self.batch_norm(node, floats)
        elif name in COMPARISONS or by_author:
            return self.try_low(node, lambda value: self.natural(value, node))
        else:
            wide = kinds <= {_Kind.WIDE, _Kind.WAITING} and not any(f in self.weights for f in floats)
        if wide:
            self.rearrange(node, lambda value: self.wide(value, node))
            return self.finish(node, node.args, node.kwargs)
        return self.try_low(node, lambda value: self.narrow(value, node))

    def batch_norm(self, node: fx.Node, floats: list[fx.Node]) -> None:
        source = floats[0]
        first = self.natural(source, node) if self.kinds[source] == _Kind.AUTHOR else self.narrow(source, node)
        self.try_low(node, lambda value: first if value is source else self.wide(value, node))

    def try_low(self, node: fx.Node, change: Any) -> None:
        arguments = fx.node.map_arg((node.args, node.kwargs), change)
        try:
            self.finish(node, *arguments)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            self.stay_wide(node, f"it does not run in {self.precision}: {str(error).splitlines()[0]}")

    def stay_wide(self, node: fx.Node, reason: str) -> None:
        self.result.refused(node, reason)
        self.rearrange(node, lambda value: self.wide(value, node))
        self.finish(node, node.args, node.kwargs)

    def finish(self, node: fx.Node, args: Any, kwargs: Any, kind: _Kind | None = None) -> None:
        """Give the node its arguments, infer its value, and say what it is; `kind` is for a float32 result."""
        edited = (args, kwargs) != (node.args, node.kwargs)
        stale = edited or any(i in self.inferred for i in node.all_input_nodes)
        natural = fx.node.map_arg((args, kwargs), lambda value: self.natural(value, node))
        edited = edited or natural != (node.args, node.kwargs)
        value = self.infer(node, *natural) if stale or edited else graphs.val(node)
        floats = [i for i in node.all_input_nodes if self.kinds[i] != _Kind.OTHER]
        node.args, node.kwargs = natural
        if stale or edited:
            self.set_value(node, value)
            self.result.rewrote(node)
        if kind is None:
            asked = (graphs.bound_arguments(node) or {}).get("dtype") == torch.float32
            author = asked or any(self.kinds[f] == _Kind.AUTHOR for f in floats)
            kind = _Kind.AUTHOR if author else _Kind.WIDE
        tensors = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]
        dtypes = {v.dtype for v in tensors}
        self.kinds[node] = _Kind.LOW if self.dtype in dtypes else kind if torch.float32 in dtypes else _Kind.OTHER

    # --- values in one dtype or the other

    def natural(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The value as the low-precision graph has it."""
        return self.narrow(value, at) if value.op == "placeholder" and self.kinds.get(value) == _Kind.LOW else value

    def narrow(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The float32 value in the low precision (others as they are), for a use at node `at`."""
        if self.kinds.get(value, _Kind.OTHER) == _Kind.OTHER or not _is(value, torch.float32):
            return value
        if (value, self.dtype) in self.casts:
            return self.casts[value, self.dtype]
        if value in self.before_cast:
            return self.natural(self.before_cast[value], at)
        if value in self.weights and operator_name(value) in MOVES and len(value.all_input_nodes) == 1:
            return self.narrow_move(value, at)
        saturate = self.kinds[value] == _Kind.WAITING and self.masks.prepare(value)
        value = self.masks.replaced.get(value, value)
        source = value
        if saturate:
            with self.graph.graph.inserting_before(at):
                source = self.new_node(aten.clamp.default, (value, -self.masks.limit, self.masks.limit), at)
            self.kinds[source] = _Kind.WAITING
        self.casts[value, self.dtype] = cast = self.cast(source, self.dtype, at)
        return cast

    def narrow_move(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """transpose(weight) in the low precision is transpose(weight in the low precision): the float32 weight is not needed."""
        inner = self.narrow(value.all_input_nodes[0], at)
        with self.graph.graph.inserting_before(at):
            arguments = fx.node.map_arg((value.args, value.kwargs), lambda _: inner)
            self.casts[value, self.dtype] = moved = self.new_node(value.target, arguments[0], at, arguments[1])
        return moved

    def wide(self, value: fx.Node, at: fx.Node) -> fx.Node:
        """The low-precision value in float32 (others as they are), for a use at node `at`."""
        if self.kinds.get(value) != _Kind.LOW or not isinstance(self.original.get(value), torch.Tensor):
            return value
        if self.original[value].dtype != torch.float32 or graphs.val(value).dtype != self.dtype:
            return value
        return self.cast(value, torch.float32, at)

    def cast(self, value: fx.Node, dtype: torch.dtype, at: fx.Node) -> fx.Node:
        if (value, dtype) not in self.casts:
            first = next(n for n in self.graph.graph.nodes if n.op not in ("placeholder", "get_attr"))
            with self.graph.graph.inserting_before(first if value.op == "placeholder" else at):
                self.casts[value, dtype] = self.new_node(aten.to.dtype, (value, dtype), at)
        return self.casts[value, dtype]

    def to_dtype(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Turn a cast that did nothing into one that gives `dtype`."""
        device = (graphs.bound_arguments(node) or {}).get("device")
        source = node.all_input_nodes[0]
        if dtype == self.dtype and (device is None or device == graphs.val(source).device):
            self.stand_in(node, self.narrow(source, node))
            return
        bound = graphs.bound_arguments(node) or {}
        if "dtype" in bound:
            position = next(i for i, a in enumerate(node.target._schema.arguments) if a.name == "dtype")  # type: ignore[union-attr]
            if position < len(node.args):
                node.update_arg(position, dtype)
            else:
                node.update_kwarg("dtype", dtype)
        else:
            node.target, node.args, node.kwargs = aten.to.dtype, (source, dtype), {}
        self.finish(node, node.args, node.kwargs, _Kind.AUTHOR)

    # --- mechanics

    def stand_in(self, node: fx.Node, value: fx.Node) -> None:
        """Let `value` take the place of a cast that has nothing to do."""
        node.replace_all_uses_with(value)
        self.graph.graph.erase_node(node)
        self.result.rewrote(node)

    def rearrange(self, node: fx.Node, change: Any) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), change)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs = args, kwargs
            self.result.rewrote(node)

    def infer(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        values = fx.node.map_arg((args, kwargs), graphs.val)
        assert self.mode is not None
        with self.mode, torch.no_grad():
            return node.target(*values[0], **values[1])  # type: ignore[operator]

    def set_value(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        self.inferred.add(node)

    def new_node(self, target: Any, args: Any, at: fx.Node, kwargs: Any = None) -> fx.Node:
        node = self.graph.graph.call_function(target, args, kwargs or {})
        node.meta = {k: v for k, v in at.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.set_value(node, self.infer(node, node.args, node.kwargs))
        self.kinds[node] = _Kind.LOW if _is(node, self.dtype) else _Kind.WIDE
        return node

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


def _is(node: fx.Node, *dtypes: torch.dtype) -> bool:
    value = graphs.val(node)
    return isinstance(value, torch.Tensor) and value.dtype in dtypes


def _moved_inputs(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes that only move a floating-point input to an output: they stay exact."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        moves = operator_name(node) in MOVES and len(node.all_input_nodes) == 1 and _is(node, torch.float32)
        if moves and all(user.op == "output" or user in found for user in node.users):
            found.add(node)
    reached: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node in found and (node.args[0] in reached or node.all_input_nodes[0].op == "placeholder"):
            reached.add(node)
    return reached
