"""Sessions: ONNX Runtime with a model, its live weights, and a provider that is really there."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from accelkit.errors import BackendUnavailableError, LoweringError

if TYPE_CHECKING:
    from accelkit.backends.onnxruntime.backend import OnnxRuntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_WRONG_FUSIONS = ("Pad_Fusion",)
"""ONNX Runtime's own rewrites that change results: Pad_Fusion puts a Pad with zeros into a MaxPool, whose padding is minus
infinity (seen with 1.30 and 1.31)."""
_WRONG_IN_FLOAT64 = ("MatMulScaleFusion",)
"""Those that do so in float64: MatMulScaleFusion rounds a product's factor to float32."""


@dataclass(frozen=True)
class Place:
    """Where a session runs.

    Attributes:
        provider: `cpu` or `cuda`.
        device: index of the GPU.
        tf32: whether float32 products may be rounded to TF32.
        stream: the CUDA stream that it enqueues its work on.
    """

    provider: str
    device: int = 0
    tf32: bool = False
    stream: Any = None


def create_session(
    data: bytes, weights: Mapping[str, torch.Tensor], backend: OnnxRuntime, place: Place, float64: bool = False
) -> Any:
    """An InferenceSession of the model `data`; it has its own copies of the weights. `float64`: whether it computes in that.

    Raises:
        LoweringError: ONNX Runtime refuses the model.
        BackendUnavailableError: its CUDA provider cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings are about the model, not for the user to act on; errors are raised
    options.intra_op_num_threads = backend.threads or torch.get_num_threads()
    options.inter_op_num_threads = backend.inter_op_threads
    if backend.inter_op_threads > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[backend.optimization])
    for key, value in backend.session_config:
        options.add_session_config_entry(key, value)
    # Views of torch's memory; the session has its own copies once it exists.
    views = [_ort_value(tensor) for tensor in weights.values()]
    if views:
        options.add_external_initializers(list(weights), views)
    if place.provider == "cuda":
        _load_libraries()
    try:
        onnxruntime.set_default_logger_severity(3)  # fusions report on the default logger, not on the session's
        session = onnxruntime.InferenceSession(
            data, options, providers=_providers(backend, place),
            disabled_optimizers=[*_WRONG_FUSIONS, *(_WRONG_IN_FLOAT64 if float64 else ())],
        )  # fmt: skip
    except Exception as error:
        raise LoweringError(f"ONNX Runtime refuses the model: {first_line(error)}") from error
    finally:
        onnxruntime.set_default_logger_severity(2)  # its own default; there is no way to ask what it was
    if session.get_providers()[0] != PROVIDERS[place.provider]:
        # it falls back to the CPU with a warning on stderr, and is then many times slower than asked for
        raise BackendUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its {PROVIDERS[place.provider]}: its CUDA and cuDNN "
            "libraries are missing or of another version (onnxruntime.print_debug_info() lists them)"
        )
    return session


def _providers(backend: OnnxRuntime, place: Place) -> list[Any]:
    if place.provider == "cpu":
        return [PROVIDERS["cpu"]]
    options = {
        "device_id": str(place.device),
        "user_compute_stream": str(place.stream.cuda_stream),
        "use_tf32": str(int(place.tf32)),
        "arena_extend_strategy": "kSameAsRequested",  # PyTorch needs the rest
        "enable_cuda_graph": str(int(backend.cuda_graph)),
    }
    # operators without a CUDA kernel run on the CPU provider
    return [(PROVIDERS["cuda"], options | dict(backend.provider_options)), PROVIDERS["cpu"]]


@functools.cache
def _load_libraries() -> None:
    """CUDA's and cuDNN's libraries, from PyTorch's or NVIDIA's wheels: ONNX Runtime does not look there by itself."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # prints what it does not find; the session's provider tells
            onnxruntime.preload_dlls()


def _ort_value(tensor: torch.Tensor) -> Any:
    import onnxruntime

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.int16).numpy(), 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:500] if lines else '(no message)'}"
