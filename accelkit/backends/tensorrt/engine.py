"""A TensorRT plan on torch's tensors.

    caller's tensors --dtype, contiguous, aligned--> context of a pool --execute_async_v3 on the caller's stream--> results

Results are allocated by PyTorch on the caller's stream; nothing synchronises and nothing goes through the host. What a call needs
of TensorRT's Python objects is looked up once; shapes and addresses are set only where they change.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence

import torch
from torch import fx

from accelkit import graph as graphs
from accelkit.backend_api import Engine, EngineFacts
from accelkit.backends.tensorrt import library, profiling, refitting, versions
from accelkit.backends.tensorrt.contexts import ALIGNMENT, Binding, Context, ContextPool
from accelkit.backends.tensorrt.judging import require_precision
from accelkit.backends.tensorrt.manifest import MANIFEST, PLAN, Manifest, require_fit
from accelkit.backends.tensorrt.proof import Proof, prove
from accelkit.backends.tensorrt.replay import Replay, recorded
from accelkit.backends.tensorrt.runtime import deserialised
from accelkit.backends.tensorrt.streams import Streams
from accelkit.errors import InputError, LoweringError

NAME = "tensorrt"
_MISALIGNED = ALIGNMENT - 1


class TensorRTEngine(Engine):
    """A deserialised plan with its execution contexts."""

    def __init__(
        self,
        plan: bytes,
        manifest: Manifest,
        graph: fx.GraphModule,
        inputs: Sequence[torch.Tensor],
        *,
        contexts: int = 4,
        cuda_graph: bool = False,
        plugin_libraries: Sequence[str] = (),
    ) -> None:
        """Load a plan that was just built, or was kept.

        Args:
            plan: checked against the manifest's hash (Manifest.from_blobs).
            manifest: without a proof, the engine is watched on the example, and the proof is made and judged.
            graph: what it was built from; its weights go into a refittable engine that was built with others.
            inputs: the example, on the GPU.
            contexts: most calls that run at the same time.
            cuda_graph: replay the example's shapes as a CUDA graph.
            plugin_libraries: shared libraries with plugins that the plan uses.

        Raises:
            LoweringError: it is for another TensorRT or GPU, the library refuses it, it does not fit the graph, cannot take the
                graph's weights, or its matrix products run in another precision than asked.
        """
        tensorrt = library.loaded()
        device = _device(inputs)
        require_fit(manifest, str(tensorrt.__version__), library.device_facts(device.index))
        self._streams = streams = Streams(device)
        self._index, self._device_now = streams.index, streams.device_now
        self._current, self._capturing = streams.current, streams.capturing
        self._plan, self._tensorrt, self._manifest = plan, tensorrt, manifest
        self._replay: Replay | None = None
        self._graph_note = ""
        self._counting, self._calls = threading.Lock(), collections.Counter[str]()
        self._captured: list[Context] = []  # those that belong to CUDA graphs
        with streams.on_device():
            self._engine, self._runtime = deserialised(
                tensorrt, plan, plugin_libraries, host_code=manifest.version_compatible
            )
            self._refitted = self._refit(manifest, graph)
            self._bind(manifest, graph, inputs)
            self._pool = ContextPool(tensorrt, self._engine, self._inputs, self._outputs, self._streams, contexts)
            if manifest.proof is None:
                proof = self._watch(inputs)
                judged = require_precision(proof, manifest.precision, manifest.keep_fp32, manifest.wide)
                notes = (*manifest.notes, *judged)
                self._manifest = dataclasses.replace(manifest, proof=proof.to_json(), notes=notes)
            if cuda_graph:
                self._replay, self._graph_note = self._record(inputs)

    # --- calling

    def __call__(self, *inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run on the caller's stream, without waiting.

        Raises:
            InputError: an input that is empty, on another device, or of a shape that the engine does not cover.
            LoweringError: the library failed, or the GPU has no memory for one more context.
        """
        if self._device_now() != self._index:
            with self._streams.on_device():
                return self._call(inputs)
        return self._call(inputs)

    def _call(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        stream = self._current()
        if self._capturing():
            return self._captured_call(inputs, stream)
        if self._replay is not None and self._replay.fits(inputs):
            self._require_here(inputs)
            self._count("replayed")
            return self._replay(inputs, stream)
        tensors = self._prepared(inputs)
        shapes = tuple([t.shape for t in tensors])
        context = self._pool.take(stream, shapes)
        try:
            context.enter(stream)
            results = context.enqueue(tensors, shapes, stream)
            self._streams.mark(context.done)
        finally:
            self._pool.give(context)
        if self._replay is not None:
            self._count("not recorded")
        return self._as_asked(results) if self._converted else results

    def _count(self, how: str) -> None:
        with self._counting:
            self._calls[how] += 1

    def counters(self) -> dict[str, int]:
        """Where there is a CUDA graph: calls that `replayed` it, and those `not recorded`."""
        with self._counting:
            return dict(self._calls)

    def _captured_call(self, inputs: Sequence[torch.Tensor], stream: int) -> Sequence[torch.Tensor]:
        """Inside the caller's own CUDA graph: the context belongs to that graph from now on."""
        tensors = self._prepared(inputs)
        shapes = tuple([t.shape for t in tensors])
        context = self._pool.take_warm(shapes)
        if context is None:
            raise InputError(
                "a TensorRT engine is being captured in a CUDA graph without having run these shapes: call it once with them, and "
                "synchronise, before capturing"
            )
        self._captured.append(context)
        return self._as_asked(context.enqueue(tensors, shapes, stream))

    def _prepared(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the engine reads: its dtypes, contiguous, at aligned addresses. The stream keeps copies alive."""
        prepared = []
        index = self._index
        for position, dtype in self._taken:
            tensor = inputs[position]
            if tensor.get_device() != index:
                self._require_here(inputs)
            if tensor.requires_grad:
                tensor = tensor.detach()
            if tensor.dtype is not dtype:
                tensor = tensor.to(dtype)
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
            if tensor.data_ptr() & _MISALIGNED:  # a slice of another tensor
                tensor = tensor.clone()
            prepared.append(tensor)
        return prepared

    def _require_here(self, inputs: Sequence[torch.Tensor]) -> None:
        for name, tensor in zip(self._names, inputs, strict=True):
            if tensor.device != self._streams.device:
                raise InputError(
                    f"tensorrt: input {name} is on {tensor.device}, the engine on {self._streams.device}; move it there"
                )

    def _as_asked(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        for position, dtype in self._converted:
            results[position] = results[position].to(dtype)
        return results

    # --- keeping and telling

    def serialize(self) -> dict[str, bytes]:
        """The plan as it was built (a refit is made again where it is loaded) and its manifest."""
        return {PLAN: self._plan, MANIFEST: self._manifest.to_bytes()}

    def describe(self) -> EngineFacts:
        manifest, proof = self._manifest, self.proof
        scratch = f"{self._pool.context_bytes / 2**20:.1f} MiB of activations for each"
        notes = [*(proof.sentences() if proof is not None else ()), *manifest.notes]
        if self._wide:
            notes.append(
                f"{', '.join(self._wide)}: int64 values run as int32, which this TensorRT has for them; larger ones would wrap"
            )
        if self._graph_note:
            notes.append(self._graph_note)
        notes.append(
            f"plan of {len(self._plan) / 2**20:.1f} MiB; {self._pool.made} execution context(s) so far, {scratch}"
        )
        if manifest.weights:
            notes.append(f"refittable{': the weights are not those that it was built with' if self._refitted else ''}")
        driver = {"driver": manifest.device["driver"]} if "driver" in manifest.device else {}
        return EngineFacts(
            backend=NAME,
            versions={"torch": torch.__version__, "tensorrt": manifest.tensorrt, **driver},
            precisions=proof.precisions() if proof is not None else {},
            memory_bytes=len(self._plan),
            notes=tuple(notes),
        )

    def note(self, *sentences: str) -> None:
        """Keep more sentences for the report, in the serialised form too."""
        self._manifest = dataclasses.replace(self._manifest, notes=(*self._manifest.notes, *sentences))

    @property
    def manifest(self) -> Manifest:
        """What it is, proof included."""
        return self._manifest

    @property
    def proof(self) -> Proof | None:
        """What its layers really run in."""
        return None if self._manifest.proof is None else Proof.from_json(self._manifest.proof)

    # --- making

    def _refit(self, manifest: Manifest, graph: fx.GraphModule) -> bool:
        if not manifest.weights:
            return False
        weights = refitting.weights_of(graph, manifest.weights)
        if refitting.fingerprint(weights) == manifest.weights_sha256:
            return False
        refitting.refit(self._tensorrt, self._engine, weights, self._streams)
        return True

    def _bind(self, manifest: Manifest, graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
        """Match the network's tensors with the graph's placeholders and results."""
        tensorrt, engine = self._tensorrt, self._engine
        there = {str(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors)}
        given = [name for name in there if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT]
        placeholders = graph.graph.find_nodes(op="placeholder")
        results = [graphs.val(node) for node in _results(graph)]
        if set(given) - set(manifest.inputs) or there - set(given) != set(manifest.outputs):
            raise LoweringError(f"the engine has the tensors {sorted(there)}, which its manifest does not name")
        if len(manifest.inputs) != len(placeholders) or len(manifest.outputs) != len(results):
            raise LoweringError(
                f"the engine has {len(manifest.inputs)} inputs and {len(manifest.outputs)} results, the graph "
                f"{len(placeholders)} and {len(results)}"
            )
        for name in there:
            if engine.is_shape_inference_io(name):
                raise LoweringError(
                    f"TensorRT wants the values of {name} on the host: sizes inside the model depend on them"
                )
        dtypes = {name: getattr(torch, versions.dtype_name(engine.get_tensor_dtype(name))) for name in there}
        self._names = manifest.inputs
        self._taken = [(i, dtypes[name]) for i, name in enumerate(manifest.inputs) if name in there]
        self._inputs = [Binding(name, dtypes[name]) for name in manifest.inputs if name in there]
        self._outputs = [Binding(name, dtypes[name]) for name in manifest.outputs]
        wanted = [value.dtype for value in results]
        self._converted = [(i, want) for i, want in enumerate(wanted) if want is not self._outputs[i].dtype]
        self._wide = [
            name
            for name, tensor in zip(manifest.inputs, inputs, strict=True)
            if tensor.dtype is torch.int64 and dtypes.get(name) is torch.int32
        ]

    def _watch(self, inputs: Sequence[torch.Tensor]) -> Proof:
        """Run the example, watched; with a context that is thrown away, since it reports its times at each call."""
        context = Context(self._tensorrt, self._engine, self._inputs, self._outputs, self._streams)
        run = self._runner(context, inputs)
        run()  # the first run loads kernels
        text = profiling.information(self._tensorrt, self._engine, context.context)
        return prove(
            text,
            functools.partial(profiling.kernel_times, run),
            functools.partial(profiling.layer_times, self._tensorrt, context.context, run),
            self._manifest.precision,
        )

    def _runner(self, context: Context, inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        tensors = self._prepared(inputs)
        shapes = tuple([t.shape for t in tensors])

        def run() -> None:
            stream = self._current()
            context.enter(stream)
            context.enqueue(tensors, shapes, stream)
            self._streams.synchronize()

        return run

    def _record(self, example: Sequence[torch.Tensor]) -> tuple[Replay | None, str]:
        context = Context(self._tensorrt, self._engine, self._inputs, self._outputs, self._streams)

        def forward(*inputs: torch.Tensor) -> list[torch.Tensor]:
            tensors = self._prepared(inputs)
            return self._as_asked(context.enqueue(tensors, tuple([t.shape for t in tensors]), self._current()))

        replay, note = recorded(forward, [t.detach() for t in example], self._streams, context.scratch)
        if replay is not None:
            self._captured.append(context)  # its scratch memory is the recording's
        return replay, note


def _device(inputs: Sequence[torch.Tensor]) -> torch.device:
    found = next((t.device for t in inputs if t.is_cuda), None)
    if found is not None:
        return found
    if inputs and not all(t.is_cuda for t in inputs):
        raise LoweringError("TensorRT runs on a GPU, and the inputs are not there: model.cuda(), and inputs .cuda()")
    return torch.device("cuda", torch.cuda.current_device())


def _results(graph: fx.GraphModule) -> list[fx.Node]:
    (returned,) = graph.graph.output_node().args
    return list(returned)  # type: ignore[arg-type]
