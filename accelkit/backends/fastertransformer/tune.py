"""The problems in a prepared graph, tuned: which kernel and configuration each fused operator runs with.

graph --sizes of the examples--> accelkit.tuning's tasks --measured in CUDA graphs--> choices for this machine
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.backends.fastertransformer.prepare import own_copy, prepare, why_no_kernel
from accelkit.backends.fastertransformer.recording import Recorder
from accelkit.backends.fastertransformer.split_linear import split_linears
from accelkit.capture import capture
from accelkit.models import Inputs
from accelkit.ops import OPERATORS, operator_of
from accelkit.ops.decompose import decomposed_for
from accelkit.options import canonical_example, resolve_passes
from accelkit.pass_runner import run_passes
from accelkit.precision import Precision
from accelkit.tuning.kernels_of_attention import choose_kernels
from accelkit.tuning.measuring import Task
from accelkit.tuning.problems import task_of
from accelkit.tuning.tuner import Outcome, Progress, tune
from accelkit.twin import eval_twin

DEFAULT_S = 60.0
"""What `FasterTransformer(tune=True)` may take."""

_SPLIT_TO = 4096  # rows: more fill a GPU without splitting


def _silent(done: int, total: int, words: str) -> None:
    """Progress that nobody wants to see."""


def seconds_of(tune: bool | float) -> float:
    """The budget that a value of `FasterTransformer.tune` means."""
    return DEFAULT_S if tune is True else float(tune)


def tune_graph(
    graph: fx.GraphModule,
    examples: Iterable[Sequence[Tensor]],
    seconds: float,
    device: torch.device,
    progress: Progress = _silent,
    again: bool = False,
) -> Outcome:
    """Tune every problem of a prepared graph at these examples' sizes."""
    return tune_tasks(
        [task for inputs in examples for task in tasks_of(graph, inputs)], seconds, device, progress, again
    )


def tune_tasks(
    tasks: Iterable[Task], seconds: float, device: torch.device, progress: Progress = _silent, again: bool = False
) -> Outcome:
    """Tune problems on a GPU; what memory they took goes back to it."""
    try:
        return tune(tasks, GraphTimer(device), seconds=seconds, progress=progress, again=again)
    finally:
        torch.cuda.empty_cache()


def measure_attention(graph: fx.GraphModule, examples: Iterable[Sequence[Tensor]], device: torch.device) -> list[str]:
    """Choose the kernel of each attention of kind "auto" that has none yet, at these examples' sizes; a sentence for each."""
    try:
        return choose_kernels(
            (task for inputs in examples for task in tasks_of(graph, inputs)), GraphTimer(device)
        )  # fmt: skip
    finally:
        torch.cuda.empty_cache()


def tasks_of_model(model: nn.Module, inputs: Inputs, precision: Precision) -> list[Task]:
    """What there is to choose in a model, for inputs of these sizes, after the default passes.

    Raises:
        CaptureError: torch.export cannot capture it whole; `FasterTransformer(tune=True)` tunes its pieces.
    """
    args, kwargs = canonical_example(inputs)
    program = capture(eval_twin(model), args, kwargs)
    graph_passes, _ = resolve_passes(None, precision)
    run_passes(program.graph, graph_passes)
    with torch.no_grad():
        graph, _ = decomposed_for("fastertransformer", frozenset(OPERATORS), program.graph, [])
        prepared = prepare(graph, program.inputs, CompileContext(precision))
        return tasks_of(prepared, program.inputs)


def tasks_of(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Task]:
    """What there is to choose in a prepared graph at these inputs' sizes; in all forms that `choice` may take."""
    split = own_copy(graph)
    forms = [graph, split] if split_linears(split) else [graph]
    found = []
    for form in forms:
        sized = _sized(form, inputs)
        for node in form.graph.nodes:
            operator = operator_of(node)
            if operator is None or why_no_kernel(node) is not None:
                continue
            if form is split and operator.name != "linear_residual_layer_norm":
                continue  # as in the other form
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), sized)
            if all(isinstance(a, Tensor) for a in (args[0] if isinstance(args[0], (list, tuple)) else args[:1])):
                found.append(task_of(operator.name, *args, **kwargs))
    return [task for task in found if task is not None and not _hopeless(task)]


def _hopeless(task: Task) -> bool:
    return task.choices.kind == "split" and task.problem.rows > _SPLIT_TO


def _sized(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[[fx.Node], Any]:
    """A node's value without its numbers, in the sizes that it has for these inputs."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    if all(_static(graphs.val(node)) for node in placeholders):
        return graphs.val
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = {}

    class Sizes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    # what depends on the inputs' numbers has no sizes; the problems before it do
    with mode, torch.no_grad(), contextlib.suppress(RuntimeError):
        Sizes(graph, garbage_collect_values=False).run(*(mode.from_tensor(i) for i in inputs))
    return values.get


def _static(value: Any) -> bool:
    return not isinstance(value, Tensor) or all(isinstance(size, int) for size in value.shape)


class GraphTimer:
    """Launches in a CUDA graph, as an engine runs them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorder = Recorder(device)

    def __call__(self, launch: Callable[[int], object], launches: int) -> Callable[[], float]:
        def several() -> tuple[Tensor, ...]:
            for turn in range(launches):
                launch(turn)
            return ()

        recording = self._recorder.record(several, (), warmup=1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def round_ms() -> float:
            with torch.cuda.device(self._device):
                begin.record()
                recording.replay()
                end.record()
                end.synchronize()
            return float(begin.elapsed_time(end)) / launches

        return round_ms
