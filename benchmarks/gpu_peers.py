"""What accelkit is measured against on a GPU, and accelkit itself: a case (model, inputs, precision) -> a call.

    PEERS["graph"].build(case)      ->    call without arguments, the model's outputs as it returns them

Every candidate of a precision gets the same module and the same inputs, already in that dtype, so that none pays for casts
that another is spared. A peer that cannot be built raises; the run writes down why and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import by_hand
import torch
from swapped import sparse_attention, xformers_attention
from tensorrt_by_hand import tensorrt
from torch import nn

from accelkit.models import Inputs
from accelkit.tf32 import tensor_core_products

Call = Callable[[], Any]

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTLE = 4
"""Calls before a candidate is taken as built: torch.compile's CUDA graphs are recorded at the second or third."""


@dataclass(frozen=True)
class Case:
    """What a peer is built for.

    Attributes:
        model, inputs: in the precision's dtype, on the device.
        precision: "fp32", "tf32", "bf16" or "fp16".
        target: accelkit's target in this run; "fastertransformer" but for trials.
        cache: whether accelkit may take engines from its cache.
        pattern: boolean [tokens, tokens] of sparse attention, where the experiment has one.
        wide: the model and the inputs in float32, for exports; None: `model` and `inputs` are.
    """

    model: nn.Module
    inputs: Inputs
    precision: str
    target: str = "fastertransformer"
    cache: bool = False
    pattern: torch.Tensor | None = None
    wide: tuple[nn.Module, Inputs] | None = None

    @property
    def wide_model(self) -> nn.Module:
        return self.wide[0] if self.wide else self.model

    @property
    def wide_inputs(self) -> Inputs:
        return self.wide[1] if self.wide else self.inputs

    @property
    def device(self) -> str:
        return next(self.model.parameters()).device.type

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


@dataclass(frozen=True)
class Peer:
    """A candidate.

    Attributes:
        label: its name in the tables.
        build: case -> call; raises where it cannot.
        default: whether runs have it without being asked.
        wide: whether it is measured in fp32 and tf32 too.
        sparse: whether it attends to the experiment's pattern only, and so computes another model.
        slow: whether it takes long to build: then it is built after the others.
        risky: whether it may end the process: then it is measured after all the others, whose rows are written by then.
    """

    label: str
    build: Callable[[Case], Call]
    default: bool = True
    wide: bool = False
    sparse: bool = False
    slow: bool = False
    risky: bool = False


def run(model: Callable[..., Any], inputs: Inputs) -> Call:
    """The model on its inputs."""
    return (lambda: model(**inputs)) if isinstance(inputs, dict) else (lambda: model(*inputs))


def with_tf32(precision: str, call: Call) -> Call:
    """The call, with TF32 products on where the precision is "tf32".

    Rounds of several precisions are interleaved, so each call sets what it needs; `strict_fp32` turns it off for the others.
    """

    def inside() -> Any:
        with tensor_core_products():
            return call()

    return inside if precision == "tf32" else call


def strict_fp32() -> None:
    """float32 means float32 from here on: PyTorch's convolutions would use TF32 unasked."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def eager(case: Case) -> Call:
    """The model as it is."""
    return run(case.model, case.inputs)


def cuda_graph(case: Case) -> Call:
    """The model as it is, recorded once in a CUDA graph and replayed."""
    return _recorded(run(case.model, case.inputs), case.device)


def _recorded(call: Call, device: str) -> Call:
    if device != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # outside of the capture: libraries make their workspaces and pick their kernels
        for _ in range(SETTLE):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads (TensorRT has some) may use CUDA meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = call()
    return Recorded(graph, output, call)


@dataclass(frozen=True)
class Recorded:
    """A replay. The recording holds addresses only: the kernels and the memory behind them are `call`'s, and go with it."""

    graph: Any
    output: Any
    call: Call

    def __call__(self) -> Any:
        self.graph.replay()
        return self.output


def in_cuda_graph(build: Callable[[Case], Call]) -> Callable[[Case], Call]:
    """Another candidate in a CUDA graph; it keeps its facts."""

    def recorded(case: Case) -> Call:
        plain = build(case)
        return WithFacts(_recorded(plain, case.device), getattr(plain, "facts", {}))

    return recorded


@dataclass(frozen=True)
class WithFacts:
    """A call, and what its build tells for the row."""

    call: Call
    facts: dict[str, Any]

    def __call__(self) -> Any:
        return self.call()


def compiled(mode: str) -> Callable[[Case], Call]:
    """`torch.compile(model, mode=...)`, at fixed shapes."""

    def build(case: Case) -> Call:
        return run(torch.compile(case.model, mode=mode, dynamic=False), case.inputs)

    return build


def xformers_by_hand(case: Case) -> Call:
    """The model with xFormers' memory_efficient_attention put in for its attention."""
    return run(xformers_attention(case.model), case.inputs)


def xformers_graph(case: Case) -> Call:
    """The same in a CUDA graph."""
    return _recorded(xformers_by_hand(case), case.device)


