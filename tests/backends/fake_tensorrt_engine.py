"""The running half of the stand-in for TensorRT: plan -> engine -> context, refitter, inspector (see fake_tensorrt).

    plan = MAGIC, facts of the build (JSON, one line), the ONNX file --onnx's reference evaluator--> outputs, on the CPU

Addresses are those of CPU tensors (`tensor.data_ptr()`), streams are ignored, and a call is done when it returns.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

MAGIC = b"fake plan "
PADDING = b"\0padding"
ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
FORMATS = {  # how the inspector writes types: 8.6, and 10 and later
    "FLOAT": ("Row major linear FP32", "Float"),
    "HALF": ("Row major linear FP16 format", "Half"),
    "BF16": ("Row major linear BF16 format", "BFloat16"),
    "INT32": ("Row major linear INT32", "Int32"),
    "INT64": ("Row major linear INT64", "Int64"),
    "BOOL": ("Row major linear BOOL", "Bool"),
}


def new(kind: type, **state: Any) -> Any:
    """An object of a class that only the library makes."""
    made = object.__new__(kind)
    made.__dict__.update(state)
    return made


def dtype_of(trt: Any, value: Any) -> Any:
    """The network type of an ONNX value; 8.6 has int32 where the file has int64."""
    members = trt.DataType.__members__
    return members.get(ONNX_TYPES[value.type.tensor_type.elem_type], members["INT32"])


def shape_of(value: Any) -> tuple[int, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


def need_device(trt: Any, logger: Any) -> None:
    if trt._faults.get("no_device"):
        words = "CUDA initialization failure with error: 35. Please check your CUDA installation"
        logger.log(trt.ILogger.Severity.WARNING, words)
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Runtime:
    def __init__(self, logger: Any) -> None:
        need_device(self._trt, logger)
        self._logger = logger

    def get_plugin_registry(self) -> Any:
        return new(self._trt.IPluginRegistry)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        import onnx

        trt, plan = self._trt, bytes(serialized_engine)
        error = trt.ILogger.Severity.ERROR
        if not plan.startswith(MAGIC):
            self._logger.log(
                error, "1: [stdArchiveReader.cpp] Serialization assertion magicTagRead == kMAGIC_TAG failed."
            )
            return None
        head, _, model = plan[len(MAGIC) :].partition(PADDING)[0].partition(b"\n")
        facts = json.loads(head)
        if facts["version"] != trt.__version__ and "VERSION_COMPATIBLE" not in facts["flags"]:
            self._logger.log(
                error, f"6: The engine plan file was built by {facts['version']}, expecting {trt.__version__}"
            )
            return None
        return new(trt.ICudaEngine, _plan=plan, _facts=facts, _model=onnx.load_from_string(model))


class Engine:
    name = "Unnamed Network 0"
    num_aux_streams = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._io())

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self._facts["profiles"]))

    @property
    def refittable(self) -> bool:
        return "REFIT" in self._facts["flags"]

    @property
    def device_memory_size(self) -> int:
        return 4096

    device_memory_size_v2 = device_memory_size

    @property
    def profiling_verbosity(self) -> Any:
        return self._trt.ProfilingVerbosity.__members__[self._facts["verbosity"]]

    def get_tensor_name(self, index: int) -> str:
        return list(self._io())[index]

    def get_tensor_mode(self, name: str) -> Any:
        if name not in self._io():
            return self._trt.TensorIOMode.NONE
        inputs = {value.name for value in self._model.graph.input}
        return self._trt.TensorIOMode.INPUT if name in inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return dtype_of(self._trt, self._io()[name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._io()[name])

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        shapes = self._facts["profiles"][profile_index].get(name) if self._facts["profiles"] else None
        return [tuple(shape) for shape in shapes or [self.get_tensor_shape(name)] * 3]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        return new(self._trt.IExecutionContext, _engine=self, _shapes={}, _addresses={})

    def create_execution_context_without_device_memory(self) -> Any:
        return self.create_execution_context()

    def create_engine_inspector(self) -> Any:
        return new(self._trt.EngineInspector, _engine=self)

    def serialize(self) -> bytes:
        return self._plan

    def _io(self) -> dict[str, Any]:
        return {value.name: value for value in [*self._model.graph.input, *self._model.graph.output]}

    def _layer(self, node: Any, typed: dict[str, Any]) -> dict[str, Any]:
        """As the inspector writes it, with the type that the layer runs in."""
        facts, new_style = self._facts, "STRONGLY_TYPED" in self._trt.NetworkDefinitionCreationFlag.__members__
        lowered = not facts["typed"] and "FP16" in facts["flags"] and node.name not in facts["fp32"]
        faults = self._trt._faults
        lowered = lowered and not faults.get("stays_fp32")
        if faults.get("fp32_unless_told") and not facts["typed"]:
            lowered = node.name in facts["fp16"] and faults["fp32_unless_told"] != "nor then"

        def tensor(name: str) -> dict[str, Any]:
            value = typed.get(name)
            kind = "FLOAT" if value is None else dtype_of(self._trt, value).name
            kind = "HALF" if kind == "FLOAT" and lowered else kind
            kind = "FLOAT" if kind == "HALF" and faults.get("fp32_unless_told") and not lowered else kind
            shape = [] if value is None else list(shape_of(value))
            return {
                "Name": name,
                "Location": "Device",
                "Dimensions": shape,
                "Format/Datatype": FORMATS[kind][new_style],
            }

        weights = {initializer.name for initializer in self._model.graph.initializer}
        return {
            "Name": node.name,
            "LayerType": {"MatMul": "MatrixMultiply", "Gemm": "gemm"}.get(node.op_type, node.op_type),
            "Inputs": [tensor(name) for name in node.input if name and name not in weights],
            "Outputs": [tensor(name) for name in node.output if name],
            "Metadata": f"[ONNX Layer: {node.name}]",
        }

    def _layers(self) -> list[dict[str, Any]]:
        graph = self._model.graph
        typed = {value.name: value for value in [*graph.value_info, *graph.input, *graph.output]}
        return [self._layer(node, typed) for node in graph.node]


class Context:
    @property
    def engine(self) -> Any:
        return self._engine

    def set_input_shape(self, name: str, shape: Any) -> bool:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        shape = tuple(shape)
        if len(shape) != len(smallest) or not all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        ):
            return False
        self._shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [value.name for value in self._engine._model.graph.input if -1 in self.get_tensor_shape(value.name)]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        static = self._engine.get_tensor_shape(name)
        if name in self._shapes or self._engine.get_tensor_mode(name) == self._engine._trt.TensorIOMode.INPUT:
            return self._shapes.get(name, static)
        if -1 not in static or self.infer_shapes():
            return static
        return self._run(None)[name].shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._io():
            return False
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return profile_index < self._engine.num_optimization_profiles

    def set_device_memory(self, memory: int, size: int) -> None:
        self.__dict__["_device_memory"] = memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.infer_shapes() or set(self._addresses) != set(self._engine._io()):
            return False
        for name, value in self._run(self._addresses).items():
            ctypes.memmove(self._addresses[name], value.ctypes.data, value.nbytes)
        if (profiler := getattr(self, "profiler", None)) is not None:
            for node in self._engine._model.graph.node:
                profiler.report_layer_time(node.name, 0.25)
        return True

    def report_to_profiler(self) -> bool:
        return True

    def _run(self, addresses: dict[str, int] | None) -> dict[str, Any]:
        """Outputs in the network's types, from the memory at `addresses`, or from zeros for the shapes alone."""
        import numpy as np
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        graph = self._engine._model.graph
        feeds = {}
        for value in graph.input:
            shape, kind = self.get_tensor_shape(value.name), _numpy_type(self._engine.get_tensor_dtype(value.name))
            array = np.zeros(shape, kind)
            if addresses is not None:
                ctypes.memmove(array.ctypes.data, addresses[value.name], array.nbytes)
            feeds[value.name] = array.astype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        names = [value.name for value in graph.output]
        results = ReferenceEvaluator(self._engine._model).run(names, feeds)
        return {
            name: np.ascontiguousarray(np.asarray(result).astype(_numpy_type(self._engine.get_tensor_dtype(name))))
            for name, result in zip(names, results, strict=True)
        }


