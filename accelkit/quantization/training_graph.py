"""The emulation, made trainable: what `calibrate_int8` rounds is rounded in the forward, and passed through in the backward.

    dequantize(quantize(x, scale, zero))        ->  rounded(x, ...)       gradient 1 inside of the range, 0 where clipped
    dequantize(int8 constant, scales)           ->  int8 values of the present weight; gradient 1 to the weight

The forward runs the very operators of the emulation on the present weights, so that what is trained is what `optimize` builds.
Straight-through gradients: Bengio, Leonard and Courville (arXiv 1308.3432); weights' ranges follow the weights, activations'
stay as calibrated, as in FasterTransformer's guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # defines torch.ops.quantized_decomposed
from torch import fx, nn

from accelkit import graph as graphs
from accelkit.errors import CaptureError, InputError
from accelkit.precision import Int8
from accelkit.quantization.calibration import Calibration
from accelkit.quantization.tape import Tape

quantized = torch.ops.quantized_decomposed

QUANTIZE = (quantized.quantize_per_tensor.default, quantized.quantize_per_tensor.tensor)
DEQUANTIZE = (
    quantized.dequantize_per_tensor.default,
    quantized.dequantize_per_tensor.tensor,
    quantized.dequantize_per_channel.default,
)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *grid: Any) -> torch.Tensor:
        operators = 1 if isinstance(grid[0], torch.Tensor) else 0
        scale, zero, least, most, _ = grid
        q = QUANTIZE[operators](x, *grid)
        inside = torch.round(x / scale) + zero
        ctx.save_for_backward((inside >= least) & (inside <= most))
        return DEQUANTIZE[operators](q, *grid)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None, None, None


class _PassedThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        return held.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


def held_per_tensor(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """dequantize_per_tensor with the scale as a tensor, and no zero point."""
    return values.to(torch.float32) * scale


def rounded(x: torch.Tensor, *grid: Any) -> torch.Tensor:
    """x rounded to a grid (scale, zero point, least, most, dtype)."""
    return _Rounded.apply(x, *grid)  # type: ignore[no-any-return, no-untyped-call]


def passed_through(weight: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """`held`, what is left of the weight in 8 bits; its gradient is the weight's."""
    return _PassedThrough.apply(weight, held)  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class TrainingGraph:
    """A function of weights and inputs.

    Attributes:
        graph: its inputs are `weights`, the model's inputs, and whether dropout is on.
        signature: how calls become its inputs.
        weights: for each of the first inputs: a root's number or a recorded value of the tape, or a constant tensor.
        names: of the tape's roots, as in the model's state dict.
        layers: what is quantised. refusals: what is not, and why. digest: of the layers, for calibrations.
        silent: dropout that is not done in training, in words.
    """

    graph: fx.GraphModule
    signature: Any
    weights: list[int | torch.Tensor]
    held: frozenset[int]
    tape: Tape
    layers: tuple[str, ...]
    refusals: tuple[tuple[str, str], ...]
    digest: str
    silent: list[str] = field(default_factory=list)

    def run(self, tensors: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], training: bool) -> Sequence[Any]:
        """The graph's outputs for the present weights, by name."""
        values: dict[int, Any] = {n: tensors[name] for n, name in enumerate(self.tape.roots)}
        wanted = {w for w in self.weights if isinstance(w, int)}
        self.tape.replay(wanted - self.held, values)
        with torch.no_grad():
            self.tape.replay(self.held, values)
        weights = [values[w] if isinstance(w, int) else w for w in self.weights]
        return self.graph(*weights, *graphs_laid_out(self)(inputs), training)  # type: ignore[no-any-return]


def graphs_laid_out(made: TrainingGraph) -> Any:
    """Brings inputs into the memory layout of the capture; weights and the flag are no inputs of the model's."""
    fakes = [graphs.val(node) for node in made.graph.graph.find_nodes(op="placeholder")][len(made.weights) : -1]

    def lay_out(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            x.contiguous() if fake is not None and fake.is_contiguous() and not x.is_contiguous() else x
            for x, fake in zip(inputs, fakes, strict=True)
        ]

    return lay_out


