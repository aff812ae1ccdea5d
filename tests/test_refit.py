"""refit(): new weights, the same as optimizing the new model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import optimize
from torch import nn

import accelkit
from accelkit import InputError, LoweringError
from accelkit.backends.onnxruntime import OnnxRuntime

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.rand(6), persistent=False)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(ids)) * self.scale)


def convolution() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 16, 5)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "tied": (Tied, lambda: torch.randint(0, 7, (4,))),
    "convolution": (convolution, lambda: torch.randn(2, 3, 6, 6)),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", MODELS)
def test_as_if_the_new_model_had_been_optimized(name: str, target: str, loaded: bool, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    model, other = make().eval(), make().eval()
    if name == "tied":
        other.scale = model.scale  # not in a state dict
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = optimize(model, inputs(), target=target, passes=None)
    if loaded:
        fast.save(tmp_path / "m.accel")
        fast = accelkit.load(tmp_path / "m.accel", cache=False, progress=False)
    given = {k: v.clone() for k, v in other.state_dict().items()}
    fast.refit(given)
    x = inputs()
    with torch.no_grad():
        expected = other(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        for tensor in given.values():  # the caller may go on with the state dict
            tensor.zero_()
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        if not loaded:  # the fallback has the new weights too
            wider = torch.cat([x, x])
            torch.testing.assert_close(fast(wider), other(wider), rtol=1e-4, atol=1e-5)
            assert fast.stats()["fallback"] == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("1.running_mean"), r"refit\(\).*running_mean"),
        (lambda s: s.pop("0.weight"), r"refit\(\).*0\.weight"),
        (lambda s: s.update({"nose.weight": torch.ones(1)}), r"refit\(\).*nose\.weight"),
        (lambda s: s.update({"4.bias": torch.ones(9)}), r"refit\(\).*4\.bias.*9"),
    ],
    ids=["buffer missing", "weight missing", "unknown", "shape"],
)
def test_state_dicts_that_do_not_fit(change: Any, message: str, loaded: bool, tmp_path: Path) -> None:
    model = convolution().eval()
    x = torch.randn(2, 3, 6, 6)
    fast = optimize(model, x)
    if loaded:
        fast.save(tmp_path / "m.accel")
        fast = accelkit.load(tmp_path / "m.accel", cache=False, progress=False)
    before, state = fast(x), {k: torch.randn_like(v.float()) for k, v in model.state_dict().items()}
    change(state)
    with pytest.raises(InputError, match=message):
        fast.refit(state)
    assert torch.equal(fast(x), before)


class InPieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_a_model_in_pieces_is_refused_with_what_to_do() -> None:
    fast = optimize(InPieces(), torch.ones(2, 3))
    with pytest.raises(InputError, match=r"runs in pieces: call optimize\(\) again"):
        fast.refit(InPieces().state_dict())


def test_every_bucket_gets_the_new_weights() -> None:
    dims = {"input": {0: accelkit.Dim("batch", max=8)}}
    fast = optimize(nn.Linear(3, 2), torch.randn(2, 3), dynamic_shapes=dims, buckets={"batch": (1, 4)})
    other = nn.Linear(3, 2)
    fast.refit(other.state_dict())
    for rows in (1, 4, 8):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(fast(x), other(x).detach())
    assert fast.stats()["variants"] == {"batch=1": 1, "batch=4": 1}


# --- without a compilation


class Wide(nn.Module):
    """Weights that ONNX Runtime's engines do not hold; `convolution()` has small ones, which they do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 300), nn.GELU(), nn.Linear(300, 300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def origins(fast: accelkit.CompiledModel) -> list[str]:
    return [piece.origin for variant in fast.report().variants for piece in variant.pieces]


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize("cache", [False, True])
def test_nothing_is_compiled_where_engines_hold_no_weights(
    cache: bool, loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 16)
    fast = optimize(Wide(), x, target="onnxruntime", passes=None, cache=cache)
    if loaded:
        fast.save(tmp_path / "m.accel")
        fast = accelkit.load(tmp_path / "m.accel", cache=cache, progress=False)
    passes = [record.name for record in fast.report().variants[0].ledger]
    monkeypatch.setattr(OnnxRuntime, "compile", lambda *_: pytest.fail("compiled"))
    for _ in range(2):  # a refitted model can be refitted
        other = Wide()
        fast.refit(other.state_dict())
        torch.testing.assert_close(fast(x), other(x).detach())
        assert origins(fast) == ["refitted"]
        assert [record.name for record in fast.report().variants[0].ledger] == passes  # those of the ONNX passes too
    assert fast.report().variants[0].accuracy[0].ok


def test_what_holds_weights_is_compiled_anew() -> None:
    model = convolution().eval()
    x = torch.randn(2, 3, 6, 6)
    fast = optimize(model, x, target="onnxruntime", passes=None)
    other = convolution().eval()
    fast.refit(other.state_dict())
    assert origins(fast) == ["compiled"]
    torch.testing.assert_close(fast(x), other(x).detach())


def test_an_engine_that_does_not_take_the_weights_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise LoweringError("planted")

    x = torch.randn(2, 16)
    fast = optimize(Wide(), x, target="onnxruntime")
    monkeypatch.setattr(OnnxRuntime, "load", load)
    other = Wide()
    with pytest.warns(accelkit.AccelkitWarning, match="does not take the new weights, so it is built anew: planted"):
        fast.refit(other.state_dict())
    assert origins(fast) == ["compiled"]
    torch.testing.assert_close(fast(x), other(x).detach())
