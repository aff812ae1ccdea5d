"""Floors: operations and bytes by hand, rates that are measured once and kept, what the report says."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import optimize
from torch import nn
from torch.nn import functional as F

from accelkit import Dim, floor, rates
from accelkit.floor import Floor, Work, counted, floor_of, work_of
from accelkit.rates import Rates, rates_of
from accelkit.testing import trace

CPU = torch.device("cpu")


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight, self.table = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(50, 4))

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def work(function: Any, *inputs: torch.Tensor, precision: str = "fp32", **options: Any) -> Work:
    model = function if isinstance(function, nn.Module) else Function(function)
    return work_of(trace(model.eval(), *inputs, **options), precision)


# --- counting


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda self, x: F.linear(x, self.weight), {"aten::linear": 2 * 3 * 5 * 4 * 6}),
        (lambda self, x: F.gelu(F.layer_norm(x, (4,))).sum(), {}),
        (lambda self, x: x @ x.transpose(1, 2), {"aten::matmul": 2 * 3 * 5 * 5 * 4}),
        (lambda self, x: torch.einsum("bij,bkj->bik", x, x), {"aten::einsum": 2 * 3 * 5 * 5 * 4}),
        (lambda self, x: F.conv1d(x, self.weight[:, :, None].expand(6, 4, 3)[:, :1].expand(6, 5, 3)),
            {"aten::conv1d": 2 * 3 * 6 * 2 * 5 * 3}),
        (lambda self, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
            {"aten::scaled_dot_product_attention": 2 * 3 * 5 * 5 * (4 + 4)}),
        (lambda self, x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            {"aten::scaled_dot_product_attention": 2 * 3 * 15 * (4 + 4)}),
        (lambda self, x: torch.ops.accelkit.attention(x[:, :, None], x[:, :, None], x[:, :, None]),
            {"accelkit::attention": 2 * 3 * 5 * 5 * (4 + 4)}),
        (lambda self, x: torch.ops.accelkit.linear_activation(x, self.weight, None, "gelu"),
            {"accelkit::linear_activation": 2 * 3 * 5 * 4 * 6}),
        (lambda self, x: F.linear(x, self.weight) + F.linear(x * 2, self.weight), {"aten::linear": 2 * 2 * 3 * 5 * 4 * 6}),
        (lambda self, x: x + (self.weight.T @ self.weight)[:1], {}),  # computed once, from weights alone
    ],
)  # fmt: skip
def test_operations_by_operator(function: Any, operations: dict[str, float]) -> None:
    found = work(function, torch.randn(3, 5, 4))
    assert found.by_operator == operations
    assert found.operations == sum(operations.values())
    assert found.uncounted == ()


def test_a_layer_counts_as_much_as_when_it_is_run() -> None:
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(3, 7, 16)
    assert work(layer, x).operations == counted(lambda: layer(x))
    lstm = nn.LSTM(4, 8, batch_first=True)  # opaque on a processor, where oneDNN computes it
    assert work(lstm, torch.randn(2, 3, 4)).operations == 2 * 2 * 3 * (4 * 8 * 4 + 4 * 8 * 8)


def test_dynamic_sizes_are_the_examples() -> None:
    model, x = nn.Linear(4, 6), torch.randn(3, 5, 4)
    shapes = {"input": {0: Dim("batch", max=8), 1: Dim("length", max=8)}}
    assert dataclasses.asdict(work(model, x, dynamic_shapes=shapes)) == dataclasses.asdict(work(model, x))


@torch.library.custom_op("accelkit_tests::heavy", mutates_args=())
def heavy(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@heavy.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_is_not_known_is_named() -> None:
    found = work(lambda self, x: F.linear(heavy(x), self.weight), torch.randn(3, 4))
    assert found.uncounted == ("accelkit_tests::heavy",)
    assert found.operations == 2 * 3 * 4 * 6
    words = floor_of(found, Rates({"fp32": 1.0}, 1e6), "fp32").reached(1.0)
    assert "measured; not counted: accelkit_tests::heavy)" in words


@pytest.mark.parametrize(
    ("function", "inputs", "numbers", "others"),
    [
        (lambda self, x: F.linear(x, self.weight), (torch.randn(3, 4),), 12 + 24, 0),
        (lambda self, x: F.linear(x, self.weight) @ self.weight, (torch.randn(3, 4),), 12 + 24, 0),
        (lambda self, x: x @ self.weight.T.contiguous(), (torch.randn(3, 4),), 12 + 24, 0),
        (lambda self, i: F.embedding(i, self.table), (torch.randint(0, 50, (3, 2)),), 6 * 4, 6 * 8),
        (lambda self, i: F.embedding(i, self.table), (torch.randint(0, 50, (30, 2)),), 50 * 4, 60 * 8),
        (lambda self, i: F.embedding(i, self.table) @ self.table.T, (torch.randint(0, 50, (3, 2)),), 50 * 4, 6 * 8),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bytes(function: Any, inputs: Any, numbers: int, others: int, precision: str) -> None:
    assert work(function, *inputs, precision=precision).bytes == numbers * (2 if precision == "fp16" else 4) + others


# --- floors


def test_the_larger_of_two_times() -> None:
    measured = Rates({"fp16": 736.0}, 4.25)
    compute = floor_of(Work(3.55e12, 1e9), measured, "fp16")
    assert (compute.ms, compute.bound) == (pytest.approx(4.82, rel=1e-3), "operations")
    assert compute.reached(0.9 * compute.ms).startswith(
        "not known: the model ran faster than 3.55 TFLOP at 736 TFLOP/s"
    )
    assert compute.reached(6.7) == "4.82 ms (3.55 TFLOP at 736 TFLOP/s measured), reached 72 %"
    memory = floor_of(Work(1e9, 171e6), measured, "fp16")
    assert memory.bound == "bytes"
    assert memory.reached(0.4) == "0.0402 ms (171 MB at 4.25 TB/s measured), reached 10 %"


# --- rates


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was measured; nothing is known to this process."""
    done: list[Any] = []

    def measure(device: Any, precisions: Any, size: int, copy_bytes: int, **options: Any) -> Rates:
        done.append((str(device), *precisions))
        return Rates(dict.fromkeys(precisions, 0.25), 0.05, size)

    monkeypatch.setattr(rates, "_KNOWN", {})
    monkeypatch.setattr(rates, "measure_rates", measure)
    return done


