"""Calibrations: collected from batches of any number, saved, drawn, reused, and refused where they do not fit."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from models import WIDTH, bert, vit
from torch import nn
from torch.utils.data import DataLoader

import accelkit
from accelkit import Dim, InputError, Int8
from accelkit.quantization import MSE, Calibration, Histogram, Max
from accelkit.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")  # tiny models gain nothing


def int8(model: nn.Module, example, calibration, precision: Int8 | str = "int8", **options) -> accelkit.CompiledModel:
    return accelkit.optimize(
        model, example, target="eager", precision=precision, calibration=calibration, cache=False, **options
    )


def test_one_calibration_serves_every_scheme_and_calibrator(tmp_path: Path) -> None:
    model, batches = vit(layers=1)
    seen = Calibration.collect(model, batches, progress=False)
    assert seen.batches == 4
    assert seen.histogram("layers.0.down.input").total == 4 * 2 * 9 * 2 * WIDTH
    assert "layers.0.attention.softmax_input" in seen.names
    seen.save(tmp_path / "seen")
    again = Calibration.load(tmp_path / "seen")
    assert (again.model, again.names, again.batches) == (seen.model, seen.names, seen.batches)
    for precision in (Int8("ft1"), Int8("ft2", MSE()), Int8("qdq", Max()), Int8(activations="s8")):
        there = int8(model, batches[0], again, precision)(batches[1])
        assert torch.equal(there, int8(model, batches[0], batches, precision)(batches[1]))
        assert 0 < relative_error(there, model(batches[1])) < 0.1


def test_the_same_batches_give_the_same_file(tmp_path: Path) -> None:
    model, batches = vit(layers=1)
    files = []
    for order in (batches, batches[::-1], DataLoader(torch.cat(batches), batch_size=2)):
        stream = io.BytesIO()
        Calibration.collect(model, order, progress=False).write(stream)
        files.append(stream.getvalue())
    assert files[0] == files[1] == files[2]


def test_other_batch_sizes_with_dynamic_shapes() -> None:
    model, batches = vit(layers=1)
    shapes = {"x": {0: Dim("batch", min=1, max=16)}}
    loader = DataLoader(torch.cat(batches), batch_size=3)  # 8 rows: the last batch has 2
    seen = Calibration.collect(model, loader, dynamic_shapes=shapes, progress=False)
    assert seen.batches == 3
    assert seen.histogram("head.input").total == 8 * WIDTH
    fast = int8(model, batches[0], seen, dynamic_shapes=shapes)
    for rows in (1, 5):
        x = torch.randn(rows, 9, WIDTH)
        assert relative_error(fast(x), model(x)) < 0.1
    assert Calibration.collect(model, loader, progress=False).batches == 2


def test_of_another_model_is_refused() -> None:
    model, batches = vit(layers=1)
    seen = Calibration.collect(model, iter(batches), progress=False)
    assert seen.batches == 4
    torch.manual_seed(1)
    with pytest.raises(InputError, match="of another model, or of other weights"):
        int8(type(model)(layers=1).eval(), batches[0], seen)
    other, ids = bert(layers=1)
    with pytest.raises(InputError, match="of another model"):
        int8(other, ids[0], seen)
    with pytest.raises(InputError, match=r"collected with smooth=None, the precision has smooth=0\.5"):
        int8(model, batches[0], seen, Int8(smooth=0.5))
    with pytest.raises(InputError, match="a collected Calibration is for int8"):
        accelkit.optimize(model, batches[0], target="eager", precision="fp16", calibration=seen)


def test_of_another_scheme_says_how_to_serve_all() -> None:
    model, batches = vit(layers=1)
    built_by = int8(model, batches[0], batches).calibration
    with pytest.raises(InputError, match=r"collected for another scheme; collect it with Calibration\.collect"):
        int8(model, batches[0], built_by, Int8("ft1"))


class Peaked(nn.Module):
    """`first` sees what the test wants; `second` is an ordinary layer."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(8, 8), nn.Linear(8, 4), gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x * self.gain).sigmoid())


X = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (None, "needs calibration data: calibration=batches"),
        ([], "calibration is empty: it gave no batch"),
        (iter(()), "An iterator can be gone through only once"),
        (X, "an iterable of inputs, not one tensor"),
        ([X.long()], "x is torch.int64, captured as torch.float32"),
        ([torch.randn(3, 8)], "none of the 1 batches has shapes that were captured"),
        ([(X, torch.zeros(2))], r"calibration=\[x for x, _ in loader\]"),
        ([X, torch.full((2, 8), math.nan)], r"batch 1 gives NaN or infinity in first.input \(16 values\)"),
        ([X, torch.full((2, 8), 3e38)], "batch 1 gives NaN or infinity in first.input"),
    ],
)
def test_bad_batches(batches, words) -> None:
    model = Peaked(2.0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=words):
        int8(model, X, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_a_layer_that_saw_only_zeros() -> None:
    model = Peaked(0.0).eval()
    with pytest.raises(InputError, match=r"first.input was zero in every calibration batch.*keep=\('first',\)"):
        int8(model, X, [X])
    fast = int8(model, X, [X], Int8(keep=("first",)))
    assert relative_error(fast(X), model(X)) < 0.02


def test_smoothing_goes_through_the_batches_twice() -> None:
    model, batches = vit(layers=1)
    with pytest.raises(InputError, match="goes through calibration twice"):
        int8(model, batches[0], iter(batches), Int8(smooth=0.5))
    with pytest.raises(InputError, match="goes through the batches twice"):
        Calibration.collect(model, iter(batches), smooth=0.5)
    seen = Calibration.collect(model, batches, smooth=0.5, progress=False)
    fast = int8(model, batches[0], seen, Int8(smooth=0.5))
    assert torch.equal(fast(batches[1]), int8(model, batches[0], batches, Int8(smooth=0.5))(batches[1]))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no zip")
    with pytest.raises(InputError, match="is damaged, or not a calibration"):
        Calibration.load(tmp_path / "text")
    with pytest.raises(InputError, match=r"has nothing of 'head'; it has head\.input"):
        Calibration("", {"head.input": Histogram()}, 1).histogram("head")


def test_a_layer_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, batches = vit(layers=1)
    seen = Calibration.collect(model, batches, progress=False)
    figure = seen.plot("head.input", tmp_path / "head.png", MSE())
    assert (tmp_path / "head.png").stat().st_size > 1000
    assert "head.input, 4 batches" in figure.axes[0].get_title()
    with pytest.raises(InputError, match="unknown calibrator"):
        seen.plot("head.input", calibrator="least")
