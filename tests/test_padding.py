"""A batch between two buckets: padded where rows are proved independent and it pays, else as if there were no buckets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from planted import Planted, optimize
from torch import nn

import accelkit
from accelkit import Dim, InputError
from accelkit.batch import between
from accelkit.padding import Padded, Padding
from accelkit_passes import default_passes

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")
BATCH = {"x": {0: Dim("batch", min=1, max=16)}}
BUCKETS = {"batch": (1, 4, 16)}


@dataclasses.dataclass(frozen=True)
class Pads(Planted):
    """Says that it may pad, and remembers what it was given."""

    given: list[Any] = dataclasses.field(default_factory=list, compare=False, repr=False)
    name: ClassVar[str] = "pads"

    def pads_batches(self) -> bool:
        return True

    def compile(self, *arguments: Any) -> Any:
        engine = super().compile(*arguments)

        def remembered(results: list[Any], inputs: tuple[Any, ...]) -> list[Any]:
            self.given.append(inputs)
            return results

        engine.spoil = remembered
        return engine


class Rows(nn.Module):
    """A dict of a float and a boolean tensor, each row from its own; NaN where an input row is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = nn.functional.gelu(self.linear(x / x.norm(dim=1, keepdim=True)))
        return {"y": y, "large": y > 0.1, "name": "rows"}


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def built(model: nn.Module, x: torch.Tensor, **options: Any) -> accelkit.CompiledModel:
    """Without a fallback, so that times do not matter."""
    options = {"dynamic_shapes": BATCH, "buckets": BUCKETS, "fallback": False} | options
    return optimize(model.eval(), x, **options)


def times(fast: accelkit.CompiledModel, **ms: tuple[float, float]) -> None:
    """Plant the times of buckets, (compiled, original): `b4=(1.0, 2.0)`; there is a fallback."""
    padding = fast._padding
    assert isinstance(padding, Padding)
    planted = {f"batch={label[1:]}": pair for label, pair in ms.items()}
    fast._padding = dataclasses.replace(padding, times_ms=planted, required=False)
    fast._routes.clear()


# --- what is padded


@pytest.mark.parametrize("target", ["eager", "onnxruntime", "fastertransformer"])
def test_every_batch_runs_in_a_bucket(target: str) -> None:
    model = Rows()
    fast = built(model, torch.randn(3, 6), target=target)
    for rows in range(1, 17):
        x = torch.randn(rows, 6)
        result = fast(x)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(result["y"], expected["y"])
        assert result["large"].shape == expected["large"].shape
        assert result["large"].dtype is torch.bool
        assert result["name"] == "rows"
        assert not result["y"].requires_grad
    stats = fast.stats()
    assert stats["variants"] == {"batch=1": 1, "batch=4": 3, "batch=16": 12}
    assert stats["padded"] == {"batch=4": 2, "batch=16": 11}
    assert stats["fallback"] == 0
    assert "padding: a batch between two buckets runs in the larger one: its rows are independent" in str(fast.report())


def test_rows_of_padding_repeat_the_last_one() -> None:
    backend = Pads()
    fast = built(Rows(), torch.randn(3, 6), target=backend)
    x = torch.randn(6, 2).T.repeat(1, 3)[:, :6]  # two rows, not contiguous
    backend.given.clear()
    assert fast(x)["y"].shape == (2, 8)
    ((given,),) = backend.given
    assert torch.equal(given, torch.stack([x[0], x[1], x[1], x[1]]))


def test_other_arguments_and_dimensions_stay_as_they_are() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return (x * scale).sum(1)

    shapes = {"x": {0: Dim("batch", max=16), 1: Dim("length", max=8)}, "scale": None}
    x, scale = torch.randn(3, 5, 6), torch.randn(6)
    fast = built(Scaled(), (x, scale), dynamic_shapes=shapes, buckets={"batch": (4, 16), "length": (5, 8)})
    for rows, length in ((3, 5), (5, 8), (16, 5)):
        x = torch.randn(rows, length, 6)
        torch.testing.assert_close(fast(x, scale=scale), (x * scale).sum(1))
    assert fast.stats()["padded"] == {"batch=4, length=5": 1, "batch=16, length=8": 1}
    with pytest.raises(InputError, match="no compiled variant covers this call"):
        fast(torch.randn(3, 6, 6), scale)  # no bucket has this length