class Inspector:
    def get_engine_information(self, format: Any) -> str:
        layers: list[Any] = self._engine._layers()
        if self._engine._facts["verbosity"] != "DETAILED":
            layers = [layer["Name"] for layer in layers]
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._io())})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        return json.dumps(self._engine._layers()[layer_index])


class Weights:
    """From a NumPy array, or in 10 and later from an address."""

    def __init__(self, *given: Any) -> None:
        import numpy as np

        if len(given) == 3:
            kind, address, count = given
            array = np.zeros(count, _numpy_type(kind))
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
            self._array = array
        else:
            self._array = given[0]

    def numpy(self) -> Any:
        return self._array


class Refitter:
    def __init__(self, engine: Any, logger: Any) -> None:
        self._engine, self._logger, self._new = engine, logger, {}
        if not engine.refittable:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def get_all_weights(self) -> list[str]:
        return [initializer.name for initializer in self._engine._model.graph.initializer]

    def get_missing_weights(self) -> list[str]:
        return []

    def set_named_weights(self, name: str, weights: Any, location: Any = None) -> bool:
        if name not in self.get_all_weights():
            return False
        self._new[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        from onnx import helper, numpy_helper

        for initializer in self._engine._model.graph.initializer:
            if (weights := self._new.get(initializer.name)) is None:
                continue
            array = weights.numpy() if hasattr(weights, "numpy") else weights
            kind = helper.tensor_dtype_to_np_dtype(initializer.data_type)
            array = array.astype(kind).reshape(tuple(initializer.dims))
            initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        return self.refit_cuda_engine()


def _numpy_type(dtype: Any) -> Any:
    import ml_dtypes
    import numpy as np

    types = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}
    return np.dtype({**types, "BF16": ml_dtypes.bfloat16, "INT8": np.int8, "UINT8": np.uint8}[dtype.name])


RUNTIME: dict[str, type] = {
    "EngineInspector": Inspector,
    "ICudaEngine": Engine,
    "IExecutionContext": Context,
    "Refitter": Refitter,
    "Runtime": Runtime,
    "Weights": Weights,
}
