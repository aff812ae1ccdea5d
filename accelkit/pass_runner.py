"""Runs passes over a graph, checks each one's work, and writes the ledger.

    graph --pass--> lint, infer what is new, compare with before --> next pass

The invariants, held after every pass (a broken one is a PassError that names the pass and the node):

1. the graph is well formed (fx's lint), and every node's fake tensor can be inferred;
2. inputs and outputs have the dtypes, shapes and devices that they had;
3. no new shape guard: a dynamic dimension is not frozen by a pass that asked `if size >= 128`;
4. nothing is written to that was not written to before, and no output newly shares memory with an input, a weight or
   another output;
5. what changed is reported: a pass that rewrites in silence is a PassError too.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.changed_meaning import MeaningChange, snapshot
from accelkit.errors import AccelkitError, PassError
from accelkit.pass_api import GraphPass, OnnxPass, OpenResult, PassResult, Refusal
from accelkit.quantization.emulation import Emulation

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class PassRecord:
    """One line of the ledger.

    Attributes:
        name: the pass with its options.
        rewrites: what was rewritten, by node name.
        refusals: what was not, and why.
        nodes_before, nodes_after: operators in the graph (inputs and weights are not counted).
        seconds: time taken, the invariants' checks included.
        open: where outputs are not the model's own, by the pass's design; not kept in files.
        meaning: how the pass changed what the graph computes, where that is its design; not kept in files.
        emulation: the graph before and after a pass that quantises; not kept in files.
    """

    name: str
    rewrites: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    nodes_before: int
    nodes_after: int
    seconds: float
    open: tuple[OpenResult, ...] = field(default=(), repr=False, compare=False)
    meaning: MeaningChange | None = field(default=None, repr=False, compare=False)
    emulation: Emulation | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        fields = asdict(replace(self, open=(), meaning=None, emulation=None))
        del fields["open"], fields["meaning"], fields["emulation"]
        return fields


@dataclass(frozen=True)
class _Facts:
    """What must not change, read off a graph before a pass."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    guards: int
    writes: frozenset[_Root]
    output_roots: tuple[frozenset[_Root], ...]
    shared_outputs: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class _Root:
    """An input's or a weight's memory; the same memory under two names is one root."""

    key: object
    label: str = field(compare=False)


def run_passes(
    graph: fx.GraphModule, passes: Iterable[GraphPass], on_pass: Callable[[GraphPass], None] | None = None
) -> list[PassRecord]:
    """Run `passes` over `graph` in place, in order.

    Args:
        graph: an accelkit graph (see accelkit.graph), every node with its fake tensor in `meta["val"]`.
        passes: the passes; OnnxPass values do not belong here (see `run_onnx_passes`).
        on_pass: called with each pass before it runs, for progress.

    Returns:
        one record a pass.

    Raises:
        PassError: a pass raised, or broke an invariant.
    """
    records = []
    for one in passes:
        if on_pass is not None:
            on_pass(one)
        records.append(_run_one(graph, one))
    graph.recompile()  # once: passes look at nodes, not at the generated code
    return records


