"""The building half of the stand-in for TensorRT: ONNX file -> network -> plan, timing cache, plugins (see fake_tensorrt)."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from fake_tensorrt_engine import MAGIC, PADDING, dtype_of, need_device, new, shape_of


class _Builder:
    def __init__(self, logger: Any) -> None:
        need_device(self._trt, logger)
        self._logger = logger
        time.sleep(self._trt._faults.get("start_seconds", 0))

    def create_network(self, flags: int = 0) -> Any:
        network = new(self._trt.INetworkDefinition, _flags=flags, _logger=self._logger)
        members = self._trt.NetworkDefinitionCreationFlag.__members__
        if "EXPLICIT_BATCH" in members and not flags:
            raise RuntimeError("the stand-in has no implicit batch dimension")
        network._typed = bool("STRONGLY_TYPED" in members and flags >> int(members["STRONGLY_TYPED"]) & 1)
        return network

    def create_builder_config(self) -> Any:
        flags = 1 << int(self._trt.BuilderFlag.TF32)
        return new(self._trt.IBuilderConfig, _flags=flags, _profiles=[], _cache=None, _logger=self._logger)

    def create_optimization_profile(self) -> Any:
        return new(self._trt.IOptimizationProfile, _shapes={})

    def get_plugin_registry(self) -> Any:
        return new(self._trt.IPluginRegistry)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        trt, faults = self._trt, self._trt._faults
        flag = trt.BuilderFlag.__members__
        if network._typed and any(config._flags >> int(flag[f]) & 1 for f in ("FP16", "BF16") if f in flag):
            self._logger.log(trt.ILogger.Severity.ERROR, "precision flags are not allowed in a strongly typed network")
            return None
        if any(-1 in tensor.shape for tensor in network._inputs()) and not config._profiles:
            self._logger.log(trt.ILogger.Severity.ERROR, "4: [network.cpp] Network has dynamic or shape inputs, but no "
                             "optimization profile has been defined.")  # fmt: skip
            return None
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None:
            monitor.phase_start("Building Engine", None, 4)
            monitor.phase_start("Tactics", "Building Engine", 2)
        self._logger.log(trt.ILogger.Severity.WARNING, "a warning\nof two lines")
        self._logger.log(trt.ILogger.Severity.WARNING, "a warning of two lines")
        if (name := faults.get("build_exit")) is not None:
            os.kill(os.getpid(), signal.Signals[name])
        for step in range(4):
            time.sleep(faults.get("build_seconds", 0) / 4)
            if monitor is not None:
                monitor.step_complete("Building Engine", step)
        if monitor is not None:
            monitor.phase_finish("Building Engine")
        if (words := faults.get("build_fails")) is not None:
            self._logger.log(trt.ILogger.Severity.ERROR, words)
            return None
        told = {}
        if faults.get("tells"):
            told = {"pid": os.getpid(), "timed": sorted(config._cache._entries) if config._cache is not None else []}
        if config._cache is not None:
            config._cache._entries |= {node.op_type for node in network._model.graph.node}
        facts = {
            "version": trt.__version__,
            "flags": sorted(name for name, f in flag.items() if config._flags >> int(f) & 1),
            "typed": network._typed,
            "profiles": [profile._shapes for profile in config._profiles],
            "fp32": sorted(
                layer.name for layer in network._layers() if getattr(layer, "precision", None) is trt.float32
            ),
            "fp16": sorted(
                layer.name for layer in network._layers() if getattr(layer, "precision", None) is trt.float16
            ),
            "verbosity": config.profiling_verbosity.name
            if config.profiling_verbosity is not None
            else "LAYER_NAMES_ONLY",
            "tactic_sources": config._sources,
            "workspace": config._workspace,
        } | told
        plan = MAGIC + json.dumps(facts).encode() + b"\n" + network._model.SerializeToString()
        return _HostMemory(plan + PADDING * (faults.get("plan_bytes", 0) // len(PADDING)))


class _HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class _Config:
    _sources: int | None = None
    _workspace: int | None = None

    def set_flag(self, flag: Any) -> None:
        self._flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._workspace = pool_size

    def get_tactic_sources(self) -> int:
        if self._sources is None:  # outside libraries are on by default in 8.6 alone
            known = self._trt.TacticSource.__members__
            old = self._trt.__version__.startswith("8")
            self._sources = sum(1 << int(known[name]) for name in known if old or not name.startswith("CU"))
        return self._sources

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self._sources = tactic_sources
        return True

    def add_optimization_profile(self, profile: Any) -> int:
        if self._trt._faults.get("profile_refused"):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        data = bytes(serialized_timing_cache)
        if data and self._trt._faults.get("cache_refused"):
            error = self._trt.ILogger.Severity.ERROR
            self._logger.log(error, "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1: Myelin")
            self._logger.log(error, "4: The timing cache will not be used!")
            data = b""
        version, _, entries = data.decode().partition(":")
        return new(self._trt.ITimingCache, _version=version or self._trt.__version__, _entries=set(entries.split()))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._version != self._trt.__version__:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class _TimingCache:
    def serialize(self) -> bytes:
        return f"{self._version}:{' '.join(sorted(self._entries))}".encode()

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if input_cache._version == self._version:
            self._entries |= input_cache._entries
        return input_cache._version == self._version


class _Profile:
    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> Any:
        return self._shapes[input]


class _Registry:
    @property
    def plugin_creator_list(self) -> list[str]:
        return self._trt._creators

    all_creators = plugin_creator_list

    def load_library(self, plugin_path: str) -> Any:
        if "without_plugins" in plugin_path:
            return None
        self._trt._creators.append(plugin_path)
        return object()


class _Network:
    _model: Any = None

    @property
    def num_inputs(self) -> int:
        return len(self._inputs())

    @property
    def num_outputs(self) -> int:
        return len(self._model.graph.output)

    @property
    def num_layers(self) -> int:
        return len(self._layers())

    def get_input(self, index: int) -> Any:
        return self._inputs()[index]

    def get_output(self, index: int) -> Any:
        return _tensor(self._trt, self._model.graph.output[index])

    def get_layer(self, index: int) -> Any:
        return self._layers()[index]

    def _inputs(self) -> list[Any]:
        return [_tensor(self._trt, value) for value in self._model.graph.input]

    def _layers(self) -> list[Any]:
        if not hasattr(self, "_made"):
            known = {value.name: value for value in [*self._model.graph.value_info, *self._model.graph.output]}
            self._made = [self._layer(node, known) for node in self._model.graph.node]
        return self._made

    def _layer(self, node: Any, known: dict[str, Any]) -> Any:
        kinds = {
            "Cast": "CAST",
            "Constant": "CONSTANT",
            "Shape": "SHAPE",
            "MatMul": "MATRIX_MULTIPLY",
            "Conv": "CONVOLUTION",
        }
        layer = new(
            self._trt.ILayer, _outputs=[_tensor(self._trt, known[name]) for name in node.output if name in known]
        )
        layer.__dict__.update(_name=node.name, _metadata=f"[ONNX Layer: {node.name}]", _num_outputs=len(layer._outputs))
        layer.__dict__.update(_type=self._trt.LayerType.__members__[kinds.get(node.op_type, "ELEMENTWISE")])
        return layer


class _Layer:
    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._outputs[index].dtype = dtype


class _Parser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger, self._errors = network, logger, []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        import onnx

        trt = self._trt
        error = trt.ILogger.Severity.ERROR
        if not os.path.exists(model):
            self._logger.log(error, f"Could not open file {model}")
            return False
        read = onnx.load(model)
        for index, node in enumerate(read.graph.node):
            if node.op_type in trt._faults.get("refuse", ()):
                message = f"No importer registered for op: {node.op_type}"
                self._errors.append(new(trt.ParserError, _index=index, _message=message, _node=node))
                self._logger.log(error, f"[parser] {message}")
        if self._errors:
            return False
        self._network._model = onnx.shape_inference.infer_shapes(read)
        if trt._faults.get("stdout"):
            os.write(1, (trt._faults["stdout"] + "\n").encode())
        return True


class _ParserError:
    def node(self) -> int:
        return self._index

    def desc(self) -> str:
        return self._message

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class _Logger:
    def __init__(self, min_severity: Any = None) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        pass


def _tensor(trt: Any, value: Any) -> Any:
    """An ONNX value as a network tensor."""
    return new(trt.ITensor, _name=value.name, _dtype=dtype_of(trt, value), _shape=shape_of(value))


FUNCTIONS: dict[str, Any] = {
    "init_libnvinfer_plugins": lambda trt, logger, namespace: True,
    "get_plugin_registry": lambda trt: new(trt.IPluginRegistry),
}

BUILDER: dict[str, type] = {
    "Builder": _Builder,
    "IBuilderConfig": _Config,
    "ILayer": _Layer,
    "ILogger": _Logger,
    "INetworkDefinition": _Network,
    "IOptimizationProfile": _Profile,
    "IPluginRegistry": _Registry,
    "ITimingCache": _TimingCache,
    "Logger": _Logger,
    "OnnxParser": _Parser,
    "ParserError": _ParserError,
}
