"""CompiledModel: routes, binders, threads, counters, building at the first call."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from typing import Any

import pytest
import torch
from planted import GraphEngine, Planted, in_threads, optimize
from torch import fx, nn

import accelkit
from accelkit import Dim, InputError

pytestmark = pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, *, flag: bool = False
    ) -> torch.Tensor:
        result = self.linear(a - 2 * b)
        return result if c is None else result * c[:, :3]


def test_every_order_of_arguments_gives_the_same() -> None:
    model = Three()
    a, b, c = (torch.randn(2, 4) for _ in range(3))
    fast = optimize(model, (a, b, c))
    a, b, c = (torch.randn(2, 4) for _ in range(3))
    with torch.no_grad():
        expected = model(a, b, c)
    for positional in range(4):
        for names in itertools.permutations("abc"[positional:]):
            result = fast(*(a, b, c)[:positional], **{n: {"a": a, "b": b, "c": c}[n] for n in names})
            assert torch.equal(result, expected), (positional, names)
    assert torch.equal(fast(a, b, c, flag=False), expected)  # equal to its default: the same call
    assert torch.equal(fast(nn.Parameter(a), b, c), expected)
    assert fast.stats() == {
        "calls": 12, "variants": {"as captured": 12}, "padded": {}, "engines": {}, "fallback": 0, "fallback_reasons": {},
    }  # fmt: skip


def test_what_engines_count_is_told_by_variant() -> None:
    class Counting(GraphEngine):
        def __call__(self, *inputs: torch.Tensor) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().__call__(*inputs)

        def counters(self) -> dict[str, int]:
            return {f"ran {self.graph.graph.find_nodes(op='placeholder')[0].meta['val'].shape[0]} rows": self.calls}

    class Counts(Planted):
        def compile(self, graph: fx.GraphModule, inputs: Any, context: Any) -> Any:
            return Counting(graph)

    fast = optimize(nn.Linear(4, 3), torch.randn(3, 4), target=Counts(), dynamic_shapes={"input": {0: BATCH["x"][0]}},
        buckets={"batch": (2, 5)})  # fmt: skip
    assert fast.stats()["engines"] == {}, "the build's own calls count"
    for rows in (2, 5, 2, 3):
        fast(torch.randn(rows, 4))
    assert fast.stats()["engines"] == {"batch=2": {"ran 2 rows": 2}, "batch=5": {"ran 5 rows": 1}}


def test_a_call_of_another_structure_falls_back() -> None:
    model = Three()
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    fast = optimize(model, (a, b))
    assert torch.equal(fast(a, b, None), fast(a, b))
    with torch.no_grad():
        assert torch.equal(fast(a, b, a), model(a, b, a))
    assert fast.stats()["fallback"] == 1
    assert "unexpected c" in next(iter(fast.stats()["fallback_reasons"]))


BATCH = {"x": {0: Dim("batch", min=1, max=16)}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": self.layers(x), "rows": x.shape[0]}


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_dynamic_sizes(target: str) -> None:
    model = Net()
    fast = optimize(model, torch.randn(3, 6), target=target, dynamic_shapes=BATCH)
    for rows in (1, 2, 3, 7, 16):
        x = torch.randn(rows, 6)
        result = fast(x)
        torch.testing.assert_close(result["y"], model(x)["y"].detach())
        assert result["rows"] == rows
    assert fast.stats()["fallback"] == 0
    fast(torch.randn(17, 6))
    assert fast.stats()["fallback_reasons"] == {"x has size 17 in dimension 0, covered: batch from 1 to 16": 1}
    assert "x ['batch', 6]; batch from 1 to 16" in str(fast.report())


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_buckets(target: str) -> None:
    model = Net()
    fast = optimize(model, torch.randn(3, 6), target=target, dynamic_shapes=BATCH, buckets={"batch": (1, 4, 16)})
    for rows, label in ((1, "batch=1"), (4, "batch=4"), (16, "batch=16"), (5, "fallback")):
        before = fast.stats()
        x = torch.randn(rows, 6)
        result = fast(x)
        torch.testing.assert_close(result["y"], model(x)["y"].detach())
        assert result["rows"] == rows
        after = fast.stats()
        assert after["calls"] == before["calls"] + 1
        if label != "fallback":
            assert after["variants"][label] == before["variants"].get(label, 0) + 1
    assert fast.stats()["fallback"] == 1
    assert [v.label for v in fast.report().variants] == ["batch=1", "batch=4", "batch=16"]
    strict = optimize(model, torch.randn(3, 6), dynamic_shapes=BATCH, buckets={"batch": (1, 4)}, fallback=False)
    with pytest.raises(InputError, match=r"Covered: x \[1, 6\] \| x \[4, 6\]"):
        strict(torch.randn(5, 6))


def test_bucket_mistakes() -> None:
    with pytest.raises(
        InputError, match=r"buckets names \['rows'\], which dynamic_shapes does not declare \(declared: \['batch'\]\)"
    ):
        optimize(Net(), torch.randn(3, 6), dynamic_shapes=BATCH, buckets={"rows": (1,)})
    with pytest.raises(InputError, match="bucket batch=99 is outside what the program covers, 1 to 16"):
        optimize(Net(), torch.randn(3, 6), dynamic_shapes=BATCH, buckets={"batch": (99,)})


class SpecialAtOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 100 if x.shape[0] == 1 else x * 2


class ShapeAtOne(nn.Module):
    def forward(self, x: torch.Tensor) -> list[int]:
        return list(x.squeeze().shape)


@pytest.mark.parametrize("model", [SpecialAtOne(), ShapeAtOne()], ids=lambda m: type(m).__name__)
def test_a_model_that_is_another_one_at_size_one(model: nn.Module) -> None:
    fast = optimize(model, torch.randn(3, 6), dynamic_shapes=BATCH)
    for rows in (1, 2, 5):
        x = torch.randn(rows, 6)
        assert str(fast(x)) == str(model(x))
    assert fast.stats()["fallback"] == 1
    assert any("at batch=1 the model computes something else" in n for n in fast.report().variants[0].notes)
    with pytest.raises(InputError, match="bucket batch=1 is outside what the program covers, 2 to 16"):
        optimize(model, torch.randn(3, 6), dynamic_shapes=BATCH, buckets={"batch": (1,)})


def test_an_example_of_one_row_with_a_dynamic_dimension() -> None:
    model = Net()
    fast = optimize(model, torch.randn(1, 6), dynamic_shapes=BATCH)
    for rows in (1, 2, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(fast(x)["y"], model(x)["y"].detach())
    assert fast.stats()["fallback"] == 0


def test_threads_with_several_shapes() -> None:
    model = Net()
    fast = optimize(model, torch.randn(4, 6), dynamic_shapes=BATCH, buckets={"batch": (1, 4)})
    inputs = [torch.randn(rows, 6) for rows in (1, 4, 5, 20)]
    with torch.no_grad():
        expected = [model(x)["y"] for x in inputs]

    def work(index: int) -> None:
        for call in range(100):
            number = (index + call) % len(inputs)
            assert torch.equal(fast(inputs[number])["y"], expected[number])

    in_threads(work, 8)
    assert fast.stats()["calls"] == 800
    assert fast.stats()["variants"] == {"batch=1": 200, "batch=4": 200}
    assert fast.stats()["fallback"] == 400
    assert sum(fast.stats()["fallback_reasons"].values()) == 400


def test_built_once_at_the_first_call_from_several_threads() -> None:
    backend, model = Planted(), Net()
    fast = optimize(model, target=backend)
    assert "not built" in repr(fast)
    assert "first call is the example" in str(fast.report())
    x = torch.randn(2, 6)
    in_threads(lambda index: torch.testing.assert_close(fast(x)["y"], model(x)["y"].detach()), 4)
    assert len(backend.compiled) == 1
    assert fast.stats()["calls"] == 4
    assert repr(fast) == f"CompiledModel(Net, {backend}, fp32, 1 variant(s))"


@pytest.mark.parametrize("ask", [lambda f: f.save("x"), lambda f: f.refit({}), lambda f: f.signature])
def test_what_needs_a_built_model_says_so(ask: Any) -> None:
    with pytest.raises(
        accelkit.AccelkitError, match=r"needs a built model: call it once, or give optimize\(\) example_inputs"
    ):
        ask(optimize(Net()))


def test_a_failed_first_call_leaves_it_unbuilt() -> None:
    fast = optimize(Net())
    with pytest.raises(RuntimeError):
        fast(torch.randn(2, 5))
    assert fast(torch.randn(2, 6))["rows"] == 2


def test_calls_go_on_during_a_refit() -> None:
    slow, model = threading.Event(), Net()
    calls = []

    def wait(graph: fx.GraphModule) -> None:
        if slow.is_set():
            calls.append(fast(x)["y"])  # a deadlock, were a refit to lock calls out
            other = threading.Thread(target=lambda: calls.append(fast(x)["y"]))
            other.start()
            other.join(20)
            assert not other.is_alive()

    fast, x = optimize(model, torch.randn(2, 6), target=Planted(fail=wait)), torch.randn(2, 6)
    before = fast(x)["y"]
    slow.set()
    fast.refit(Net().state_dict())
    assert len(calls) == 2
    assert all(torch.equal(y, before) for y in calls)
    assert not torch.equal(fast(x)["y"], before)


def test_reasons_stay_bounded() -> None:
    fast = optimize(nn.ReLU(), torch.randn(1))
    for size in range(2, 152):
        fast(torch.randn(size))
    stats = fast.stats()
    assert stats["fallback"] == sum(stats["fallback_reasons"].values()) == 150
    assert len(stats["fallback_reasons"]) == 101
    assert stats["fallback_reasons"]["other reasons"] == 50


def test_results_carry_no_gradients_and_are_the_callers_own() -> None:
    fast = optimize(Net(), torch.randn(2, 6))
    x = torch.randn(2, 6, requires_grad=True)
    first = fast(x)["y"]
    kept = first.clone()
    fast(torch.randn(2, 6))
    assert torch.equal(first, kept)
    assert not first.requires_grad


def test_the_fallback_is_in_eval_mode_with_the_models_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train()
    fast = optimize(model, torch.randn(2, 4))
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(fast(x), copy.deepcopy(model).eval()(x))
    assert model.training


def test_two_calls_overlap_in_time() -> None:
    def slowly(results: list[Any], inputs: Any) -> list[Any]:
        time.sleep(0.05)
        return results

    fast = optimize(nn.Linear(2, 2), torch.randn(1, 2), target=Planted(spoil=slowly))
    started = time.perf_counter()
    in_threads(lambda index: fast(torch.randn(1, 2)), 8)
    assert time.perf_counter() - started < 8 * 0.05  # no lock is held while an engine runs
