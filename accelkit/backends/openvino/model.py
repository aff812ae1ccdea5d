"""ModelProto without weights + torch's tensors -> ov.Model -> ov.CompiledModel

OpenVINO reads the model with its weights as inputs, so that nothing of their values is folded while it reads; each is then
replaced by a constant. A constant that only products read is a view of torch's memory: the CPU plugin packs those into
a layout of its own when it compiles. The others (tables, biases, norms) it may read where they lie at every call, so they
are copied: an engine stays what it was when the model's parameters are changed afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from accelkit.errors import LoweringError

if TYPE_CHECKING:
    import onnx

    from accelkit.backends.openvino.backend import OpenVINO

PRODUCTS = frozenset({"MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData"})
"""OpenVINO's operators whose constant operand the CPU plugin packs."""
_SNIPPETS = "SNIPPETS_MODE"
_ON_THE_WAY = frozenset({"Transpose", "Convert"})  # between a weight and its product


@functools.cache
def core() -> Any:
    """The process's ov.Core: loading a plugin takes time, and compiled models share its threads' bookkeeping."""
    import openvino

    return openvino.Core()


def read_model(model: onnx.ModelProto, weights: Mapping[str, torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    """The ov.Model of an ONNX model from `export_onnx`, and the tensors that it reads where they lie.

    OpenVINO does not keep those alive: whoever holds the model, or what is compiled from it, has to.

    Args:
        model: as `export_onnx` gives it.
        weights: as `external_weights` gives them.

    Raises:
        LoweringError: OpenVINO refuses the model.
    """
    data = _weights_as_inputs(model).SerializeToString()
    shared: list[torch.Tensor] = []
    try:
        found = core().read_model(data, b"")
        for parameter in found.get_parameters():
            name = parameter.output(0).get_any_name()
            if name in weights:
                shared += _replace(found, parameter, weights[name])
        found.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise LoweringError(f"OpenVINO refuses the model: {reason(error)}") from error
    return found, shared


def compile_model(found: Any, backend: OpenVINO) -> tuple[Any, str | None]:
    """Compile an ov.Model for the CPU with the backend's options; and what had to be switched off for that, if anything.

    Raises:
        LoweringError: OpenVINO cannot compile it, or does not know a property.
    """
    import openvino

    hint = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}[backend.inference_precision]
    properties = {
        # without it OpenVINO picks bfloat16 for a float32 model wherever the CPU has it
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": backend.performance.upper(),
        "INFERENCE_NUM_THREADS": backend.threads or torch.get_num_threads(),
    }
    if backend.streams is not None:
        properties["NUM_STREAMS"] = backend.streams
    properties |= dict(backend.properties)
    try:
        return core().compile_model(found, "CPU", properties), None
    except (RuntimeError, TypeError) as error:  # TypeError: a property of a type that it does not take
        why = f"OpenVINO cannot compile the model: {reason(error)}"
        # Its generator of fused element-wise kernels fails on some graphs (T5's decoder, 2026.4) that its other kernels run.
        if _SNIPPETS in properties:
            raise LoweringError(why) from error
        try:
            compiled = core().compile_model(found, "CPU", properties | {_SNIPPETS: "DISABLE"})
        except (RuntimeError, TypeError):
            raise LoweringError(why) from error
        return (
            compiled,
            f"without OpenVINO's generated kernels ({_SNIPPETS}=DISABLE), because with them: {reason(error)}",
        )


def as_ov(tensor: torch.Tensor) -> Any:
    """An ov.Tensor over a contiguous tensor's own memory."""
    import openvino

    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def ov_type(dtype: torch.dtype) -> Any:
    """OpenVINO's name of a torch dtype."""
    import openvino

    if dtype is torch.bfloat16:
        return openvino.Type.bf16
    return openvino.Type(torch.empty(0, dtype=dtype).numpy().dtype)


def reason(error: BaseException) -> str:
    """What OpenVINO says in one line: its messages start with places in its own sources, and the last line says what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    says = [line for line in lines if not line.startswith(("Exception from", "Check '"))] or lines
    return f"{type(error).__name__}: {' '.join(says)[:500] if says else '(no message)'}"


def _weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose external initializers are inputs (OpenVINO would look for their files)."""
    import onnx

    found = onnx.ModelProto()
    found.CopyFrom(model)
    del found.graph.initializer[:]
    for initializer in model.graph.initializer:
        if initializer.data_location == initializer.EXTERNAL:
            found.graph.input.append(
                onnx.helper.make_tensor_value_info(initializer.name, initializer.data_type, list(initializer.dims))
            )
        else:
            found.graph.initializer.append(initializer)
    return found


def _replace(found: Any, parameter: Any, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Put a constant where the parameter was; the tensor, if the constant is a view of it."""
    from openvino import op

    tensor = tensor.detach().cpu().contiguous()
    shared = _only_products_read(parameter.output(0))
    constant = op.Constant(as_ov(tensor), shared_memory=shared)
    constant.set_friendly_name(parameter.get_friendly_name())
    parameter.output(0).replace(constant.output(0))
    found.remove_parameter(parameter)
    return [tensor] if shared else []


def _only_products_read(output: Any) -> bool:
    readers = [target.get_node() for target in output.get_target_inputs()]
    return bool(readers) and all(
        reader.get_type_name() in PRODUCTS
        or (reader.get_type_name() in _ON_THE_WAY and _only_products_read(reader.output(0)))
        for reader in readers
    )
