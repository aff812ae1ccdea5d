"""calibrate_int8: what it rounds in each scheme, what it leaves alone and why, and that the emulation is integer arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from pass_checks import guards, quick
from torch import fx, nn

from accelkit import Dim, InputError, Int8
from accelkit.accuracy import reference_outputs
from accelkit.graph import graph_text
from accelkit.pass_runner import PassRecord
from accelkit.quantization.collect import Source
from accelkit.testing import apply, relative_error, run, trace
from accelkit_passes import default_passes
from accelkit_passes._quantise import quantised_weight
from accelkit_passes.calibrate_int8 import CalibrateInt8

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quantization"))
from models import bert, vit


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def fused(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> fx.GraphModule:
    """The graph as the pass gets it."""
    graph = trace(model.eval(), *inputs, **options)
    for one in default_passes(Int8()):
        if getattr(one, "calibrates", False):
            return graph
        apply(one, graph)
    raise AssertionError("no pass calibrates")


def quantise(graph: fx.GraphModule, precision: Int8, *batches: tuple[torch.Tensor, ...]) -> PassRecord:
    Source(graph, lambda: batches).leave()
    return apply(CalibrateInt8(precision), graph)


def two() -> tuple[Two, torch.Tensor]:
    model = Two()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
    return model, torch.linspace(-1, 1, 8).reshape(2, 4)


def lines(graph: fx.GraphModule) -> str:
    return "\n".join(line for line in graph_text(graph).splitlines() if " = attribute" not in line)


def test_golden() -> None:
    model, x = two()
    graph = fused(model, x)
    record = quantise(graph, Int8(calibrator="max"), (x,))
    assert record.rewrites == ("first", "second")
    u8, i8 = "torch.uint8", "torch.int8"
    assert lines(graph) == "\n".join(
        (
            "%x: f32[2, 4] = input",
            f"%0: u8[2, 4] = quantized_decomposed.quantize_per_tensor(%x, 0.007843137718737125, 127, 0, 255, {u8})",
            f"%1: f32[2, 4] = quantized_decomposed.dequantize_per_tensor(%0, 0.007843137718737125, 127, 0, 255, {u8})",
            "%2: f32[8, 4] = quantized_decomposed.dequantize_per_channel("
            f"%first_weight_int8, %first_weight_scale, None, 0, -128, 127, {i8})",
            "%3: f32[2, 8] = accelkit.linear_activation(%1, %2, %first.bias, relu)",
            f"%4: u8[2, 8] = quantized_decomposed.quantize_per_tensor(%3, 0.012379145249724388, 0, 0, 255, {u8})",
            f"%5: f32[2, 8] = quantized_decomposed.dequantize_per_tensor(%4, 0.012379145249724388, 0, 0, 255, {u8})",
            "%6: f32[2, 8] = quantized_decomposed.dequantize_per_channel("
            f"%second_weight_int8, %second_weight_scale, None, 0, -128, 127, {i8})",
            "%7: f32[2, 2] = aten.linear(%5, %6, %second.bias)",
            "return (%7)",
        )
    )


def roles(graph: fx.GraphModule, record: PassRecord) -> dict[str, int]:
    """How many nodes of each kind a scheme put in."""
    names = [str(n.target).split(".")[1] for n in graph.graph.nodes if "quantized_decomposed" in str(n.target)]
    return {name: names.count(name) for name in sorted(set(names))} | {"layers": len(record.rewrites)}


@pytest.mark.parametrize(
    ("make", "scheme", "expected"),
    [
        # a layer has four linear layers (qkv in one) and an attention with four operands
        (vit, "qdq", {"quantize_per_tensor": 9, "dequantize_per_tensor": 9, "dequantize_per_channel": 9, "layers": 9}),
        (
            vit,
            "ft1",
            {"quantize_per_tensor": 16, "dequantize_per_tensor": 16, "dequantize_per_channel": 8, "layers": 10},
        ),
        # + aftergemm of each linear layer, + softmax's input; weights are per tensor
        (vit, "ft2", {"quantize_per_tensor": 26, "dequantize_per_tensor": 34, "layers": 10}),
        (
            bert,
            "ft1",
            {"quantize_per_tensor": 16, "dequantize_per_tensor": 16, "dequantize_per_channel": 8, "layers": 10},
        ),
        # + aftergemm; softmax's input is left, the residuals share the rounding of the next linear layer's input
        (bert, "ft2", {"quantize_per_tensor": 24, "dequantize_per_tensor": 32, "layers": 14}),
    ],
)
def test_schemes_as_in_fastertransformers_table(make: Any, scheme: str, expected: dict[str, int]) -> None:
    model, batches = make()
    batches = [b if isinstance(b, tuple) else (b,) for b in batches]
    graph = fused(model, *batches[0])
    before = reference_outputs(graph, batches[0])
    record = quantise(graph, Int8(scheme, "max"), *batches)
    assert roles(graph, record) == expected
    for exact, rounded in zip(before, run(graph, *batches[0]), strict=True):
        assert 0 < relative_error(rounded, exact) < 0.06


def test_fused_scales_are_the_largest_of_three() -> None:
    model, batches = vit()
    scales = {}
    for scheme in ("ft1", "ft2"):
        graph = fused(model, batches[0])
        quantise(graph, Int8(scheme, "max"), (batches[0],))
        q = [n for n in graph.graph.nodes if "quantize_per_tensor" in n.name and n.meta["val"].dim() == 4]
        scales[scheme] = [
            n.args[1] for n in q if n.meta["val"].dtype is torch.int8 and n.meta["val"].shape[2:] == (4, 8)
        ][:3]
    assert len(set(scales["ft1"])) == 3
    assert scales["ft2"] == [max(scales["ft1"])] * 3 or len(set(scales["ft2"])) == 1


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * x.mean()) + self.linear(x)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.double()).float()


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("model", "x", "precision", "words"),
    [
        (Odd(), torch.randn(2, 4), Int8(), "is computed at run time"),
        (Doubled(), torch.randn(2, 4), Int8(), "computes in float64; only float32 layers are quantised"),
        (Convolved(), torch.randn(2, 2, 8), Int8("ft1"), "ft1 quantises no convolutions"),
        (Two(), torch.randn(2, 4), Int8(keep=("first",)), "kept in float32 by 'first'"),
        (Two(), torch.randn(2, 4), Int8(keep=("aten.linear", "third")), "keep names no layer"),
        (vit()[0], torch.randn(2, 9, 32), Int8("ft1"), "leaves what is behind the last residual sum in float32"),
        (vit()[0], torch.randn(2, 9, 32), Int8(smooth=0.5), "not smoothed: its input is not the result of a norm"),
    ],
)
def test_left_alone_and_why(model: nn.Module, x: torch.Tensor, precision: Int8, words: str) -> None:
    graph = fused(model, x)
    record = quantise(graph, precision, (x,))
    assert any(words in refusal.reason for refusal in record.refusals), record.refusals


def test_keep_takes_names_modules_and_operators() -> None:
    model, batches = vit()
    for keep, left in (("layers.1.*", 5), ("*.qkv", 7), ("accelkit.linear_activation", 7), ("layers.0.mlp*", 9)):
        record = quantise(fused(model, batches[0]), Int8(keep=(keep,)), (batches[0],))
        assert len(record.rewrites) == left


def test_without_calibration_data() -> None:
    model, x = two()
    with pytest.raises(InputError, match=r"needs calibration data: optimize\(..., calibration=batches\)"):
        apply(CalibrateInt8(Int8()), fused(model, x))
    assert apply(CalibrateInt8(Int8("dynamic")), fused(model, x)).rewrites == ("first", "second")
    with pytest.raises(InputError, match="takes an Int8 value"):
        CalibrateInt8("fp16")  # type: ignore[arg-type]


def test_a_second_run_rewrites_nothing() -> None:
    for make, scheme in ((vit, "qdq"), (bert, "ft2")):
        model, batches = make()
        batch = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
        graph = fused(model, *batch)
        quantise(graph, Int8(scheme), batch)
        text = graph_text(graph)
        again = quantise(graph, Int8(scheme), batch)
        assert (again.rewrites, graph_text(graph)) == ((), text)
        assert again.refusals[0].reason == "it is quantised already"


@pytest.mark.parametrize(("scheme", "causal"), [("ft1", False), ("ft2", True), ("qdq", True), ("dynamic", False)])
def test_dynamic_shapes(scheme: str, causal: bool) -> None:
    model, batches = vit(causal=causal, layers=1)
    shapes = {"x": {0: Dim("batch", min=1, max=16), 1: Dim("length", min=2, max=64)}}
    graph = fused(model, batches[0], dynamic_shapes=shapes)
    before = guards(graph)
    quantise(graph, Int8(scheme), *((b,) for b in batches))
    assert guards(graph) == before
    for rows, length in ((2, 9), (5, 13)):
        x = torch.randn(rows, length, 32)
        assert relative_error(run(graph, x)[0], model(x)) < 0.1


def test_masked_rows_are_zeros_as_before() -> None:
    model, batches = bert()
    ids, mask = batches[0]
    mask = torch.cat([mask[:1], torch.zeros_like(mask[:1])])
    graph = fused(model, ids, mask)
    exact = reference_outputs(graph, (ids, mask))
    quantise(graph, Int8("ft1"), *batches)
    rounded = run(graph, ids, mask)
    assert rounded[0].isfinite().all()
    assert relative_error(rounded[0], exact[0]) < 0.06


@quick
@hypothesis.given(
    st.integers(0, 1000), st.sampled_from(["s8", "u8"]), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9)
)
def test_the_emulation_is_integer_arithmetic(seed: int, activations: str, rows: int, width: int, outputs: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, outputs))
    x = torch.randn(rows, width) + torch.randn(())
    graph = fused(model, x)
    quantise(graph, Int8("qdq", "max", activations=activations), (x,))
    q = next(n for n in graph.graph.nodes if "quantize_per_tensor" in str(n.target))
    scale, zero, least, most, _ = q.args[1:]  # type: ignore[misc]
    qx = torch.clamp(torch.round(x.double() / scale) + zero, least, most) - zero  # type: ignore[operator, arg-type]
    qw, scales = quantised_weight(model[0].weight.detach(), True)
    product = qx.to(torch.int64) @ qw.to(torch.int64).t()
    expected = product.double() * scale * scales.double() + model[0].bias.detach().double()  # type: ignore[operator]
    # a value in the middle of two steps may go either way: x * (1 / scale) and x / scale round differently
    step = float(scale * scales.max() * 127)  # type: ignore[operator, arg-type]
    assert float((run(graph, x)[0].double() - expected).abs().max()) <= step * 1.01 + 1e-5


@quick
@hypothesis.given(st.integers(0, 1000), st.booleans())
def test_weights_are_symmetric_with_their_largest_at_127(seed: int, per_channel: bool) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(5, 7)
    weight[2] = 0
    q, scales = quantised_weight(weight, per_channel)
    assert q.dtype is torch.int8
    assert int(q.abs().max()) == 127
    assert int(q[2].abs().max()) == 0
    error = (q.float() * (scales[:, None] if per_channel else scales) - weight).abs()
    assert bool((error <= 0.5001 * (scales[:, None] if per_channel else scales)).all())


class Outlier(nn.Module):
    """A channel a hundred times as large as the others, with weights a hundred times as small: as in large models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)
        with torch.no_grad():
            self.norm.weight[3] *= 100
            self.linear.weight[:, 3] /= 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


def test_smoothing_leaves_the_function_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Outlier(), torch.randn(64, 32)
    plain, smooth = fused(model, x), fused(model, x)
    (exact,) = reference_outputs(plain, (x,))
    quantise(plain, Int8(calibrator="max"), (x,))
    record = quantise(smooth, Int8(calibrator="max", smooth=0.5), (x,))
    assert record.rewrites == ("layer_norm (smoothed)", "linear")
    errors = [relative_error(run(g, x)[0], exact) for g in (plain, smooth)]
    assert errors[1] < errors[0] / 3
    assert float(model.norm.weight.detach()[3]) == 100.0