def _run_one(graph: fx.GraphModule, one: GraphPass) -> PassRecord:
    started = time.perf_counter()
    before, nodes_before = _facts(graph), count_operators(graph)
    calls = {node: (node.target, node.args, node.kwargs) for node in graph.graph.nodes}
    original = snapshot(graph) if one.changes_meaning is not None or one.calibrates else None
    try:
        result = one.run(graph)
    except AccelkitError:
        raise
    except Exception as error:
        raise PassError(f"pass {one} failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, PassResult):
        raise PassError(f"pass {one} returned {type(result).__name__}; run() must return a PassResult")
    try:
        graph.graph.lint()
    except Exception as error:
        raise PassError(f"pass {one} left a malformed graph: {error}") from error
    changed = [n for n in graph.graph.nodes if calls.get(n) != (n.target, n.args, n.kwargs)]
    touched = changed or [n for n in calls if n._erased]
    if touched and not result.changed:
        raise PassError(f"pass {one} changed {touched[0].name} but reports no rewrite; call result.rewrote(...)")
    infer(graph, [n for n in changed if not _same_call(calls.get(n), n)], one)
    _compare(before, _facts(graph), one)
    meaning = emulation = None
    if original is not None and result.changed and one.changes_meaning is not None:
        meaning = MeaningChange(one.name, str(one), str(one.changes_meaning), original, snapshot(graph))
    if original is not None and result.changed and one.calibrates:
        emulation = Emulation(str(one), original, snapshot(graph))
    return PassRecord(
        str(one), tuple(result.rewrites), tuple(result.refusals), nodes_before, count_operators(graph),
        time.perf_counter() - started, tuple(result.open), meaning, emulation,
    )  # fmt: skip


def count_operators(graph: fx.GraphModule) -> int:
    """Operators in the graph: inputs, weights and the output are not counted."""
    return sum(node.op not in ("placeholder", "get_attr", "output") for node in graph.graph.nodes)


def fake_mode_of(graph: fx.GraphModule) -> FakeTensorMode:
    """The fake mode that the graph's metadata was inferred under (a fresh one for a graph without tensors)."""
    for node in graph.graph.nodes:
        value = graphs.val(node)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def infer(graph: fx.GraphModule, changed: Sequence[fx.Node], one: object) -> None:
    """Infer fake tensors for `changed` nodes, and onwards wherever a node's metadata really differs from before."""
    if not changed:
        return
    mode = fake_mode_of(graph)
    stale = set(changed)
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output", "call_module"):
            continue
        if node not in stale and not any(i in stale for i in node.all_input_nodes) and graphs.val(node) is not None:
            continue
        old = graphs.val(node)
        new = _infer_node(graph, node, mode, one)
        if node.meta.get("unbacked_bindings"):  # nonzero and the like: the fresh sizes are the old ones
            _rebind_unbacked(mode, node, new)
        node.meta["val"] = new
        if node not in changed and _same_metadata(old, new):
            stale.discard(node)
        else:
            stale.add(node)


def _infer_node(graph: fx.GraphModule, node: fx.Node, mode: FakeTensorMode, one: object) -> Any:
    if node.op == "get_attr":
        value = graphs.attribute(graph, str(node.target))
        return mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else None
    arguments = fx.node.map_arg((node.args, node.kwargs), graphs.val)
    target: Any = node.target
    try:
        with mode, torch.no_grad(), _symbolic_inference(mode):
            return target(*arguments[0], **arguments[1])
    except Exception as error:
        shapes = ", ".join(f"{i.name}: {graphs.describe_value(graphs.val(i))}" for i in node.all_input_nodes)
        raise PassError(
            f"after pass {one}: {node.name} ({node.target}) does not fit its inputs ({shapes}): {error}"
        ) from error


def _rebind_unbacked(mode: FakeTensorMode, node: fx.Node, new: Any) -> None:
    from torch.fx.experimental.symbolic_shapes import rebind_unbacked  # imports sympy

    rebind_unbacked(mode.shape_env, node, new)


@contextlib.contextmanager
def _symbolic_inference(mode: FakeTensorMode) -> Iterator[None]:
    # Composite operators (linear, matmul, ...) must take their Python forms: the C++ ones ask for concrete sizes. And
    # what an operator's own meta function asks about sizes was asked when the model was captured: only a pass's
    # questions count.
    suppressed = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with enable_python_dispatcher(), suppressed:
        yield


def _same_call(before: tuple[Any, Any, Any] | None, node: fx.Node) -> bool:
    """Whether the node calls what it called before, on other nodes with the same metadata: nothing new to infer."""
    if before is None or graphs.val(node) is None:
        return False
    (old, old_spec), (new, new_spec) = (
        pytree.tree_flatten(call) for call in (before, (node.target, node.args, node.kwargs))
    )
    return old_spec == new_spec and all(
        _same_metadata(graphs.val(o), graphs.val(n))
        if isinstance(o, fx.Node) and isinstance(n, fx.Node)
        else type(o) is type(n) and o == n
        for o, n in zip(old, new, strict=True)
    )


def _same_metadata(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return (old.dtype, old.device, str(old.shape), str(old.stride())) == (
            new.dtype, new.device, str(new.shape), str(new.stride()),
        )  # fmt: skip
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)) and len(old) == len(new):
        return all(_same_metadata(o, n) for o, n in zip(old, new, strict=True))
    return type(old) is type(new) and str(old) == str(new)


def _output_nodes(graph: fx.GraphModule) -> tuple[Any, ...]:
    (returned,) = graph.graph.output_node().args
    return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)


def _placed(value: Any) -> str:
    return f"{graphs.describe_value(value)} on {value.device}" if isinstance(value, torch.Tensor) else str(value)


