"""torch.compile's front end: for models that torch.export refuses, and for `torch.compile(model, backend="accelkit")`.

    model --TorchDynamo--> graph, Python, graph, ...   each graph --torch.export, passes, lowering--> engine

What is between the pieces stays Python, exactly as in the model; the report says where the breaks are and why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from accelkit.capture import capture
from accelkit.compiled import Built, weights_of
from accelkit.errors import CaptureError, InputError, warn
from accelkit.report import Report, VariantReport
from accelkit.twin import clone_inputs, preserved, quiet

if TYPE_CHECKING:
    from accelkit.pipeline import Plan

_NO_LIMIT = 2**30
MAX_SHAPES = 8
"""A captured piece is built for at most this many input shapes; further ones run in PyTorch, with a warning."""


def build_in_pieces(plan: Plan, refusal: CaptureError, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """Build a model that torch.export refused: TorchDynamo's pieces run in engines, the rest as it is.

    Raises:
        CaptureError: not one piece could be captured.
        Exception: what the model's own forward raises on the example.
    """
    with preserved(plan.twin), torch.no_grad():
        plan.twin(*clone_inputs(args), **clone_inputs(kwargs))  # the model's own exception, if that was the reason
    if plan.dynamic_shapes is not None:
        raise CaptureError(
            f"{refusal} | dynamic_shapes needs a model that torch.export captures whole; leave it out to have the pieces captured"
        ) from refusal
    report = plan.empty_report()
    report.breaks.append(str(refusal))
    call = _without_gradients(torch.compile(plan.twin, backend=PieceBackend(plan, report), dynamic=False))
    before = dict(counters["graph_break"])
    # TorchDynamo keeps so many compilations for one forward, of whatever model: this one must not be the first beyond
    limits = torch._dynamo.config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT)
    with preserved(plan.twin), quiet("torch._dynamo"), limits:
        call(*clone_inputs(args), **clone_inputs(kwargs))
    counted = [_reason(why) for why, count in counters["graph_break"].items() if count > before.get(why, 0)]
    report.breaks += [why for why in counted if not any(why in known for known in report.breaks)]
    if not report.variants:
        raise CaptureError(f"{refusal} | torch.compile's front end captured no piece either") from refusal
    return Built((), plan.twin, report, None, call)


def _without_gradients(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return compiled(*args, **kwargs)

    return call


def _reason(text: object) -> str:
    # TorchDynamo's reasons go on with hints for its own settings, which are no use here
    return " ".join(str(text).partition("Hint:")[0].split())


def _break_after(graph: fx.GraphModule) -> str:
    """Why and where TorchDynamo ended this graph before the model's end; "" where it did not, or does not say."""
    ended = getattr(graph, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return ""
    line = ended.user_stack[-1] if ended.user_stack else None
    words = "a branch on a tensor's value" if ended.reason.startswith("generic_jump") else _reason(ended.reason)
    return words + (f" at {line.filename}:{line.lineno}" if line is not None else "")


class PieceBackend:
    """A TorchDynamo backend: each captured graph goes through accelkit's pipeline.

    A graph that accelkit cannot take runs as it is, with a warning and the reason in the report: never silently.
    """

    def __init__(self, plan: Plan, report: Report) -> None:
        self.plan, self.report = plan, report

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if (text := _break_after(graph)) and text not in self.report.breaks:
            self.report.breaks.append(text)
        if not any(node.op in ("call_function", "call_method", "call_module") for node in graph.graph.nodes):
            return graph.forward
        return _Piece(self.plan, self.report, graph, len(self.report.variants))


class _Piece:
    """One captured graph, built for each combination of input shapes when it is first met."""

    def __init__(self, plan: Plan, report: Report, graph: fx.GraphModule, index: int) -> None:
        self.plan, self.report, self.graph, self.index = plan, report, graph, index
        self._static = _static_inputs(graph)
        self._built: dict[Any, _Run] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(i, torch.Tensor) and i.requires_grad for i in inputs):
            return self._plain(
                inputs, "gradients are wanted here, and engines are for inference: call it under torch.no_grad()"
            )
        key = tuple(
            id(i) if n in self._static else (i.shape, i.dtype, i.device) if isinstance(i, torch.Tensor) else i
            for n, i in enumerate(inputs)
        )
        run = self._built.get(key)
        if run is None or run.outdated():
            with self._lock:
                run = self._built.get(key)
                if run is None or run.outdated():
                    run = self._build(key, inputs)
        return run.call(*inputs)

    def _plain(self, inputs: Sequence[Any], reason: str) -> Any:
        self._tell(reason)
        return self.graph.forward(*inputs)

    def _tell(self, reason: str) -> None:
        text = f"piece {self.index} runs in PyTorch: {reason}"
        if text not in self.report.breaks:
            self.report.breaks.append(text)
            warn(text)

    def _build(self, key: Any, inputs: Sequence[Any]) -> _Run:
        if key not in self._built and len(self._built) >= MAX_SHAPES:
            self._tell(f"more than {MAX_SHAPES} input shapes")
            return _Run(self.graph.forward)
        try:
            run, found = self._lower(inputs)
        except (CaptureError, InputError) as error:
            self._tell(str(error))
            run = _Run(self.graph.forward)
        else:
            found.label = f"piece {self.index}"
            if key not in self._built:  # else: built anew for changed weights
                self.report.variants.append(found)
        self._built[key] = run
        return run

    def _lower(self, inputs: Sequence[Any]) -> tuple[_Run, VariantReport]:
        weights = {n: inputs[n] for n in self._static}
        bound = _Bound(self.graph, weights)
        given = tuple(i for n, i in enumerate(inputs) if n not in weights)
        tensors = tuple(i.detach() if isinstance(i, torch.Tensor) else i for i in given)
        program = capture(bound, tensors, {})
        variant, found = self.plan.build_piece(program, bound)
        signature, call = variant.signature, variant.lowered.call

        def run(*arguments: Any) -> Any:
            flat = [a for n, a in enumerate(arguments) if n not in weights]
            leaves = signature.leaves(tuple(flat), {})
            return signature.unflatten(call(*signature.tensors_of(leaves)))

        return _Run(run, weights_of(program)), found