def make(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    precision: Int8,
    calibration: Calibration | None,
    dynamic_shapes: Any,
) -> TrainingGraph:
    """Capture, quantise and make trainable.

    Raises:
        CaptureError: the model cannot be captured, or a constant cannot be followed back to the weights.
        InputError: the calibration does not fit, or the scheme quantises nothing of the model.
    """
    from accelkit.capture import capture
    from accelkit.ops.decompose import decompose
    from accelkit.options import resolve_passes
    from accelkit.pass_runner import run_passes
    from accelkit.pipeline import copy_graph
    from accelkit.quantization.collect import Source, layers_digest
    from accelkit.quantization.dropouts import put_back, random_places
    from accelkit.quantization.sites import find_sites

    program = capture(model, args, kwargs, dynamic_shapes)
    if graphs.written_roots(program.graph.graph):
        raise CaptureError(
            f"{type(model).__name__} writes to its buffers or inputs in its forward; that cannot be trained here"
        )
    graph = copy_graph(program.graph)
    passes, _ = resolve_passes(None, precision)
    roots = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tape = Tape(roots)
    with torch.no_grad(), tape:
        run_passes(graph, itertools.takewhile(lambda one: not one.calibrates, passes))
        sites = find_sites(graph)
        digest = layers_digest(sites)
        floats = {
            number: str(w.target)
            for site in sites
            if isinstance(w := site.bound.get("weight"), fx.Node)
            and w.op == "get_attr"
            and (number := tape.number_of(graphs.attribute(graph, str(w.target)))) is not None
        }
        Source(graph, None, calibration).leave()
        (record,) = run_passes(graph, [one for one in passes if one.calibrates])
    if record.emulation is None:
        raise InputError(
            f"{precision} quantises nothing of {type(model).__name__}: "
            + ("; ".join(f"{r.node}: {r.reason}" for r in record.refusals) or "it has no layers that a scheme knows")
        )
    trained = capture(model, args, kwargs, dynamic_shapes, dropout=True)
    random = random_places(trained)
    if random.attention:
        _write_attention_out(graph)
    decompose(graph)
    _make_trainable(graph, tape, floats)
    silent = put_back(graph, trained, random, program.inputs)
    made = _as_function(graph, program.signature, tape)
    made.layers, made.digest, made.silent = tuple(record.rewrites), digest, silent
    made.refusals = tuple((r.node, r.reason) for r in record.refusals)
    _check_replay(made, roots, graph, program)
    tape.keep_only(w for w in made.weights if isinstance(w, int))
    tape.forget_tensors()
    return made


def _write_attention_out(graph: fx.GraphModule) -> None:
    """Attention that is not quantised, as products and a softmax: where its dropout is."""
    from accelkit import ops
    from accelkit.ops.decompose import inlined
    from accelkit.quantization.observe import probabilities, raw_scores

    for node in graph.graph.find_nodes(op="call_function", target=ops.attention.OPERATOR.overload):
        bound = graphs.bound_arguments(node) or {}
        if str(graphs.val(bound["query"]).shape[2]) != str(graphs.val(bound["key"]).shape[2]):
            continue  # grouped heads: reported as dropout that has no place
        arguments = {k: bound[k] for k in ("causal", "scale")}

        def written_out(query: Any, key: Any, value: Any, mask: Any, arguments: Any = arguments) -> torch.Tensor:
            attended = probabilities(raw_scores(query, key), query, arguments | {"mask": mask})
            return torch.matmul(attended, value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).contiguous()

        inlined(graph, node, written_out, [bound[n] for n in ("query", "key", "value", "mask")])


