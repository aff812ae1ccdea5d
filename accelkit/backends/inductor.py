"""Inductor: torch.compile's code generator on the optimised graph, with the weights frozen in.

    graph --dynamo (trivial: the graph is flat)--> Inductor --> C++ kernels, weights packed for oneDNN

Compiling happens in `compile`, never inside a call: calls check only Inductor's own conditions on dynamic sizes
(dtypes and static shapes are checked by the caller), and a call that they refuse runs the graph in PyTorch.

Freezing is switched on for the whole compilation and not by torch.compile's `options`: those reach Inductor alone, and
dynamo then hands it the weights as inputs, which silently leaves nothing to freeze. What freezing gains stands in the
recorded runs of benchmarks/bert_tools.py; `cpp_wrapper` and `max_autotune` did not gain enough in a trial to be on.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from accelkit import graph as graphs
from accelkit.backend_api import Backend, CompileContext, Engine, EngineFacts
from accelkit.backends._inductor_int8 import (
    in_inductors_forms,
    inputs_that_sums_read,
    integer_products_made,
    quantised_layers,
)  # fmt: skip
from accelkit.backends.eager import own_memory, result_type, shared_outputs
from accelkit.errors import BackendUnavailableError, LoweringError, warn

_COMPILING = threading.Lock()  # freezing is a global setting of torch's


@dataclass(frozen=True)
class Inductor(Backend):
    """torch.compile's Inductor.

    Attributes:
        freezing: fold weights into the compiled code, in the layout that its kernels want: faster, for a second copy
            of them.
        max_autotune: measure several kernels for each product: minutes instead of seconds.
        cpp_wrapper: generate the calls between kernels in C++ too.
        options: further (name, value) settings of torch._inductor.config.
    """

    freezing: bool = True
    max_autotune: bool = False
    cpp_wrapper: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    name: ClassVar[str] = "inductor"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "int8")
    int8_activations: ClassVar[str | None] = "u8"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    embeds_weights: ClassVar[bool] = True
    description: ClassVar[str] = "torch.compile's Inductor with frozen weights"

    def unavailable(self) -> str | None:
        compiler = os.environ.get(
            "CXX", "cl" if sys.platform == "win32" else "clang++" if sys.platform == "darwin" else "g++"
        )
        if shutil.which(compiler) is None:
            return (
                f"Inductor needs a C++ compiler and {compiler} is not on the PATH; install one (Debian and Ubuntu: "
                "apt install g++) or set CXX"
            )
        return None

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "cpu": torch.backends.cpu.get_cpu_capability()}

    def unsupported(self, node: fx.Node) -> str | None:
        if graphs.is_mutating(node):
            return "writes into its argument; frozen code must not"
        if graphs.is_random(node):
            return "random: Inductor would draw other numbers than PyTorch"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return "control flow stays in PyTorch"
        value = graphs.val(node)
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "Inductor generates no code for complex numbers"
        return None

    def pads_batches(self) -> bool:
        return True

    def compile(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], context: CompileContext) -> Engine:
        if (why := self.unavailable()) is not None:
            raise BackendUnavailableError(f"target {self.name}: {why}")
        context.progress("generating code")
        return InductorEngine(in_inductors_forms(graph), inputs, self)

    def settings(self) -> dict[str, Any]:
        return {
            "freezing": self.freezing,
            "max_autotune": self.max_autotune,
            "cpp_wrapper": self.cpp_wrapper,
            **dict(self.options),
        }


class InductorEngine(Engine):
    """The compiled code; of a dynamic graph also for the batch (each input's first dimension) of size 1.

    Inductor may specialise against other sizes too (its guards say which, and are kept): those calls run the graph in
    PyTorch, and the first of them warns.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], backend: Inductor) -> None:
        self._graph = fx.GraphModule(graph, graph.graph)
        self._backend = backend
        self._copied = shared_outputs(graph)
        self._dynamic = _dynamic_dimensions(graph)
        self._compiled: dict[tuple[bool, ...], Callable[..., Sequence[torch.Tensor]]] = {}
        self._warned = False
        self._frozen, self._unfrozen_because = backend.freezing, ""
        self._quantised, self._integers = quantised_layers(self._graph), 0
        self._cloned = inputs_that_sums_read(self._graph)
        examples = [t.detach().contiguous() for t in inputs]
        for example in self._examples([t.clone() if i in self._cloned else t for i, t in enumerate(examples)]):
            self._compile(example)
        if self._quantised and not self._integers:
            raise LoweringError(
                f"Inductor makes integer products of none of the {self._quantised} quantised layers: that needs freezing=True and "
                "PyTorch with oneDNN on an x86 CPU"
            )

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            prepared = [t.detach().contiguous() if t.requires_grad or not t.is_contiguous() else t for t in inputs]
            for i in self._cloned:
                prepared[i] = prepared[i].clone() if prepared[i].data_ptr() == inputs[i].data_ptr() else prepared[i]
            run = self._compiled.get(tuple([prepared[i].shape[d] <= 1 for i, d in self._dynamic]))
            if run is None:
                self._ran_in_pytorch()
                run = self._graph.forward
            results = run(*prepared)
            return own_memory(results, self._copied) if self._copied else results

    def describe(self) -> EngineFacts:
        types = Counter(result_type(node) for node in self._graph.graph.nodes if node.op == "call_function")
        precisions = {name: count for name, count in types.items() if name is not None}
        notes = []
        if self._quantised:
            precisions["int8"] = self._integers
            notes.append(
                f"{self._integers} of {self._quantised} quantised layers are oneDNN's products of 8-bit integers"
            )
        if self._dynamic:
            notes.append(
                f"compiled for {len(self._compiled)} case(s); sizes that Inductor specialised against run in PyTorch"
            )
        if self._unfrozen_because:
            notes.append(
                f"weights are not frozen in: Inductor fails on this graph with frozen ones ({self._unfrozen_because})"
            )
        if self._frozen:
            notes.append("weights are frozen in: changing a parameter afterwards does not change the engine")
        weights = {id(t): t.nbytes for _, t in graphs.tensor_attributes(self._graph)}
        return EngineFacts(
            backend=self._backend.name,
            versions=self._backend.versions(),
            precisions=precisions,
            memory_bytes=sum(weights.values()) if self._frozen else 0,
            notes=tuple(notes),
        )

    def _ran_in_pytorch(self) -> None:
        if not self._warned:
            self._warned = True
            warn(
                "inductor: sizes that the compiled code was specialised against; this call and others like it run in "
                "PyTorch. Build a variant for them with buckets, or use another target"
            )

    def _examples(self, inputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The example, at sizes of 2 or more where they may be, and the same with a batch of 1."""
        sizes: dict[str, list[tuple[int, int]]] = {}
        for (i, d), symbol in self._dynamic.items():
            sizes.setdefault(symbol, []).append((i, d))
        general = list(inputs)
        batch_of_one = list(inputs)
        for symbol, places in sizes.items():
            if not symbol.isidentifier():  # computed from others: left to the example
                continue
            small = any(inputs[i].shape[d] < 2 for i, d in places)
            for i, d in places:
                if small:
                    general[i] = torch.cat([general[i]] * 2, d) if general[i].shape[d] == 1 else general[i]
                if any(d == 0 for _, d in places):
                    batch_of_one[i] = batch_of_one[i].narrow(d, 0, min(1, batch_of_one[i].shape[d])).contiguous()
        return [general] if all(b is g for b, g in zip(batch_of_one, general, strict=True)) else [general, batch_of_one]

    def _compile(self, inputs: list[torch.Tensor]) -> None:
        import torch._dynamo
        import torch._inductor.config
        import torch.fx.experimental._config

        inputs = [t.view(t.shape) for t in inputs]  # marking these dynamic marks nothing of the caller's
        ones = tuple(inputs[i].shape[d] <= 1 for i, d in self._dynamic)
        for (i, d), one in zip(self._dynamic, ones, strict=True):
            if not one:
                torch._dynamo.mark_dynamic(inputs[i], d)
        module = _noticing(self._graph, self._ran_in_pytorch)
        try:
            self._generate(module, inputs)
        except Exception as error:
            if not self._frozen:
                raise LoweringError(f"Inductor cannot compile the graph: {_reason(error)}") from error
            # Packed weights take layouts that Inductor's own checks do not always expect (seen with convolutions).
            self._frozen, self._unfrozen_because = False, _reason(error)
            return self._compile(inputs)
        # Never compiles: what the guards refuse runs the module's own code.
        self._compiled[ones] = torch._dynamo.run(module.forward)

    def _generate(self, module: fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        settings = self._backend.settings() | {"freezing": self._frozen}
        with (
            _COMPILING,
            torch.no_grad(),
            warnings.catch_warnings(),
            torch._inductor.config.patch(settings),
            # equal sizes in the example are a coincidence unless the graph says otherwise
            torch.fx.experimental._config.patch(use_duck_shape=False),  # type: ignore[attr-defined]
        ):
            warnings.simplefilter("ignore")  # torch's own, about torch's own code
            # the module's __call__ would hide an error that the generated code raises behind one of its own
            compiled = torch.compile(
                module.forward, fullgraph=True, dynamic=None if self._dynamic else False,
                options={"guard_filter_fn": _shape_guards_only},
            )  # fmt: skip
            before = integer_products_made()
            compiled(*inputs)
            # of the graph that fewest were found in, where it is compiled for several sizes
            made = integer_products_made() - before
            self._integers = min(made, self._integers) if self._integers else made


def _noticing(graph: fx.GraphModule, notice: Callable[[], None]) -> fx.GraphModule:
    """A copy of the graph, with code of its own (dynamo's cache goes by that), that calls `notice` when it runs
    uncompiled."""

    def accelkit_notice() -> None:
        if not torch.compiler.is_compiling():
            notice()

    copy = fx.GraphModule(graph, fx.Graph())
    nodes: dict[fx.Node, fx.Node] = {}
    returned = copy.graph.graph_copy(graph.graph, nodes)
    copy.graph.output(returned)
    first = next((n for n in copy.graph.nodes if n.op != "placeholder"), None)
    assert first is not None
    with copy.graph.inserting_before(first):
        copy.graph.call_function(accelkit_notice, ())
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        _assign(copy, name, tensor)
    for node in graph.graph.find_nodes(op="get_attr"):
        _assign(copy, str(node.target), graphs.attribute(graph, str(node.target)))
    copy.recompile()
    return copy


def _assign(module: nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            setattr(module, parent, nn.Module())
        module = getattr(module, parent)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _shape_guards_only(guards: Sequence[Any]) -> list[bool]:
    # Inputs are checked by the caller; how sizes relate to what Inductor specialised against is known to it alone.
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


def _dynamic_dimensions(graph: fx.GraphModule) -> dict[tuple[int, int], str]:
    """(input, dimension) -> its symbolic size."""
    return {
        (i, d): str(size)
        for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))
        for d, size in enumerate(graphs.val(node).shape if isinstance(graphs.val(node), torch.Tensor) else ())
        if isinstance(size, torch.SymInt)
    }


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:500] if lines else '(no message)'}"