@pytest.fixture
def folder() -> Path:
    """The cache's."""
    return Path(os.environ["ACCELKIT_CACHE_DIR"])


def test_measured_once_and_kept(measurements: list[Any], folder: Path) -> None:
    for _ in range(2):
        assert rates_of(CPU, "fp32") == Rates({"fp32": 0.25}, 0.05, 1024)
    assert measurements == [("cpu", "fp32")]
    rates_of(CPU, "bf16")
    rates._KNOWN.clear()  # as another process
    assert rates_of(CPU, "fp32") == Rates({"fp32": 0.25}, 0.05, 1024)
    assert len(measurements) == 2
    (file,) = (folder / "rates").iterdir()
    content = json.loads(file.read_text())
    assert set(content["rates"]) == {"fp32", "bf16"}
    assert content["machine"]["threads"] == str(torch.get_num_threads())


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"format": 2, "rates": {"fp32": {"tflops": {"fp32": 0}}}}', '{"format": 9}']
)
def test_a_damaged_file_is_measured_anew(measurements: list[Any], folder: Path, damage: str) -> None:
    rates_of(CPU, "fp32")
    (file,) = (folder / "rates").iterdir()
    file.write_text(damage)
    rates._KNOWN.clear()
    assert rates_of(CPU, "fp32") is not None
    assert len(measurements) == 2
    rates._KNOWN.clear()
    rates_of(CPU, "fp32")
    assert len(measurements) == 2, "and kept again"


def test_no_rate_where_it_cannot_be_measured(measurements: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> Rates:
        raise torch.OutOfMemoryError("1 GiB")

    monkeypatch.setattr(rates, "measure_rates", no_memory)
    assert rates_of(CPU, "fp32") is None
    assert rates_of(CPU, "int8") is None
    assert rates_of(torch.device("meta"), "fp32") is None


def test_a_real_measurement() -> None:
    state = torch.get_rng_state()
    found = rates.measure_rates("cpu", ("fp32", "tf32", "bf16"), 64, 2**16, seconds=0.01, max_rounds=3)
    assert set(found.tflops) == {"fp32", "tf32", "bf16"}
    assert all(rate > 0 for rate in found.tflops.values())
    assert found.copy_tb_s > 0
    assert torch.equal(torch.get_rng_state(), state)


# --- the report


def test_the_report_has_the_floor_and_its_share(measurements: list[Any]) -> None:
    fast = optimize(nn.Linear(64, 64), torch.randn(8, 64))
    (variant,) = fast.report().variants
    assert isinstance(variant.floor, Floor)
    assert variant.floor.work.by_operator == {"aten::linear": 2 * 8 * 64 * 64}
    share = 100 * variant.floor.ms / variant.timings["compiled"].median_ms
    line = next(line for line in str(fast.report()).splitlines() if line.startswith("  floor"))
    assert line == f"  floor      {variant.floor.ms:.3g} ms (18.7 kB at 50 GB/s measured), reached {share:.2g} %"
    assert fast.report().to_json()["variants"][0]["floor"]["bound"] == "bytes"
    json.dumps(fast.report().to_json())


def test_no_rate_no_floor(measurements: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "rates_of", lambda device, precision: None)
    fast = optimize(nn.Linear(64, 64), torch.randn(8, 64))
    assert "floor" not in str(fast.report())
    assert fast.report().to_json()["variants"][0]["floor"] is None


def test_no_floor_where_work_depends_on_the_inputs(measurements: list[Any]) -> None:
    from accelkit_passes import default_passes

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.layers(x, src_key_padding_mask=~mask)
            return result

    mask = torch.arange(10) < torch.tensor([10, 3, 5, 1])[:, None]
    fast = optimize(
        Encoder().eval(), (torch.randn(4, 10, 16), mask), target="fastertransformer",
        passes=default_passes("fp32", remove_padding=True),
    )  # fmt: skip
    assert "no floor: tokens of padding are left out" in str(fast.report())
    assert fast.report().variants[0].floor is None


def test_a_saved_models_time_is_another_machines(measurements: list[Any], tmp_path: Path) -> None:
    import accelkit

    fast = optimize(nn.Linear(64, 64), torch.randn(8, 64), target="onnxruntime")
    fast.save(tmp_path / "linear.accel")
    again = accelkit.load(tmp_path / "linear.accel", cache=False)
    assert again.report().variants[0].pieces[0].origin == "artifact"
    assert again.report().variants[0].floor is None
