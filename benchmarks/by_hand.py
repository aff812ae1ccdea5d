"""What accelkit is measured against, written as a user would by hand: ONNX Runtime, torch.compile, plain casts.

Each function gives back a call without arguments that returns the model's outputs as a list of tensors.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from accelkit.accuracy import relative_error
from accelkit.models import Inputs

Call = Callable[[], list[torch.Tensor]]


def flat_call(model: Callable[..., Any], inputs: Inputs) -> Call:
    """The model on its inputs; outputs without their structure."""
    if isinstance(inputs, dict):
        return lambda: tensors_of(model(**inputs))
    return lambda: tensors_of(model(*inputs))


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def cast(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    """A copy of the model in another dtype, and its inputs; the model itself where it has that dtype."""
    if dtype == torch.float32:
        return model, inputs
    narrow: Inputs = pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    return copy.deepcopy(model).to(dtype), narrow


def plain(model: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Call:
    """`model.to(dtype)`."""
    return flat_call(*cast(model, inputs, dtype))


def torch_compiled(model: nn.Module, inputs: Inputs, dtype: torch.dtype, freezing: bool) -> Call:
    """`torch.compile(model)`, as it comes or with Inductor's freezing; compiled here, not at the first timed call."""
    narrow, given = cast(model, inputs, dtype)
    options: dict[str, Any] = {"options": {"freezing": True}} if freezing else {}
    call = flat_call(torch.compile(narrow, dynamic=False, **options), given)
    with torch.no_grad():
        call()
    return call


def onnxruntime_session(model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Call:
    """torch.onnx.export to a file, an InferenceSession from it; numpy in and out on a CPU, bound buffers on a GPU."""
    import onnxruntime

    narrow, given = cast(model, inputs, dtype)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    tensors = list(given.values()) if isinstance(given, dict) else list(given)
    device = tensors[0].device
    with tempfile.TemporaryDirectory(prefix="accelkit-by-hand-") as folder:
        path = Path(folder) / "model.onnx"
        with torch.no_grad(), quiet():
            program = torch.onnx.export(narrow, args, kwargs=kwargs, dynamo=True, verbose=False)
        assert program is not None
        program.save(path, external_data=True)
        del program
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # the same number of threads for all candidates
        options.log_severity_level = 3
        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on without a provider that does not load
        raise RuntimeError(f"onnxruntime fell back to {session.get_providers()[0]}")
    names = [i.name for i in session.get_inputs()]
    by_name = dict(zip(names, tensors, strict=True)) if not isinstance(given, dict) else {n: given[n] for n in names}
    if device.type == "cuda":
        return _bound_call(session, by_name)
    return lambda: [torch.from_numpy(o) for o in session.run(None, {n: t.numpy() for n, t in by_name.items()})]


def openvino_model(model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float32) -> Call:
    """ov.convert_model of the module, compiled for latency; bfloat16 as OpenVINO's users ask for it, by the hint."""
    import openvino

    # convert_model traces the module: TorchScript takes tuples, and transformers' outputs are none
    example = inputs if isinstance(inputs, dict) else tuple(inputs)
    with torch.no_grad(), quiet():
        converted = openvino.convert_model(model, example_input=example)
    tensors = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    converted.reshape({i: list(tensor.shape) for i, tensor in enumerate(tensors)})
    properties = {
        "INFERENCE_PRECISION_HINT": openvino.Type.bf16 if dtype is torch.bfloat16 else openvino.Type.f32,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),  # the same number of threads for all candidates
    }
    compiled = openvino.compile_model(converted, "CPU", properties)
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]
    by_name = inputs if isinstance(inputs, dict) else dict(zip(names, tensors, strict=True))
    feed = {name: by_name[name].numpy() for name in names}

    def call() -> list[torch.Tensor]:
        results = request.infer(feed, share_inputs=True)  # results are copied: the request writes over its own
        return [torch.from_numpy(results[port]) for port in compiled.outputs]

    return call


def _bound_call(session: Any, by_name: dict[str, torch.Tensor]) -> Call:
    import numpy as np

    binding = session.io_binding()
    for name, tensor in by_name.items():
        kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
        binding.bind_input(name, "cuda", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)

    def call() -> list[torch.Tensor]:
        session.run_with_iobinding(binding)
        return [torch.from_dlpack(value._ortvalue.to_dlpack()) for value in binding.get_outputs()]

    return call


def float64_outputs(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The truth: a float64 copy of the whole model, independent of accelkit's own float64 run."""
    wide, given = cast(model, inputs, torch.float64)
    with torch.no_grad():
        return flat_call(wide, given)()


def worst_error(call: Call, truth: list[torch.Tensor]) -> float:
    """Largest relative error (Frobenius norm) over the outputs."""
    with torch.no_grad():
        outputs = call()
    if len(outputs) != len(truth):
        raise RuntimeError(f"{len(outputs)} outputs where the model has {len(truth)}")
    return max(relative_error(output, right) for output, right in zip(outputs, truth, strict=True))


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter's and the compiler's warnings are not the benchmark's subject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
