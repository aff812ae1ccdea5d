"""Models that torch.export refuses run in pieces; torch.compile(model, backend="accelkit")."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from planted import Planted, optimize
from torch import nn

from accelkit import AccelkitWarning, CaptureError, Dim

OPTIONS = {"target": "eager", "passes": (), "cache": False}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.first(x))
        y = self.second(x) if x.sum() > 1 else self.third(x) * 2
        return {"y": y, "x": x}


@pytest.mark.filterwarnings("ignore:.*slower")
def test_pieces_with_the_reasons_in_the_report() -> None:
    model = DataDependent()
    fast = optimize(model, torch.ones(2, 4))
    for scale in (10.0, -10.0, 0.01):
        x = torch.randn(2, 4) * scale
        with torch.no_grad():
            expected = model(x)
        result = fast(x)
        assert torch.equal(result["y"], expected["y"])
        assert torch.equal(result["x"], expected["x"])
        assert not result["y"].requires_grad
    report = fast.report()
    assert len(report.variants) >= 2
    assert "torch.export cannot capture DataDependent at" in report.breaks[0]
    assert "test_dynamo.py" in report.breaks[0]
    assert any("a branch on a tensor's value at " in b and "test_dynamo.py:" in b for b in report.breaks[1:]), (
        report.breaks
    )
    assert "not captured:" in str(report)
    assert fast.stats()["variants"] == {"captured pieces": 3}


def test_dynamic_shapes_need_a_whole_capture() -> None:
    with pytest.raises(CaptureError, match=r"dynamic_shapes needs a model that torch.export captures whole"):
        optimize(DataDependent(), torch.ones(2, 4), dynamic_shapes={"x": {0: Dim("n")}})


class Untraceable(nn.Module):
    @torch._dynamo.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


def test_not_one_piece() -> None:
    with pytest.raises(CaptureError, match="captured no piece either"):
        optimize(Untraceable(), torch.ones(2))


@pytest.mark.filterwarnings("ignore:.*slower")
def test_building_in_pieces_leaves_the_model_alone() -> None:
    class Counting(DataDependent):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            self.calls += 1
            x[0] = 1
            return super().forward(x)

    model, x = Counting(), torch.ones(2, 4) * 3
    given, state = x.clone(), torch.get_rng_state()
    own = copy.deepcopy(model)
    fast = optimize(model, x)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert model.training
    ours, theirs = x.clone(), x.clone()
    with torch.no_grad():
        assert torch.equal(fast(ours)["y"], own(theirs)["y"])
    assert torch.equal(ours, theirs)
    assert model.calls == own.calls == 1


@pytest.mark.filterwarnings("ignore:.*slower")
def test_many_models_of_one_class() -> None:
    for _ in range(12):  # TorchDynamo keeps a bounded number of compilations for one forward
        model = DataDependent()
        fast, x = optimize(model, torch.ones(2, 4)), torch.randn(2, 4)
        with torch.no_grad():
            assert torch.equal(fast(x)["y"], model(x)["y"])


# --- torch.compile


@pytest.mark.filterwarnings("ignore:.*slower")
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_torch_compile_with_several_shapes(target: str, dynamic: bool | None) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6)).eval()
    fast = torch.compile(model, backend="accelkit", options={**OPTIONS, "target": target}, dynamic=dynamic)
    with torch.no_grad():
        for rows in (2, 3, 5, 2, 1):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(fast(x), model(x))


def test_torch_compile_takes_options_of_optimize_only() -> None:
    fast = torch.compile(nn.Linear(2, 2), backend="accelkit", options={"traget": "eager"})
    with pytest.raises(
        Exception, match=r"no option \['traget'\]; it has cache, passes, precision, progress, target, tolerance"
    ):
        fast(torch.randn(1, 2))


def test_gradients_run_in_pytorch_with_a_warning() -> None:
    model = nn.Linear(3, 2)
    fast = torch.compile(model, backend="accelkit", options=OPTIONS)
    x = torch.randn(4, 3)
    with pytest.warns(AccelkitWarning, match="gradients are wanted here"):
        fast(x).sum().backward()
    expected = copy.deepcopy(model)
    expected.zero_grad()
    expected(x).sum().backward()
    assert torch.equal(model.weight.grad, expected.weight.grad)


@pytest.mark.filterwarnings("ignore:.*slower")
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_torch_compile_follows_weights_changed_in_place(target: str) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU()).eval()
    fast = torch.compile(
        model, backend="accelkit", options={"target": target, "cache": False}
    )  # default passes: they fold
    x = torch.randn(2, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        for _ in range(10):  # more often than MAX_SHAPES
            model[0].weight.mul_(1.1)
            model[1].running_mean.add_(0.1)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.sum(0)
        return self.linear(x) + self.total


@pytest.mark.filterwarnings("ignore:.*slower")
def test_torch_compile_of_a_model_with_state_builds_once() -> None:
    backend, model = Planted(), Stateful()
    own = copy.deepcopy(model)
    fast = torch.compile(model, backend="accelkit", options={**OPTIONS, "target": backend})
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(2, 3)
            torch.testing.assert_close(fast(x), own(x))
            torch.testing.assert_close(model.total, own.total)
    assert len(backend.compiled) == 1


@pytest.mark.filterwarnings("ignore:.*slower")
def test_torch_compile_in_training_mode_keeps_the_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    own = copy.deepcopy(model)
    fast = torch.compile(model, backend="accelkit", options=OPTIONS)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(8, 3)
            torch.testing.assert_close(fast(x), own(x))
    torch.testing.assert_close(model[1].running_mean, own[1].running_mean)
    assert model[1].num_batches_tracked == own[1].num_batches_tracked == 3


def test_too_many_shapes_run_in_pytorch_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelkit.dynamo

    monkeypatch.setattr(accelkit.dynamo, "MAX_SHAPES", 2)
    model = nn.ReLU()
    fast = torch.compile(model, backend="accelkit", options=OPTIONS, dynamic=True)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for size in (3, 4, 5, 6, 3):
            x = torch.randn(size)
            assert torch.equal(fast(x), model(x))
    assert sum("more than 2 input shapes" in str(w.message) for w in told) == 1