def _facts(graph: fx.GraphModule) -> _Facts:
    placeholders = graph.graph.find_nodes(op="placeholder")
    outputs = _output_nodes(graph)
    mode = fake_mode_of(graph)
    owners = [_owners(graph, o) if isinstance(o, fx.Node) else frozenset() for o in outputs]
    written = [a for node in graph.graph.nodes if graphs.is_mutating(node) for a in graphs.aliases(node)]
    return _Facts(
        tuple(f"{p.target}: {_placed(graphs.val(p))}" for p in placeholders),
        tuple(_placed(graphs.val(o)) if isinstance(o, fx.Node) else repr(o) for o in outputs),
        len(mode.shape_env.guards) if mode.shape_env is not None else 0,
        frozenset(owner for a in written for owner in _owners(graph, a) if isinstance(owner, _Root)),
        tuple(frozenset(owner for owner in some if isinstance(owner, _Root)) for some in owners),
        frozenset((i, j) for i, j in itertools.combinations(range(len(owners)), 2) if owners[i] & owners[j]),
    )


def _owners(graph: fx.GraphModule, node: fx.Node) -> frozenset[_Root | fx.Node]:
    """Whose memory the node's result may be: inputs, weights, or the nodes that allocate it."""
    owners: set[_Root | fx.Node] = set()
    for member in graphs.memory_family(node):
        if member.op == "get_attr":
            value = graphs.attribute(graph, str(member.target))
            key = value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else member.target
            owners.add(_Root(key, str(member.target)))
        elif member.op == "placeholder":
            owners.add(_Root(str(member.target), str(member.target)))
        elif not graphs.aliases(member) and isinstance(graphs.val(member), (torch.Tensor, tuple, list)):
            owners.add(member)  # a size has no memory to share
    return frozenset(owners)


def _labels(roots: Iterable[_Root]) -> str:
    return ", ".join(sorted(root.label for root in roots))


def _compare(before: _Facts, after: _Facts, one: object) -> None:
    if before.inputs != after.inputs:
        raise PassError(f"pass {one} changed the inputs from {before.inputs} to {after.inputs}")
    if len(before.outputs) != len(after.outputs):
        raise PassError(f"pass {one} changed the number of outputs from {len(before.outputs)} to {len(after.outputs)}")
    for index, (old, new) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        if old != new:
            raise PassError(f"pass {one} changed output {index} from {old} to {new}; cast back before the output")
    if after.guards > before.guards:
        raise PassError(
            f"pass {one} added {after.guards - before.guards} shape guard(s), which would freeze a dynamic dimension; "
            "ask torch.fx.experimental.symbolic_shapes.statically_known_true instead of comparing sizes"
        )
    if invented := after.writes - before.writes:
        raise PassError(f"pass {one} made the graph write to {_labels(invented)}")
    for index, (old_roots, new_roots) in enumerate(zip(before.output_roots, after.output_roots, strict=True)):
        if shared := new_roots - old_roots:
            raise PassError(f"pass {one} made output {index} share memory with {_labels(shared)}; copy it")
    if pairs := after.shared_outputs - before.shared_outputs:
        first, second = min(pairs)
        raise PassError(f"pass {one} made outputs {first} and {second} share memory; copy one of them")


def run_onnx_passes(
    model: onnx.ModelProto, passes: Iterable[OnnxPass], on_pass: Callable[[OnnxPass], None] | None = None
) -> tuple[onnx.ModelProto, list[PassRecord]]:
    """The same for OnnxPass values: inputs, outputs and the names of external initializers must stay as they are.

    Raises:
        PassError: a pass raised, or changed the model's interface, or lost track of a weight.
    """
    records = []
    for one in passes:
        if on_pass is not None:
            on_pass(one)
        started, nodes_before, before = time.perf_counter(), len(model.graph.node), _onnx_interface(model)
        externals = _external_names(model)
        try:
            model, result = one.run(model)
        except AccelkitError:
            raise
        except Exception as error:
            raise PassError(f"pass {one} failed: {type(error).__name__}: {error}") from error
        after = _onnx_interface(model)
        if before != after:
            raise PassError(f"pass {one} changed the ONNX model's inputs or outputs from {before} to {after}")
        if invented := _external_names(model) - externals:
            raise PassError(f"pass {one} renamed or invented the external weights {sorted(invented)}")
        records.append(
            PassRecord(
                str(one), tuple(result.rewrites), tuple(result.refusals), nodes_before, len(model.graph.node),
                time.perf_counter() - started,
            )
        )  # fmt: skip
    return model, records


def _onnx_interface(model: onnx.ModelProto) -> tuple[tuple[str, int], ...]:
    values = [*model.graph.input, *model.graph.output]
    return tuple((v.name, v.type.tensor_type.elem_type) for v in values)


def _external_names(model: onnx.ModelProto) -> set[str]:
    return {i.name for i in model.graph.initializer if i.data_location == i.EXTERNAL}
