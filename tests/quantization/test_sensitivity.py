"""sensitivity(): each layer alone, as quantising it alone really does; what keep() takes out; refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from models import WIDTH, vit
from torch import nn

import accelkit
from accelkit import InputError, Int8
from accelkit.quantization import Calibration, Sensitivity, prepare_qat, sensitivity
from accelkit.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*slower than the original:accelkit.AccelkitWarning")


@pytest.fixture(scope="module")
def measured():
    """A ViT whose second layer has a weight that one scale for the tensor holds badly."""
    model, batches = vit()
    with torch.no_grad():
        model.layers[1].down.weight[0] *= 60
        model.layers[1].norm2.weight[3] *= 20
    calibration = Calibration.collect(model, batches)
    return model, batches, calibration, sensitivity(model, batches[0], Int8("ft2"), calibration=calibration)


def optimized(model, example, precision, calibration):
    return accelkit.optimize(
        model, example, target="eager", precision=precision, calibration=calibration, cache=False, tolerance=9.0
    )


def test_each_error_is_that_of_the_layer_alone(measured) -> None:
    model, batches, calibration, found = measured
    exact = model(batches[0]).detach()
    rows = {row.name: row for row in found.layers}
    assert len(rows) == 10
    assert [row.error for row in found.layers] == sorted((row.error for row in found.layers), reverse=True)
    assert found.evaluations == 11
    every = [row.patterns[0] for row in found.layers]
    for name in ("layers.0.attention", "layers.1.up"):
        others = tuple(p for p in every if p != rows[name].patterns[0])
        alone = optimized(model, batches[0], Int8("ft2", keep=others), calibration)
        assert [layer.layer for layer in alone.report().variants[0].layers] == [name]
        assert rows[name].error == pytest.approx(relative_error(alone(batches[0]), exact), rel=1e-5)
    whole = optimized(model, batches[0], Int8("ft2"), calibration)
    assert found.together == pytest.approx(relative_error(whole(batches[0]), exact), rel=1e-5)


def test_what_keep_takes_out(measured) -> None:
    model, batches, calibration, found = measured
    assert {row.name for row in found.layers[:2]} == {"layers.1.down", "layers.1.up"}
    worst = found.keep(2)
    assert sorted(worst) == ["layers.1.down", "layers.1.up"]
    better = optimized(model, batches[0], Int8("ft2", keep=worst), calibration)
    assert relative_error(better(batches[0]), model(batches[0]).detach()) < 0.5 * found.together
    rest = math.hypot(*(row.error for row in found.layers[2:]))
    assert found.keep(error=rest * 1.001) == worst
    assert found.keep(error=1e9) == found.keep(0) == ()
    assert len(found.keep(error=0.0)) == 10


def test_products_alone_have_a_pattern_of_their_own(measured) -> None:
    rows = {row.name: row for row in measured[3].layers}
    assert rows["layers.0.attention"].patterns == ("layers.0.attention:attention",)
    assert rows["layers.0.attention.out"].patterns == ("layers.0.attention.out",)


def test_table_json_and_plot(measured, tmp_path: Path) -> None:
    found = measured[3]
    lines = str(found).splitlines()
    assert lines[0].endswith("error alone (relative error of the outputs)")
    assert lines[1].startswith(("layers.1.down", "layers.1.up"))
    assert lines[1].endswith("#" * 24)
    assert lines[-1].startswith("all together")
    assert json.loads(json.dumps(found.to_json()))["layers"][0]["error"] == found.layers[0].error
    rich = pytest.importorskip("rich.console").Console(width=100)
    with rich.capture() as shown:
        rich.print(found)
    assert "layers.0.attention.qkv" in shown.get()
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "layers.png", number=3)
    assert len(figure.axes[0].patches) == 3
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_metric_batches_and_grouping() -> None:
    model, batches = vit()

    def moved(quantised: torch.Tensor, exact: torch.Tensor) -> float:
        return float((quantised - exact).abs().max())

    found = sensitivity(
        model, batches[0], Int8("qdq"), calibration=batches, batches=batches[1:3], metric=moved, limit=3
    )
    assert [set(row.kinds) for row in found.layers] == [{"linear"}] * len(found.layers)
    assert {row.name for row in found.layers} == {"layers.0 (4 layers)", "layers.1 (4 layers)", "head"}
    assert found.measure == "moved"
    assert (found.batches, found.evaluations) == (2, 8)
    one = sensitivity(model, batches[1], Int8("qdq"), calibration=batches, metric=moved, limit=3)
    other = sensitivity(model, batches[2], Int8("qdq"), calibration=batches, metric=moved, limit=3)
    assert found.together == pytest.approx((one.together + other.together) / 2)


def test_a_model_that_writes_to_a_buffer_is_run_whole_each_time() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.register_buffer("last", torch.zeros(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x) + self.last
            self.last.copy_(y)
            return self.second(y)

    torch.manual_seed(0)
    model, x = Remembers().eval(), torch.randn(4, 8)
    found = sensitivity(model, x, Int8("dynamic"), batches=[x, x])
    assert {row.name for row in found.layers} == {"first", "second"}
    assert 0 < found.together < 0.05
    assert not model.last.any()


def test_of_a_trained_model() -> None:
    model, batches = vit()
    model.layers = model.layers[:1]
    qat = prepare_qat(model, batches[0], Int8("ft1"), calibration=batches)
    found = sensitivity(qat, batches[0])
    assert found.precision.startswith("int8(scheme='ft1'")
    assert found == sensitivity(model, batches[0], Int8("ft1"), calibration=batches)


def test_what_cannot_be_measured() -> None:
    model, batches = vit()
    with pytest.raises(InputError, match="sensitivity is of int8, not fp16"):
        sensitivity(model, batches[0], "fp16")
    with pytest.raises(InputError, match="int8 needs calibration data"):
        sensitivity(model, batches[0])
    with pytest.raises(InputError, match="limit=0"):
        sensitivity(model, batches[0], Int8("dynamic"), limit=0)
    with pytest.raises(InputError, match="calibration is empty"):
        sensitivity(model, batches[0], Int8("dynamic"), batches=[])
    with pytest.raises(InputError, match="quantises nothing of ReLU: it has no layers"):
        sensitivity(nn.ReLU(), torch.randn(3), Int8("dynamic"))
    with pytest.raises(InputError, match=r"quantises nothing of .*kept in float32 by '\*'"):
        sensitivity(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4), Int8("dynamic", keep="*"))

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(InputError, match=r"random by itself \(randn_like"):
        sensitivity(nn.Sequential(nn.Linear(WIDTH, 4), Noisy()), torch.randn(3, WIDTH), Int8("dynamic"))
    empty = Sensitivity("int8", (), 0.0, "error", 1, 1)
    for bad in ({}, {"number": 1, "error": 0.1}, {"number": 1}, {"error": -1.0}):
        with pytest.raises(InputError):
            empty.keep(**bad)