class _Run:
    """What runs for one combination of shapes, and the weights that it was built from with their counts of writes."""

    def __init__(self, call: Callable[..., Any], weights: tuple[tuple[torch.Tensor, int | None], ...] = ()) -> None:
        self.call, self._weights = call, weights

    def outdated(self) -> bool:
        """Whether a weight was changed in place since: torch.compile's users expect such changes to be followed."""
        return any(tensor._version != version for tensor, version in self._weights)


def _static_inputs(graph: fx.GraphModule) -> dict[int, fx.Node]:
    """The graph's inputs that are the model's parameters and buffers: constants of the piece."""
    static = {}
    for index, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        info = node.meta.get("tensor_dict") or {}
        value = node.meta.get("example_value")
        if info.get("_dynamo_static_input_type") is not None or isinstance(value, nn.Parameter):
            static[index] = node
    return static


class _Bound(nn.Module):
    """A captured graph with its weights as attributes, so that they are weights again and not inputs."""

    def __init__(self, graph: fx.GraphModule, weights: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.graph_module = graph
        self._places = {}
        for index, tensor in weights.items():
            name = f"weight_{index}"
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
            self._places[index] = name

    def forward(self, *inputs: Any) -> Any:
        given = iter(inputs)
        total = len(inputs) + len(self._places)
        arguments = [getattr(self, self._places[n]) if n in self._places else next(given) for n in range(total)]
        return self.graph_module(*arguments)


def accelkit_backend(graph: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(model, backend="accelkit", options={"target": "onnxruntime"})`: options are those of `optimize()`.

    Raises:
        InputError: an unknown option.
    """
    from accelkit.pipeline import make_plan

    options = dict(options.pop("options", None) or options)
    known = {"target", "precision", "passes", "tolerance", "cache", "progress"}
    if unknown := set(options) - known:
        raise InputError(
            f"torch.compile(backend='accelkit') has no option {sorted(unknown)}; it has {', '.join(sorted(known))}"
        )
    device = next((i.device.type for i in example_inputs if isinstance(i, torch.Tensor)), "cpu")
    plan = make_plan(graph, device=device, **options)
    return PieceBackend(plan, plan.empty_report())(graph, example_inputs)
