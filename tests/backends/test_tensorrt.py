"""The target tensorrt without a GPU: options, what is missing here, what it refuses, the ONNX that it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import accelkit
from accelkit import plugins
from accelkit.backend_api import CompileContext
from accelkit.backends.tensorrt import TensorRT, building, library, obstacles
from accelkit.backends.tensorrt.obstacles import beyond_int32, obstacle
from accelkit.errors import BackendUnavailableError, InputError
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")

SUPPORTED = json.loads((Path(__file__).resolve().parent.parent / "data" / "tensorrt_operators.json").read_text())


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


# --- options


def test_options_are_checked_and_the_known_are_listed() -> None:
    for options, message in (
        ({"workspace_gib": 0}, r"workspace_gib=0\): has to be a number of GiB above 0, or None"),
        ({"time_limit_s": float("inf")}, "a number of seconds above 0"),
        ({"optimization_level": 6}, "a whole number from 0 to 5"),
        ({"optimization_level": True}, "a whole number from 0 to 5"),
        ({"hardware_compatible": "hopper"}, "known are none, ampere_plus"),
        (
            {"tactic_sources": ("cublas", "cutlass")},
            r"tactic_sources=\['cutlass'\]\): known are cublas, cublas_lt, cudnn",
        ),
        ({"tactic_sources": "cublas"}, "has to be a tuple of names"),
        ({"plugin_libraries": "a.so"}, "has to be a tuple of names"),
        ({"max_aux_streams": -1}, "a whole number from 0"),
        ({"contexts": 0}, "at least 1"),
        ({"timing_cache": ""}, "True, False or a file's path"),
        ({"refittable": True, "sparse_weights": True}, "choose one"),
    ):
        with pytest.raises(InputError, match=message):
            TensorRT(**options)  # type: ignore[arg-type]
    assert TensorRT(tactic_sources=["cudnn"]) == TensorRT(tactic_sources=("cudnn",))  # type: ignore[arg-type]


def test_it_is_a_target_like_the_others() -> None:
    assert plugins.find(plugins.BACKENDS, "tensorrt") is TensorRT
    with pytest.raises(InputError, match="target 'tensorrt' runs models on cuda; this model is on cpu"):
        accelkit.optimize(nn.Linear(2, 2), torch.randn(1, 2), target="tensorrt")


def test_an_engine_that_can_be_refitted_serves_all_weights() -> None:
    assert TensorRT().embeds_weights
    assert not TensorRT(refittable=True).embeds_weights
    assert TensorRT(refittable=True).embeds_below_bytes == 0 < TensorRT().embeds_below_bytes


def test_bf16_needs_tensorrt_10(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, has in ((None, True), ("8.6.0", False), ("10.16.1.11", True), ("11.4", True)):
        monkeypatch.setattr(library, "installed_version", lambda found=found: found)
        assert ("bf16" in TensorRT.precisions_on("cuda")) is has


# --- what is missing


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Everything there but what the test takes away."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: find(n, *a) or importlib.util.spec_from_loader(n, None)
    )
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in("8.6.0"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "_driver_cuda", lambda: 13)
    library._load_failure_of.cache_clear()
    yield monkeypatch
    library._load_failure_of.cache_clear()


def stand_in(version: str) -> ModuleType:
    """What `library` asks of the module tensorrt."""
    module = ModuleType("tensorrt")
    module.__dict__["__version__"] = version
    return module


def test_everything_there(here: pytest.MonkeyPatch) -> None:
    assert TensorRT().unavailable() is None


def test_packages_that_are_missing(here: pytest.MonkeyPatch) -> None:
    here.delitem(sys.modules, "tensorrt")
    here.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorrt" else object())
    assert TensorRT().unavailable() == 'tensorrt not installed; pip install "accelkit[tensorrt]"'
    with pytest.raises(BackendUnavailableError, match="tensorrt not installed"):
        library.loaded()
    here.setattr(importlib.util, "find_spec", lambda name, *a: None if name.startswith("onnx") else object())
    assert TensorRT().unavailable() == 'onnx, onnxscript not installed; pip install "accelkit[tensorrt]"'


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (
            "libnvinfer.so.8: cannot open shared object file: No such file or directory",
            "put the folder of libnvinfer.so.8 on LD_LIBRARY_PATH",
        ),
        (
            "undefined symbol: createInferBuilder",
            "--force-reinstall brings the package and its libraries in one version",
        ),
    ],
)
def test_a_library_that_does_not_load_is_tried_once(
    here: pytest.MonkeyPatch, tmp_path: Path, text: str, fix: str
) -> None:
    counter = tmp_path / "tries"
    (tmp_path / "tensorrt.py").write_text(f"open({str(counter)!r}, 'a').write('x')\nraise OSError({text!r})\n")
    here.delitem(sys.modules, "tensorrt")
    here.syspath_prepend(str(tmp_path))
    for _ in range(3):
        why = TensorRT().unavailable()
        assert why is not None
        assert f"does not load: {text}" in why
        assert fix in why
    assert counter.read_text() == "x"
    with pytest.raises(BackendUnavailableError, match="does not load"):
        library.loaded()


def test_a_version_that_is_too_old(here: pytest.MonkeyPatch) -> None:
    here.setitem(sys.modules, "tensorrt", stand_in("8.5.3.1"))
    assert TensorRT().unavailable() == (
        'TensorRT 8.5.3.1 is too old: 8.6 is the oldest that accelkit builds for; pip install "accelkit[tensorrt]" --upgrade'
    )


def test_no_gpu(here: pytest.MonkeyPatch) -> None:
    here.setattr(torch.version, "cuda", None)
    assert "this PyTorch is a CPU build" in str(TensorRT().unavailable())
    here.setattr(torch.version, "cuda", "13.0")
    here.setattr(torch.cuda, "is_available", lambda: False)

    def refuse(text: str) -> Any:
        def init() -> None:
            raise RuntimeError(text)

        return init

    here.setattr(
        torch.cuda, "init", refuse("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")
    )
    assert str(TensorRT().unavailable()).startswith("no usable GPU: Found no NVIDIA driver")
    here.setattr(torch.cuda, "init", refuse("The NVIDIA driver on your system is too old (found version 11040)."))
    assert str(TensorRT().unavailable()).endswith("too old (found version 11040).; update the NVIDIA driver")


def test_a_driver_older_than_tensorrt_is_tried_once_in_another_process(here: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    here.setattr(building, "start_failure", lambda device: tried.append(device) or "CUDA initialization failure")
    here.setattr(torch.cuda, "current_device", lambda: 0)
    for version, cuda, starts in (
        ("8.6.0", 12, True),
        ("10.16", 13, True),
        ("10.16.2", 12, False),
        ("12.0", 13, False),
    ):
        tried.clear()
        here.setitem(sys.modules, "tensorrt", stand_in(version))
        here.setattr(library, "_driver_cuda", lambda cuda=cuda: cuda)
        for _ in range(2):
            assert (TensorRT().unavailable() is None) is starts
        assert tried == ([] if starts else [0])
    library._start_failure.cache_clear()


def test_compiling_without_it_says_the_same() -> None:
    if TensorRT().unavailable() is None:
        pytest.skip("TensorRT is here")
    with pytest.raises(BackendUnavailableError, match=r"target tensorrt: .*accelkit\[tensorrt\]"):
        TensorRT().compile(trace(nn.ReLU(), torch.randn(2)), [torch.randn(2)], CompileContext())


# --- what stays in PyTorch


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs traced on a CPU stand for those of a GPU."""
    monkeypatch.setattr(obstacles, "DEVICE", "cpu")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