def _make_trainable(graph: fx.GraphModule, tape: Tape, floats: Mapping[int, str]) -> None:
    for node in list(graph.graph.nodes):
        if node.target not in DEQUANTIZE:
            if node.target is quantized.choose_qparams.tensor:
                with graph.graph.inserting_before(node):
                    node.update_arg(0, graph.graph.call_function(torch.Tensor.detach, (node.args[0],)))
            continue
        source = node.args[0]
        if source.target in QUANTIZE:
            node.target, node.args = rounded, (source.args[0], *node.args[1:])
            continue
        number = tape.number_of(graphs.attribute(graph, str(source.target)))
        found = sorted(tape.sources(number) & floats.keys()) if number is not None else []
        if not found:
            raise CaptureError(f"{source.target} is quantised, and was made of no weight that can be followed back")
        if node.target is quantized.dequantize_per_tensor.default:
            _scale_follows(graph, node, found[-1], tape)
        with graph.graph.inserting_after(node):
            weight = graph.graph.get_attr(floats[found[-1]])
        with graph.graph.inserting_after(weight):
            passed = graph.graph.call_function(passed_through, (weight, node))
        passed.meta = dict(node.meta)
        node.replace_all_uses_with(passed)
        passed.update_arg(1, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _scale_follows(graph: fx.GraphModule, node: fx.Node, weight: int, tape: Tape) -> None:
    """A weight's one scale is a number in the graph; it becomes the tensor that it was read from."""
    scale = node.args[1]
    for value, tensor in reversed(tape.numbers_read):
        number = tape.number_of(tensor)
        if value == scale and number is not None and weight in tape.sources(number):
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(graphs.set_attribute(graph, f"{node.name}_scale", tensor))
            node.target, node.args = held_per_tensor, (node.args[0], constant)
            return
    raise CaptureError(f"the scale of {node.args[0]} cannot be followed back to its weight")


def _as_function(graph: fx.GraphModule, signature: Any, tape: Tape) -> TrainingGraph:
    """Attributes become inputs."""
    first: dict[str, fx.Node] = {}
    held: dict[str, bool] = {}
    weights: list[int | torch.Tensor] = []
    start = next(node for node in graph.graph.nodes if node.op != "get_attr")
    for node in list(graph.graph.find_nodes(op="get_attr")):
        target = str(node.target)
        if target not in first:
            tensor = graphs.attribute(graph, target)
            number = tape.number_of(tensor)
            weights.append(tensor.detach() if number is None else number)
            with graph.graph.inserting_before(start):
                first[target] = graph.graph.placeholder(f"weight_{len(first)}")
        held[target] = held.get(target, True) and all(
            user.target in (*DEQUANTIZE, held_per_tensor) for user in node.users
        )
        node.replace_all_uses_with(first[target])
        graph.graph.erase_node(node)
    numbers = frozenset(w for w, only in zip(weights, held.values(), strict=True) if only and isinstance(w, int))
    graph.graph.lint()
    return TrainingGraph(
        fx.GraphModule(nn.Module(), graph.graph, "TrainingGraph"), signature, weights, numbers, tape, (), (), ""
    )


def _check_replay(made: TrainingGraph, roots: Mapping[str, torch.Tensor], graph: fx.GraphModule, program: Any) -> None:
    """What is computed anew has to be what the passes computed, and every trained weight has to be in it."""
    values: dict[int, Any] = dict(enumerate(roots.values()))
    wanted = {w for w in made.weights if isinstance(w, int)}
    with torch.no_grad():
        made.tape.replay(wanted, values)
    known = {n: t for t in graph.buffers() if (n := made.tape.number_of(t)) is not None}
    for number in wanted & known.keys():
        if not torch.equal(values[number], known[number]):
            raise CaptureError(
                "a constant that a pass made of the weights cannot be computed again: it was written to later"
            )
    reached = set[int]().union(*(made.tape.sources(number) for number in wanted))
    used = {str(node.target) for node in program.graph.graph.find_nodes(op="get_attr")}
    names = list(roots)
    lost = [n for n in names if n in used and roots[n].requires_grad and names.index(n) not in reached]
    if lost:
        raise CaptureError(
            f"the weights {', '.join(lost[:5])} cannot be trained: a pass made constants of them in a way that cannot be followed"
        )
