"""optimize(precision="int8") end to end: held to its emulation, told in the report, kept in files, refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import WIDTH, bert, vit
from planted import Planted
from torch import fx, nn

import accelkit
from accelkit import AccuracyError, InputError, Int8
from accelkit.quantization import Max
from accelkit.quantization.emulation import signal_to_noise_db
from accelkit.testing import float64_reference, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*slower than the original:accelkit.AccelkitWarning")


def int8(model: nn.Module, example, calibration, precision="int8", target="eager", **options) -> accelkit.CompiledModel:
    return accelkit.optimize(
        model, example, target=target, precision=precision, calibration=calibration, cache=False, **options
    )


class Int8Planted(Planted):
    precisions = ("fp32", "int8")


def test_report_tells_layers_emulation_and_batches() -> None:
    model, batches = vit()
    fast = int8(model, batches[0], batches, Int8("ft2", "max"))
    (variant,) = fast.report().variants
    assert [layer.layer for layer in variant.layers][:3] == [
        "layers.0.attention.qkv", "layers.0.attention", "layers.0.attention.out",
    ]  # fmt: skip
    assert all(20 < layer.snr_db < 70 for layer in variant.layers)
    (output,) = variant.accuracy
    assert output.error == output.yardstick == relative_error(fast(batches[0]), *float64_reference(model, batches[0]))
    text = str(fast.report())
    assert "int8       10 layers; the least signal-to-noise ratios, in dB: layers." in text
    assert "int8(scheme='ft2', calibrator=Max()): ranges are from 4 batches of calibration" in text
    assert "quantised in plain PyTorch, which the target is held to: error against float64 output" in text
    assert "left alone: head: ft2 leaves what is behind the last residual sum in float32" in text
    assert variant.to_json()["layers"][0]["layer"] == "layers.0.attention.qkv"


def test_an_engine_twice_as_wrong_as_the_emulation_is_refused() -> None:
    model, batches = vit(layers=1)
    exact = model(batches[0])

    def off(by: float) -> Int8Planted:
        return Int8Planted(spoil=lambda results, inputs: [exact.detach() * (1 + by)])

    assert int8(model, batches[0], batches, target=off(0.0))
    with pytest.raises(AccuracyError, match="further from float64 than allowed"):
        int8(model, batches[0], batches, target=off(0.2))
    assert int8(model, batches[0], batches, target=off(0.2), tolerance=0.3)


def test_a_mistake_of_an_earlier_pass_is_not_taken_for_rounding() -> None:
    from dataclasses import dataclass

    from accelkit.pass_api import GraphPass, PassResult
    from accelkit_passes.calibrate_int8 import CalibrateInt8

    @dataclass(frozen=True)
    class Wrong(GraphPass):
        def run(self, graph: fx.GraphModule) -> PassResult:
            result = PassResult()
            for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
                node.target = torch.ops.aten.relu.default
                result.rewrote(node)
            return result

    model, batches = vit(layers=1)
    with pytest.raises(
        AccuracyError, match=r"the passes before calibrate_int8.* compute something else than the model"
    ):
        int8(model, batches[0], batches, passes=(Wrong(), CalibrateInt8(Int8())))


def test_results_worse_than_zeros_are_an_error_and_bad_ones_a_warning() -> None:
    class Steep(nn.Module):
        def __init__(self, gain: float) -> None:
            super().__init__()
            self.first, self.gain = nn.Linear(8, 8), gain

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.first(x) * self.gain)

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    with pytest.raises(AccuracyError, match=r"worse than zeros .*give more calibration data"):
        int8(Steep(5000.0).eval(), x, [x])
    with pytest.warns(accelkit.AccelkitWarning, match="quantised, the model's results are off by output"):
        int8(Steep(30.0).eval(), x, [x])


def test_signal_to_noise_is_of_powers() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert signal_to_noise_db(exact, exact + torch.tensor([0.3, 0.4])) == pytest.approx(20.0)
    assert signal_to_noise_db(exact, exact) == float("inf")


def test_saved_and_loaded_without_the_calibration_inputs(tmp_path: Path) -> None:
    model, batches = bert(layers=1)
    fast = int8(model, batches[0], batches, Int8("ft2", Max(), keep="layers.0.up"))
    fast.save(tmp_path / "model.accel")
    again = accelkit.load(tmp_path / "model.accel", cache=False)
    for one, other in zip(again(*batches[1]), fast(*batches[1]), strict=True):
        assert torch.equal(one, other)
    assert again.calibration is not None
    assert fast.calibration is not None
    assert again.calibration.model == fast.calibration.model
    assert "a calibration of 4 batches collected before" in str(again.report())
    assert "kept in float32 by 'layers.0.up'" in str(again.report())
    with pytest.raises(InputError, match="needs calibration data"):
        again.refit(model.state_dict())


def test_refit_calibrates_anew() -> None:
    model, batches = vit()
    fast = int8(model, batches[0], batches)
    torch.manual_seed(7)
    other = type(model)().eval()
    fast.refit(other.state_dict())
    assert relative_error(fast(batches[1]), other(batches[1])) < 0.1
    assert torch.equal(fast(batches[1]), int8(other, batches[0], batches)(batches[1]))


def test_buckets_are_calibrated_each() -> None:
    model, batches = vit(layers=1)
    fast = int8(
        model, batches[0], batches, dynamic_shapes={"x": {0: accelkit.Dim("batch", max=8)}}, buckets={"batch": (1, 2)}
    )
    for rows in (1, 2):
        x = torch.randn(rows, 9, WIDTH)
        assert relative_error(fast(x), model(x)) < 0.2


def test_what_cannot_be_int8() -> None:
    model, batches = vit(layers=1)
    with pytest.raises(InputError, match=r"'planted' has no int8.*int8 is had by: .*eager"):
        int8(model, batches[0], batches, target=Planted())
    with pytest.raises(InputError, match="fp8 is had by: no installed target"):
        int8(model, batches[0], batches, "fp8")
    with pytest.raises(InputError, match="calibration is for precisions that need it"):
        int8(model, batches[0], batches, Int8("dynamic"))
    with pytest.raises(InputError, match="calibration is for precisions that need it"):
        int8(model, batches[0], batches, "bf16")

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) if float(x.sum().detach()) > 0 else self.linear(-x)

    with pytest.raises(InputError, match="can be captured in pieces at best"):
        int8(Asks().eval(), torch.ones(2, 4), [torch.ones(2, 4)])


def test_the_targets_choice_of_activations() -> None:
    class Signed(Int8Planted):
        int8_activations = "s8"

    model, batches = vit(layers=1)
    signed, unsigned = Signed(), Int8Planted()
    for backend, dtype in ((signed, torch.int8), (unsigned, torch.uint8)):
        int8(model, batches[0], batches, target=backend)
        q = [n for n in backend.compiled[-1].graph.nodes if "quantize_per_tensor" in n.name]
        assert q[0].meta["val"].dtype is dtype
    int8(model, batches[0], batches, Int8(activations="u8"), target=signed)
    q = [n for n in signed.compiled[-1].graph.nodes if "quantize_per_tensor" in n.name]
    assert q[0].meta["val"].dtype is torch.uint8


def test_the_model_stays_as_it_was() -> None:
    model, batches = vit(layers=1)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    int8(model, batches[0], batches, Int8(smooth=0.5))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
