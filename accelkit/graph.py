"""Questions about accelkit's graphs, asked in one place: text, normalised arguments, metadata, mutation, aliasing.

An accelkit graph is a flat torch.fx.GraphModule: placeholders are tensors; `get_attr` nodes are parameters, buffers and
constants; `call_function` nodes are operator overloads (`aten`, `accelkit`, ...) or Python arithmetic on sizes; the
output is one flat tuple. Every tensor node carries its fake tensor in `node.meta["val"]`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b1",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def val(node: fx.Node) -> Any:
    """The node's fake tensor (or size, or tuple of them); KeyError-free: None where it was never inferred."""
    return node.meta.get("val")


def attribute(graph: fx.GraphModule, target: str) -> Any:
    """The parameter, buffer, constant or submodule that a get_attr target names."""
    value: Any = graph
    for part in target.split("."):
        value = getattr(value, part)
    return value


def tensor_attributes(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """Each get_attr node that names a tensor, with the tensor."""
    for node in graph.graph.find_nodes(op="get_attr"):
        value = attribute(graph, str(node.target))
        if isinstance(value, torch.Tensor):
            yield node, value


def set_attribute(graph: fx.GraphModule, hint: str, value: torch.Tensor) -> str:
    """Register `value` as a new buffer under a free name that starts with `hint`; returns that name, for get_attr."""
    base = "".join(c if c.isalnum() else "_" for c in hint)
    name, number = base, 0
    while hasattr(graph, name):
        number += 1
        name = f"{base}_{number}"
    graph.register_buffer(name, value)
    return name


def bound_arguments(node: fx.Node) -> dict[str, Any] | None:
    """All arguments by their schema's names, defaults filled in; None for what is no operator overload.

    `aten.layer_norm(x, [8], w, b)` gives {"input": x, "normalized_shape": [8], "weight": w, "bias": b, ...}.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


# Their schemas say nothing of it, but in training mode they update the running statistics: argument of the mode.
_UPDATES_RUNNING_STATISTICS = {
    "aten::batch_norm": "training", "aten::native_batch_norm": "training", "aten::instance_norm": "use_input_stats",
}  # fmt: skip


def is_mutating(node: fx.Node) -> bool:
    """Whether the node writes into one of its arguments."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    mode = _UPDATES_RUNNING_STATISTICS.get(node.target._schema.name)
    if mode is not None:
        bound = bound_arguments(node) or {}
        return bool(bound[mode]) and bound["running_mean"] is not None
    return node.target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the node may differ (dropout that is on, rand, bernoulli, ...)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    bound = bound_arguments(node) or {}
    if "train" in bound and isinstance(bound["train"], bool):
        return bool(bound["train"] and bound.get("p") != 0)
    if "dropout_p" in bound:
        return bool(bound["dropout_p"] != 0)
    return True


def is_pure(node: fx.Node) -> bool:
    """Whether the node can be dropped, moved or shared: no mutation, randomness or side effect."""
    if node.op in ("placeholder", "output", "call_module", "call_method"):
        return False
    if is_mutating(node) or is_random(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload):  # fx calls every dropout impure, even one that is off
        return bool(node.target._schema.returns)  # an operator without a result is there for its effect
    return not node.is_impure()


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a Python number (a size, or arithmetic on sizes), not a tensor."""
    if node.op != "call_function":
        return False
    if node.target in (torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default):
        return True
    value = val(node)
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def aliases(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the node's result may share (views, in-place results, getitem of such)."""
    if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
        return [source] if not _results_own_memory(source) else _same_item_before(node, source)
    bound = bound_arguments(node)
    if bound is None or not isinstance(node.target, torch._ops.OpOverload):
        return []
    found = []
    for argument in node.target._schema.arguments:
        value = bound[argument.name]
        if argument.alias_info is not None and isinstance(value, fx.Node):
            found.append(value)
    if not found and node.target._schema.name in _MAY_RETURN_INPUT:
        found = node.all_input_nodes
    return found


def _results_own_memory(node: fx.Node) -> bool:
    """Whether each of the node's results is memory of its own: the contract of accelkit's fused operators."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "accelkit"


def _same_item_before(item: fx.Node, source: fx.Node) -> list[fx.Node]:
    same = [user for user in source.users if user.target is operator.getitem and user.args[1] == item.args[1]]
    return [] if same[0] is item else same[:1]


# Composite operators whose schema says nothing of aliasing, but that return (a view of) an input when there is nothing
# to do.
_MAY_RETURN_INPUT = frozenset(
    f"aten::{name}"
    for name in (
        "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "type_as", "lift",
        "conj_physical", "dequantize", "einsum", "meshgrid", "broadcast_tensors", "atleast_1d", "atleast_2d",
        "atleast_3d", "chain_matmul", "cartesian_prod", "sum_to_size", "unsafe_split", "unsafe_chunk",
        "unsafe_split_with_sizes", "_unsafe_view",
    )
)  # fmt: skip


def memory_family(node: fx.Node) -> frozenset[fx.Node]:
    """The nodes whose memory the node's result may share: itself, what it is a view of, and so on upwards."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(aliases(current))
    return frozenset(seen)


def storage_roots(node: fx.Node) -> frozenset[fx.Node]:
    """The placeholders and get_attr nodes whose memory the node's result may share."""
    return frozenset(n for n in memory_family(node) if n.op in ("placeholder", "get_attr"))


def written_roots(graph: fx.Graph) -> frozenset[fx.Node]:
    """The placeholders and get_attr nodes that the graph writes to."""
    written = [argument for node in graph.nodes if is_mutating(node) for argument in aliases(node)]
    return frozenset(root for argument in written for root in storage_roots(argument))


def inferred(target: Any, args: Any, kwargs: Any, mode: Any) -> Any:
    """What an operator gives for these arguments (fake tensors or plain values), under the fake mode `mode`.

    No shape guard comes of it: composite operators take their Python forms (the C++ ones ask for concrete sizes), and
    what an operator's own meta function asks about sizes was asked when the model was captured.
    """
    from torch._dispatch.python import enable_python_dispatcher

    suppressed = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with mode, torch.no_grad(), enable_python_dispatcher(), suppressed:
        return target(*args, **kwargs)


def laid_out(graph: fx.GraphModule) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Brings inputs into the memory layout that the graph was captured with, where that was the plain one.

    Export drops `x.contiguous()` where the example was contiguous, and `x.view(...)` then fails on a transposed input.
    """
    fakes = [val(node) for node in graph.graph.find_nodes(op="placeholder")]
    plain = [i for i, fake in enumerate(fakes) if isinstance(fake, torch.Tensor) and fake.is_contiguous()]

    def lay_out(inputs: Sequence[Any]) -> Sequence[Any]:
        wrong = [i for i in plain if not inputs[i].is_contiguous()]
        if not wrong:
            return inputs
        return [value.contiguous() if i in wrong else value for i, value in enumerate(inputs)]

    return lay_out


def describe_value(value: Any) -> str:
    """`f32[s0, 8]` for a tensor, the number for a size, a tuple of those for several results."""
    if isinstance(value, torch.Tensor):
        return f"{SHORT.get(value.dtype, str(value.dtype))}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(describe_value(v) for v in value)})"
    return str(value)


def describe_node(node: fx.Node) -> str:
    """`linear_3 (aten.linear.default -> f32[1, 128, 768])`: how reports and errors name a node."""
    return f"{node.name} ({node.target} -> {describe_value(val(node))})"


def graph_text(graph: fx.GraphModule) -> str:
    """The graph as stable text for golden tests: one line a node, values renumbered, dtypes and shapes included.

    ```
    %x: f32[2, 8] = input
    %weight: f32[4, 8] = attribute weight
    %0: f32[2, 4] = aten.linear(%x, %weight)
    return (%0)
    ```
    """
    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.graph.nodes:
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            lines.append(f"return ({', '.join(_argument(r, names) for r in results)})")
            continue
        if node.op in ("placeholder", "get_attr"):
            names[node] = f"%{node.target}"
            lines.append(
                f"{names[node]}: {describe_value(val(node))} = {'input' if node.op == 'placeholder' else 'attribute'}"
            )
            continue
        names[node] = f"%{sum(not n.startswith('%_') and n[1:].isdigit() for n in names.values())}"
        arguments = [_argument(a, names) for a in node.args] + [
            f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()
        ]
        lines.append(f"{names[node]}: {describe_value(val(node))} = {_target(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        text = str(node.target)
        return text.removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    return str(value)