@torch.library.custom_op("accelkit_test::unknown", mutates_args=())
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@unknown.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (Of(lambda x: unknown(x)), (torch.randn(3),), "no ONNX form is known"),
        (Of(lambda x: F.dropout(x, training=True)), (torch.randn(3),), "random: TensorRT would draw other numbers"),
        (Of(lambda x: torch.rand_like(x)), (torch.randn(3),), "random"),
        (Counting(), (torch.randn(3),), "writes into its argument"),
        (Of(lambda x: x.double() + 1), (torch.randn(3),), "computes nothing in float64"),
        (Of(lambda x: torch.fft.fft(x).abs()), (torch.randn(8),), "no complex numbers"),
        (Of(lambda x: x.to(torch.float8_e4m3fn)), (torch.randn(8),), "computes nothing in float8_e4m3fn"),
        (Of(lambda x: x * 2), (torch.ones(3, dtype=torch.int16),), "computes nothing in int16"),
        (Of(lambda x: x * 2), (torch.ones(3, dtype=torch.uint8),), "computes nothing in uint8"),
        (Of(lambda x: x @ x), (torch.ones(3, 3, dtype=torch.int64),), "a matrix product of integers"),
        (Of(lambda x: F.conv1d(x, x)), (torch.ones(3, 3, 3, dtype=torch.int32),), "a matrix product of integers"),
        (Of(lambda x: x.to_sparse().to_dense()), (torch.eye(3),), "tensors are not supported"),
        (Of(lambda x: x.view([1] * 9) * 2), (torch.randn(1),), "9 dimensions; TensorRT has 8 at most"),
        (Of(lambda x: x[:0] * 2), (torch.randn(2),), "a tensor without elements"),
        (Of(lambda x: x.nonzero() + 1), (torch.randn(4),), "its size depends on the data"),
        (Of(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))), (torch.randn(4),), "control flow"),
        (Of(lambda x: x.bfloat16() + 1), (torch.randn(4),), "TensorRT 8.6 has no bfloat16; 10 and later have"),
    ],
    ids=[
        "unknown", "dropout", "rand", "write", "float64", "complex", "float8", "int16", "uint8", "int matmul", "int conv", "sparse",
        "9 dimensions", "empty", "data-dependent", "control flow", "bfloat16",
    ],
)  # fmt: skip
def test_refusals(model: nn.Module, inputs: tuple[torch.Tensor, ...], reason: str) -> None:
    graph = trace(model, *inputs)
    reasons = [obstacle(n, (8, 6)) for n in graph.graph.nodes if n.op == "call_function"]
    assert any(r is not None and reason in r for r in reasons), reasons


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Of(lambda x: x.half() + 1), (torch.randn(3),)),
        (Of(lambda i: (i * 2 + 1, i > 3)), (torch.arange(4),)),
        (Of(lambda m: ~m & m), (torch.ones(3, dtype=torch.bool),)),
        (Of(lambda x: x * 2), (torch.randn(()),)),
        (Of(lambda x: x.split(2)), (torch.randn(4),)),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()), (torch.arange(4),)),
    ],
    ids=["half", "int64", "bool", "scalar", "several results", "layers"],
)
def test_nothing_to_refuse(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    graph = trace(model, *inputs)
    assert [obstacle(n, (8, 6)) for n in graph.graph.nodes if n.op == "call_function"].count(None) > 0
    assert not [why for n in graph.graph.nodes if n.op == "call_function" and (why := obstacle(n, (8, 6)))]


def test_bfloat16_where_the_version_is_not_known(on_cpu: None) -> None:
    graph = trace(Of(lambda x: x.bfloat16() + 1), torch.randn(4))
    assert all(obstacle(n, v) is None for v in (None, (10, 0)) for n in graph.graph.nodes if n.op == "call_function")


def test_what_is_on_the_processor_stays_there() -> None:
    graph = trace(Of(lambda x: x + 1), torch.randn(4))
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert obstacle(node, None) == "computes on cpu; TensorRT works in a GPU's memory"


def test_integers_beyond_int32() -> None:
    table = torch.tensor([1, 2**40])
    graph = trace(Of(lambda i, j: (i + 1, j * 2, i * table)), torch.arange(2), torch.arange(2))
    found = beyond_int32(graph, [torch.tensor([0, -(2**31) - 1]), torch.tensor([2**31 - 1, -(2**31)])])
    assert set(found) == {"add", "mul_1"}
    assert "holds integers beyond int32, from -2147483649 to 0" in found["add"]
    assert "to 1099511627776" in beyond_int32(graph, [torch.arange(2), torch.arange(2)])["mul_1"]