def test_nested_inputs_are_padded_too() -> None:
    class Nested(nn.Module):
        def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
            return x[0] + 2 * x[1]

    shapes = {"x": [{0: (batch := Dim("batch", max=16))}, {0: batch}]}
    fast = built(Nested(), ([torch.randn(3, 6), torch.randn(3, 6)],), dynamic_shapes=shapes)
    one, other = torch.randn(5, 6), torch.randn(5, 6)
    torch.testing.assert_close(fast([one, other]), one + 2 * other)
    assert fast.stats()["padded"] == {"batch=16": 1}


def test_what_only_the_passes_prove() -> None:
    """nn.MultiheadAttention moves the batch about; the attention that the passes make of it does not."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, shapes = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), {"src": {0: Dim("batch", max=16)}}
    x = torch.randn(3, 5, 16)
    fast = built(model, x, dynamic_shapes=shapes, passes=default_passes("fp32"), buckets={"batch": (4,)})
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert fast.stats()["padded"] == {"batch=4": 1}
    alone = built(model, x, dynamic_shapes=shapes, buckets={"batch": (4,)})
    assert "works across the batch" in alone.report().padding


def test_after_a_refit_and_from_a_file(tmp_path: Path) -> None:
    model, other, x = Rows(), Rows(), torch.randn(3, 6)
    fast = built(model, x)
    fast.refit(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(x)["y"], other(x)["y"])
    fast.save(tmp_path / "rows.accel")
    again = accelkit.load(tmp_path / "rows.accel")
    torch.testing.assert_close(again(x)["y"], fast(x)["y"])
    assert fast.stats()["padded"] == {"batch=4": 2}
    assert again.stats()["padded"] == {"batch=4": 1}


# --- what is not


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Mean(), {}, r"mean \(aten.mean.dim\) works across the batch"),
        (Rows(), {"target": Planted()}, "planted does not pad"),
    ],
    ids=["rows depend on each other", "the backend does not declare it"],
)
def test_refusals_are_told(model: nn.Module, options: dict[str, Any], reason: str) -> None:
    fast = built(model, torch.randn(3, 6), **options)
    assert reason.replace("\\", "") in fast.report().padding
    assert fast.report().padding.startswith("none, a batch between two buckets is not covered: ")
    assert fast.report().to_json()["padding"] == fast.report().padding
    fast(torch.randn(4, 6))
    with pytest.raises(InputError, match="no compiled variant covers this call"):
        fast(torch.randn(3, 6))


@pytest.mark.parametrize("buckets", [None, {"batch": (4,)}], ids=["no buckets", "one bucket"])
def test_sizes_that_the_dimension_does_not_have(buckets: Any) -> None:
    fast = built(Rows(), torch.randn(3, 6), buckets=buckets)
    assert bool(fast.report().padding) is (buckets is not None)
    for rows in (0, 17):
        with pytest.raises(InputError, match="no compiled variant covers this call"):
            fast(torch.randn(rows, 6))


def test_fastertransformer_can_be_told_not_to() -> None:
    from accelkit.backends.fastertransformer import FasterTransformer

    fast = built(Rows(), torch.randn(3, 6), target=FasterTransformer(pad_batch=False))
    assert "fastertransformer does not pad" in fast.report().padding


# --- where it pays


def test_a_bucket_that_is_slower_than_the_original_is_not_taken() -> None:
    fast = built(Rows(), torch.randn(3, 6), fallback=True)
    times(fast, b1=(0.5, 1.0), b4=(1.0, 4.0), b16=(10.0, 16.0))
    assert "where that measured faster than the original model" in fast.report().padding
    for rows in (2, 3, 9, 10, 12):  # the original takes as many milliseconds as there are rows
        fast(torch.randn(rows, 6))
    assert fast.stats()["padded"] == {"batch=4": 2, "batch=16": 2}
    (reason,) = fast.stats()["fallback_reasons"]
    assert reason == (
        "x has shape [9, 6], captured as [16, 6]; not padded to batch=16, which takes 10 ms where the original model takes "
        "about 9 ms"
    )


def test_without_times_it_is_padded() -> None:
    fast = built(Rows(), torch.randn(3, 6), fallback=True)
    times(fast)
    route = fast._route_of(fast._built, [torch.randn(3, 6)])  # type: ignore[arg-type]
    assert isinstance(route, Padded)
    assert (route.rows, route.size) == (3, 4)


@pytest.mark.parametrize(("rows", "ms"), [(8, 6.0), (20, 10.0), (4, 3.0), (64, 28.0)])
def test_times_between_sizes(rows: int, ms: float) -> None:
    assert between({8: 6.0, 32: 14.0}, rows) == ms