def sparse_by_hand(case: Case) -> Call:
    """The model with FlexAttention over the experiment's sparse pattern put in for its attention."""
    if case.pattern is None:
        raise RuntimeError("this experiment has no sparse pattern")
    return run(sparse_attention(case.model, case.pattern), case.inputs)


def onnxruntime_plain(case: Case) -> Call:
    """torch.onnx.export as it comes, ONNX Runtime's CUDA provider, inputs and outputs bound to GPU memory."""
    import onnxruntime

    if case.device == "cuda":  # known before the export, which takes many seconds
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise RuntimeError("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu")
        onnxruntime.preload_dlls()
    return by_hand.onnxruntime_session(case.model, case.inputs)


def accelkit_tuned(case: Case) -> Call:
    """accelkit's fused target, its kernels chosen by measuring while it is built."""
    import accelkit
    from accelkit.backends.fastertransformer import FasterTransformer

    fast = accelkit.optimize(
        case.model, case.inputs, target=FasterTransformer(tune=True), precision=case.precision, cache=case.cache,
        progress=False,
    )  # fmt: skip
    return run(fast, case.inputs)


def accelkit_tensorrt(case: Case) -> Call:
    """accelkit's TensorRT target; its facts split the build's time into TensorRT's and accelkit's own."""
    from tensorrt_ours import optimized

    from accelkit.backends.tensorrt.building import stop_workers

    stop_workers()  # each candidate is built cold
    made = optimized(case.model, case.inputs, case.precision, cache=case.cache)
    stop_workers()  # its memory is not the engine's
    return WithFacts(run(made.model, case.inputs), made.facts)


def accelkit_on(target: str | None, passes: Callable[[Case], Sequence[Any]] | None = None) -> Callable[[Case], Call]:
    """accelkit.optimize for a target (None: the run's), with its default passes or those that are given for the case."""

    def build(case: Case) -> Call:
        import accelkit

        fast = accelkit.optimize(
            case.model, case.inputs, target=target or case.target, precision=case.precision,
            passes=None if passes is None else passes(case), cache=case.cache, progress=False,
        )  # fmt: skip
        return run(fast, case.inputs)

    return build


def default_passes_with(changed: str, value: Any | None) -> Callable[[Case], list[Any]]:
    """The default passes with one of them put in (before the clean-up), exchanged for a value, or (None) left out."""

    def passes(case: Case) -> list[Any]:
        from accelkit_passes import default_passes

        kept = list(default_passes(case.precision))
        names = [p.name for p in kept]
        made = [value(case) if callable(value) else value] if value is not None else []
        at = names.index(changed) if changed in names else names.index("remove_no_ops")
        return [*kept[:at], *made, *kept[at + (changed in names) :]]

    return passes


def remove_padding(case: Case) -> list[Any]:
    """The default passes with remove_padding among them."""
    from accelkit_passes import default_passes

    return list(default_passes(case.precision, remove_padding=True))


ACCELKIT = "accelkit"
"""The candidate that the tables compare with the others."""

PEERS: dict[str, Peer] = {
    "eager": Peer("PyTorch", eager, wide=True),
    "graph": Peer("PyTorch, CUDA graph", cuda_graph, wide=True),
    "compile": Peer("torch.compile, reduce-overhead", compiled("reduce-overhead"), wide=True),
    "autotune": Peer("torch.compile, max-autotune", compiled("max-autotune"), default=False, slow=True),  # 20 to 180 s
    "xformers": Peer("xFormers by hand", xformers_by_hand),
    "xformers-graph": Peer("xFormers by hand, CUDA graph", xformers_graph),
    "onnxruntime": Peer("ONNX Runtime CUDA, plain export", onnxruntime_plain),
    "tensorrt-torchscript": Peer(
        "TensorRT by hand, TorchScript export", tensorrt("torchscript"), default=False, slow=True
    ),
    "tensorrt-torchscript-graph": Peer(
        "TensorRT by hand, TorchScript export, CUDA graph",
        in_cuda_graph(tensorrt("torchscript")),
        default=False,
        slow=True,
        risky=True,
    ),
    "tensorrt-torchscript-half": Peer(
        "TensorRT by hand, TorchScript export of the fp16 model",
        tensorrt("torchscript", half=True),
        default=False,
        slow=True,
    ),
    "tensorrt-dynamo": Peer("TensorRT by hand, dynamo export", tensorrt("dynamo"), default=False, slow=True),
    "tensorrt-dynamo-half": Peer(
        "TensorRT by hand, dynamo export of the fp16 model", tensorrt("dynamo", half=True), default=False, slow=True
    ),
    ACCELKIT: Peer("accelkit", accelkit_on(None), wide=True),
    "accelkit-tensorrt": Peer("accelkit, TensorRT", accelkit_tensorrt, default=False, slow=True),
    "accelkit-tuned": Peer("accelkit, tuned", accelkit_tuned, default=False, slow=True),
    "accelkit-onnxruntime": Peer("accelkit onnxruntime", accelkit_on("onnxruntime"), default=False),
}
