"""save and load: the same outputs in a new process; rebuilt where something does not fit, or refused with why."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from planted import Planted, optimize
from torch import nn

import accelkit
from accelkit import AccelkitWarning, ArtifactError, Dim
from accelkit.backends.eager import Eager
from accelkit.pass_api import GraphPass, PassResult

SLOWER = pytest.mark.filterwarnings("ignore:.*slower")
pytestmark = SLOWER


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
        self.register_buffer("scale", torch.rand(3), persistent=False)

    def forward(self, ids: torch.Tensor, *, factor: float = 1.0) -> dict[str, Any]:
        y = self.layers(self.embedding(ids))
        return {"y": y * self.scale * factor, "rows": ids.shape[0], "pair": (y, None)}


def example(rows: int) -> torch.Tensor:
    return torch.randint(0, 9, (rows,))


def load(path: Path) -> accelkit.CompiledModel:
    return accelkit.load(path, cache=False, progress=False)


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("buckets", [None, {"batch": (1, 4)}], ids=["range", "buckets"])
def test_the_same_in_the_same_process(target: str, buckets: Any, tmp_path: Path) -> None:
    model = Net().eval()
    dims = {"ids": {0: Dim("batch", max=8)}}
    fast = optimize(model, example(3), target=target, passes=None, dynamic_shapes=dims, buckets=buckets)
    fast.save(tmp_path / "net.accel")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(rebuilt|sample)", category=AccelkitWarning)
        again = load(tmp_path / "net.accel")
    for rows in (1, 2, 4, 8):
        ids = example(rows)
        ours, theirs = again(ids), fast(ids)
        torch.testing.assert_close(ours["y"], theirs["y"])
        assert ours["rows"] == rows
        assert ours["pair"][1] is None
        torch.testing.assert_close(ours["y"], model(ids)["y"].detach())
    assert again.stats()["variants"] == fast.stats()["variants"]
    assert [v.label for v in again.report().variants] == [v.label for v in fast.report().variants]
    if target == "onnxruntime":
        origins = {p.origin for v in again.report().variants for p in v.pieces}
        assert origins == {"artifact"}
        assert "the sample came out the same here" in again.report().variants[0].notes[-1]
    again.save(tmp_path / "again.accel")  # and once more from what was loaded
    torch.testing.assert_close(load(tmp_path / "again.accel")(ids)["y"], ours["y"])


SCRIPT = """
import sys, torch, accelkit
fast = accelkit.load(sys.argv[1], cache=False, progress=False)
inputs = torch.load(sys.argv[2], weights_only=True)
output = fast(**inputs)
kind = type(output)
torch.save({"type": kind.__module__ + "." + kind.__qualname__, "values": list(output.values())}, sys.argv[3])
assert not any(p.origin != "artifact" for v in fast.report().variants for p in v.pieces), fast.report()
"""


def test_a_new_process_and_the_models_output_type(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    inputs = {"input_ids": torch.randint(1, 50, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    fast = optimize(model, inputs, target="onnxruntime", passes=None)
    fast.save(tmp_path / "bert.accel")
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", SCRIPT, "bert.accel", "inputs.pt", "out.pt"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = model(**inputs)
    assert out["type"] == f"{type(expected).__module__}.{type(expected).__qualname__}"
    for ours, theirs in zip(out["values"], expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_bf16(tmp_path: Path) -> None:
    model = Net().eval()
    fast = optimize(model, example(4), passes=None, precision="bf16")
    fast.save(tmp_path / "m.accel")
    again = load(tmp_path / "m.accel")
    ids = example(4)
    assert torch.equal(again(ids)["y"], fast(ids)["y"])
    assert again(ids)["y"].dtype == torch.float32
    assert "bf16" in repr(again)
    assert not torch.equal(fast(ids)["y"], model(ids)["y"])  # it really is another arithmetic


def test_refitted_weights_are_what_is_saved(tmp_path: Path) -> None:
    model, other = Net().eval(), Net().eval()
    other.scale = model.scale
    fast = optimize(model, example(4), target="onnxruntime", passes=None)
    fast.refit(other.state_dict())
    fast.save(tmp_path / "m.accel")
    ids = example(4)
    torch.testing.assert_close(load(tmp_path / "m.accel")(ids)["y"], other(ids)["y"].detach(), rtol=1e-4, atol=1e-5)


def test_what_the_loaded_program_does_not_cover(tmp_path: Path) -> None:
    fast = optimize(Net().eval(), example(4))
    fast.save(tmp_path / "m.accel")
    again = load(tmp_path / "m.accel")
    with pytest.raises(accelkit.InputError, match=r"does not cover this call: ids has shape \[5\], captured as \[4\]"):
        again(example(5))


def test_another_runtime_version_rebuilds_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.backends.onnxruntime import OnnxRuntime

    model = Net().eval()
    optimize(model, example(4), target="onnxruntime").save(tmp_path / "m.accel")
    versions = OnnxRuntime.versions
    monkeypatch.setattr(OnnxRuntime, "versions", lambda self: {**versions(self), "onnxruntime": "99.0"})
    with pytest.warns(AccelkitWarning, match=r"1 engine\(s\) rebuilt: the saved ones are for other versions"):
        again = load(tmp_path / "m.accel")
    assert [p.origin for p in again.report().variants[0].pieces] == ["compiled"]
    assert "rebuilt" in "".join(again.report().variants[0].notes)
    ids = example(4)
    torch.testing.assert_close(again(ids)["y"], model(ids)["y"].detach())


def test_an_engine_that_computes_something_else_here_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelkit.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine

    model = Net().eval()
    optimize(model, example(4), target="onnxruntime").save(tmp_path / "m.accel")
    loading = OnnxRuntime.load

    class Off(OnnxRuntimeEngine):
        def __call__(self, *inputs: torch.Tensor) -> Any:
            return [r * 1.01 for r in super().__call__(*inputs)]

    def load_other(self: Any, *args: Any) -> Any:
        engine = loading(self, *args)
        engine.__class__ = Off
        return engine

    monkeypatch.setattr(OnnxRuntime, "load", load_other)
    with pytest.warns(AccelkitWarning, match=r"of the sample is off by .*its engines are rebuilt from the program"):
        again = load(tmp_path / "m.accel")
    ids = example(4)
    torch.testing.assert_close(again(ids)["y"], model(ids)["y"].detach())


@dataclass(frozen=True)
class Unregistered(Eager):
    name: ClassVar[str] = "unregistered"


@dataclass(frozen=True)
class OwnPass(GraphPass):
    def run(self, graph: Any) -> PassResult:
        return PassResult()


class InPieces(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.ReLU(),
            {"target": Unregistered()},
            r"unregistered \(.*Unregistered\) is not registered as an entry point of accelkit.backends",
        ),
        (nn.ReLU(), {"target": Planted()}, r"planted .* is not registered"),
        (nn.ReLU(), {"passes": (OwnPass(),)}, r"own_pass .* is not registered as an entry point of accelkit.passes"),
        (InPieces(), {}, r"InPieces was captured in pieces and has no program to save"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(model: Any, options: Any, message: str, tmp_path: Path) -> None:
    fast = optimize(model, torch.ones(3), **options)
    with pytest.raises(ArtifactError, match=message):
        fast.save(tmp_path / "m.accel")
    assert list(tmp_path.iterdir()) == []


def test_state_that_the_model_keeps_is_loaded_too(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += x
            return self.count * 2

    fast = optimize(Counting(), torch.ones(2), target="onnxruntime")
    fast(torch.ones(2))
    fast.save(tmp_path / "m.accel")
    again = load(tmp_path / "m.accel")
    assert torch.equal(again(torch.ones(2)), torch.full((2,), 4.0))
    assert torch.equal(again(torch.ones(2)), torch.full((2,), 6.0))


def test_the_example_comes_back_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file names the device of each memory; the example goes there like the weights, and a missing one is told."""
    from accelkit import tensors_io

    write = tensors_io.write_tensors

    def from_a_gpu(stream: Any, tensors: dict[str, torch.Tensor]) -> None:
        whole = io.BytesIO()
        write(whole, tensors)
        data = whole.getvalue()
        mark, length = tensors_io._PREFIX.unpack_from(data)
        start = tensors_io._PREFIX.size
        header = json.loads(data[start : start + length])
        for memory in header["memories"]:
            memory["device"] = "cuda:77"
        text = json.dumps(header).encode()
        text += b" " * (-(start + len(text)) % tensors_io.ALIGNMENT_BYTES)
        stream.write(tensors_io._PREFIX.pack(mark, len(text)) + text + data[start + length :])

    fast = optimize(nn.ReLU(), torch.randn(3))  # without weights: only the example can ask for the device
    monkeypatch.setattr(tensors_io, "write_tensors", from_a_gpu)
    fast.save(tmp_path / "m.accel")
    with pytest.raises(ArtifactError, match=r"saved on cuda:77, which this machine cannot use"):
        load(tmp_path / "m.accel")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("target", ["eager", "fastertransformer", "onnxruntime"])
def test_on_a_gpu(target: str, tmp_path: Path) -> None:
    from accelkit import plugins

    if (why := plugins.find(plugins.BACKENDS, target)().unavailable()) is not None:
        pytest.skip(why)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    model, x = layer.eval().cuda(), torch.randn(2, 5, 64).cuda()
    fast = optimize(model, x, target=target, passes=None)
    fast.save(tmp_path / "m.accel")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(rebuilt|sample)", category=AccelkitWarning)
        again = load(tmp_path / "m.accel")
    if target == "onnxruntime":  # the others keep no engines
        assert {p.origin for v in again.report().variants for p in v.pieces} == {"artifact"}
    for value in (x, torch.randn(2, 5, 64).cuda()):
        torch.testing.assert_close(again(value), fast(value))
        assert again(value).device == value.device
