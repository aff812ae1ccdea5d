"""Whatever is wrong with what the user gives: the message says it, and nothing comes out wrong."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from planted import Planted, optimize
from torch import nn

import accelkit
from accelkit import AccelkitWarning, AccuracyError, BackendUnavailableError, InputError, plugins

X = torch.linspace(-1, 1, 8).view(2, 4)


def module(function: Any) -> nn.Module:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return function(x)

    return Model()


# --- what is no usable model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear, r"an instance, not the class"),
        (lambda x: x, r"must be a torch.nn.Module.*not function"),
        (None, r"must be a torch.nn.Module.*not NoneType"),
        (nn.Linear(2, 2, device="meta"), r"weight is on the meta device and has no data; load the weights"),
        (nn.LazyLinear(2), r"weight is not initialised yet \(a lazy module\); call the model once"),
    ],
)
def test_no_usable_model(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimize(model, X)


def test_torchscript_is_refused_with_what_to_give() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(nn.Linear(4, 2), X)
    with pytest.raises(InputError, match=r"TorchScript module, which cannot be captured; give the nn.Module"):
        optimize(scripted, X)


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onxruntime"}, r"unknown target 'onxruntime'; did you mean 'onnxruntime'\? Known targets: .*eager"),
        ({"target": 3}, r"target must be a name or a Backend value, not 3"),
        ({"target": Planted}, r"did you mean Planted\(\)\?"),
        ({"passes": ("no_such_pass",)}, r"unknown pass 'no_such_pass'.*Known passes: .*canonicalise"),
        ({"passes": (3,)}, r"passes must be names or pass values, not 3"),
        ({"precision": "fp31"}, r"unknown precision 'fp31'.*Known precisions: bf16, fp16, fp32"),
        ({"precision": 16}, r"precision must be a name or a Precision value, not int"),
        ({"target": "onnxruntime", "precision": "bf16"}, r"'onnxruntime' has no bf16; it has fp32.*is had by: .*eager"),
        ({"calibration": [X]}, r"calibration is for precisions that need it; fp32 does not"),
        ({"tolerance": -1.0}, r"tolerance is a relative error such as 1e-3, not -1.0"),
        ({"tolerance": float("nan")}, r"tolerance is a relative error"),
        ({"buckets": {"batch": (1,)}}, r"buckets needs dynamic_shapes"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimize(nn.Linear(4, 2), X, **options)


class NotInstalled(Planted):
    def unavailable(self) -> str | None:
        return "nosuchruntime is not installed; pip install nosuchruntime"


def test_a_target_whose_package_is_missing_names_the_pip_install() -> None:
    with pytest.raises(BackendUnavailableError, match=r"cannot run here.*pip install nosuchruntime"):
        optimize(nn.Linear(4, 2), X, target=NotInstalled())


def test_onnxruntime_without_its_packages_names_the_pip_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else find(name, *a))
    with pytest.raises(BackendUnavailableError, match=r"onnxruntime not installed; pip install \"accelkit\[cpu\]\""):
        optimize(nn.Linear(4, 2), X, target="onnxruntime")


def test_a_broken_plug_in_does_not_hide_another_message(monkeypatch: pytest.MonkeyPatch) -> None:
    find = plugins.find

    def broken(group: str, name: str) -> Any:
        if name == "inductor":
            raise accelkit.AccelkitError("broken plug-in")
        return find(group, name)

    monkeypatch.setattr(plugins, "find", broken)
    with pytest.raises(InputError, match="has no bf16"):
        optimize(nn.Linear(4, 2), X, target="onnxruntime", precision="bf16")


class OtherDevice(Planted):
    devices: ClassVar[tuple[str, ...]] = ("cuda",)


def test_a_target_for_another_device() -> None:
    with pytest.raises(InputError, match="runs models on cuda; this model is on cpu"):
        optimize(nn.Linear(4, 2), X, target=OtherDevice())


# --- examples


class TwoInputs(nn.Module):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return ids * mask * scale


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"ids": X}, r"TwoInputs.forward\(.*missing a required argument: 'mask'"),
        ({"ids": X, "mask": X, "masks": X}, r"unexpected keyword argument 'masks'"),
        ((X, X, 1.0, X), r"too many positional arguments"),
        ("text", r"must be a tensor, a tuple of positional arguments or a dict.*not str"),
        ((X, X.to("meta")), r"meta device; examples need real data"),
    ],
)
def test_examples(example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        optimize(TwoInputs(), example)


def raised_by(call: Any, *args: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is compared
        call(*args)
    return caught.value


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (nn.Linear(3, 2), X),
        (nn.Linear(4, 2), X.long()),
        (nn.Embedding(3, 2), torch.tensor([1, 5])),
        (nn.Linear(4, 2), X.double()),
    ],
    ids=["shape", "dtype", "index", "precision"],
)
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_an_example_that_the_model_rejects_gives_the_models_own_exception(
    model: Any, example: Any, target: str
) -> None:
    own, ours = raised_by(model, example), raised_by(lambda x: optimize(model, x, target=target), example)
    assert type(ours) is type(own)
    assert str(ours) == str(own)


class Refusing(nn.Module):
    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.late or x.sum() > 0:  # the latter is what torch.export refuses
            raise KeyError("my own message")
        return x


@pytest.mark.parametrize("late", [False, True])
def test_the_models_own_exception_comes_out_as_it_is(late: bool) -> None:
    with pytest.raises(KeyError, match="my own message"):
        optimize(Refusing(late), torch.ones(2))
    fast = optimize(Refusing(late))
    with pytest.raises(KeyError, match="my own message"):
        fast(torch.ones(2))


def test_the_models_own_exception_at_a_later_call() -> None:
    fast = optimize(Refusing(True), -torch.ones(2))
    with pytest.raises(KeyError, match="my own message"):
        fast(torch.ones(2))
    embedding = nn.Embedding(3, 2)
    fast = optimize(embedding, torch.tensor([1, 2]), target="onnxruntime")
    with pytest.warns(AccelkitWarning, match="an engine failed"), pytest.raises(IndexError, match="out of range"):
        fast(torch.tensor([1, 9]))


# --- calls that are not covered


def test_uncovered_calls_fall_back_and_are_counted() -> None:
    model = nn.Linear(4, 2)
    fast = optimize(model, X)
    for x in (torch.randn(5, 4), torch.randn(3, 1, 4)):
        assert torch.equal(fast(x), model(x))
    stats = fast.stats()
    assert (stats["calls"], stats["fallback"]) == (2, 2)
    assert "input has shape [5, 4], captured as [2, 4]" in stats["fallback_reasons"]
    with pytest.raises(RuntimeError, match=r"expected m1 and m2 to have the same dtype|must have the same dtype"):
        fast(X.double())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5, 4), r"shape \[5, 4\], captured as \[2, 4\].*fallback=False. Covered: input \[2, 4\]"),
        (X.double(), r"torch.float64, captured as torch.float32"),
        (X.to("meta"), r"on meta, captured on cpu"),
        ((X, X), r"too many positional arguments"),
        ({"inputs": X}, r"missing a required argument: 'input'"),
        ([X], r"input must be a tensor|arguments differ"),
    ],
)
def test_uncovered_calls_without_fallback(x: Any, message: str) -> None:
    fast = optimize(nn.Linear(4, 2), X, fallback=False)
    with pytest.raises(InputError, match=message):
        fast(*x) if isinstance(x, tuple) else fast(**x) if isinstance(x, dict) else fast(x)


def test_a_constant_that_changes_falls_back_or_is_refused() -> None:
    fast = optimize(TwoInputs(), (X, X, 3.0))
    assert torch.equal(fast(X, X, scale=3.0), X * X * 3)
    assert torch.equal(fast(X, X), X * X)
    assert torch.equal(fast(X, X, scale=-2.0), X * X * -2)
    assert fast.stats()["fallback"] == 2
    strict = optimize(TwoInputs(), (X, X, 3.0), fallback=False)
    with pytest.raises(
        InputError, match=r"scale was 3.0 when the model was captured and is 2.0 now.*optimize\(\) once for each"
    ):
        strict(X, X, 2.0)


# --- values


def test_nan_weights_are_told() -> None:
    model = nn.Linear(4, 2)
    model.weight.data[0, 0] = float("nan")
    with pytest.warns(AccelkitWarning, match=r"original model itself gives NaN.*NaN in the weights weight"):
        fast = optimize(model, X)
    assert any("NaN in the weights weight" in note for note in fast.report().variants[0].notes)
    assert torch.equal(fast(X).isnan(), model(X).isnan())


class Wrong:
    """Ways for a backend to be wrong."""

    @staticmethod
    def by_five_percent(results: list[Any], inputs: Any) -> list[Any]:
        return [results[0], results[1] * 1.05]

    @staticmethod
    def nan(results: list[Any], inputs: Any) -> list[Any]:
        results[1].view(-1)[0] = float("nan")
        return results

    @staticmethod
    def swapped(results: list[Any], inputs: Any) -> list[Any]:
        return [results[0], results[1].flip(0)]

    @staticmethod
    def shape(results: list[Any], inputs: Any) -> list[Any]:
        return [results[0], results[1][:1]]


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"first": self.linear(x), "second": torch.tanh(self.linear(x))}


@pytest.mark.parametrize("how", ["by_five_percent", "nan", "swapped", "shape"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_engine_is_caught_and_the_output_named(how: str, precision: str) -> None:
    target = Planted(spoil=getattr(Wrong, how))
    with pytest.raises(AccuracyError, match=r"output\['second'\] is off by .*allowed.*tolerance="):
        optimize(TwoOutputs(), torch.randn(8, 4), target=target, precision=precision)


def test_tolerance_overrides_in_both_directions() -> None:
    target = Planted(spoil=Wrong.by_five_percent)
    fast = optimize(TwoOutputs(), X, target=target, tolerance=0.06)
    errors = {o.name: o for o in fast.report().variants[0].accuracy}
    assert errors["output['second']"].error == pytest.approx(0.05, rel=1e-3)
    assert errors["output['second']"].allowed == 0.06
    with pytest.raises(AccuracyError, match="output"):
        optimize(TwoOutputs(), X, tolerance=0.0, target=Planted(spoil=lambda r, i: [r[0] * (1 + 1e-6), r[1]]))


def test_stale_outputs_are_caught() -> None:
    kept: list[Any] = []

    def stale(results: list[Any], inputs: Any) -> list[Any]:
        kept.append([torch.zeros_like(r) for r in results])
        return kept[0]

    with pytest.raises(AccuracyError, match="output"):
        optimize(TwoOutputs(), X, target=Planted(spoil=stale))


# --- unusual models


UNUSUAL: dict[str, tuple[Any, Any]] = {
    "complex": (lambda x: torch.fft.fft(x) * (1 + 2j), X),
    "complex input": (lambda x: (x * x.conj()).real.sum(-1), torch.randn(2, 4, dtype=torch.complex64)),
    "float64": (lambda x: torch.softmax(x @ x.t(), -1), X.double()),
    "integers": (lambda x: (x * 3 + x.cumsum(0)) % 7, torch.arange(12).view(3, 4)),
    "booleans": (lambda x: (x > 0) & (x < 0.5), X),
    "empty batch": (lambda x: torch.relu(x @ torch.ones(4, 3)), torch.randn(0, 4)),
    "scalar output": (lambda x: (x * x).sum(), X),
    "same tensor": (lambda x: x, X),
    "view of the input": (lambda x: (x.view(-1), x[0], x * 2), X),
    "same tensor twice": (lambda x: (lambda y: (y, y))(x + 1), X),
    "nothing but a constant": (lambda x: torch.ones(3), X),
    "python numbers": (lambda x: {"a": x * 2, "n": 3, "none": None, "text": "hello"}, X),
    "infinity": (lambda x: torch.where(x > 0, x, float("-inf")), X),
    "overflow in float32": (lambda x: torch.softmax(x * 0 + torch.finfo(torch.float32).min * 2 - 1e38, -1) + x, X),
    "scalar input": (lambda x: x.reshape(1) * 3, torch.tensor(2.5)),
    "not contiguous": (lambda x: (x * 2).reshape(-1), X.t()),
    "expanded": (lambda x: x + 1, torch.randn(1, 4).expand(3, 4)),
}


def leaves_equal(a: Any, b: Any) -> None:
    one, one_spec = torch.utils._pytree.tree_flatten(a)
    two, two_spec = torch.utils._pytree.tree_flatten(b)
    assert one_spec == two_spec
    for p, q in zip(one, two, strict=True):
        if not isinstance(q, torch.Tensor):
            assert p == q
            assert type(p) is type(q)
            continue
        assert (p.dtype, p.shape) == (q.dtype, q.shape)
        torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*(gives NaN|is slower|runs? in PyTorch)")
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models(name: str, target: str) -> None:
    function, example = UNUSUAL[name]
    model = module(function)
    fast = optimize(model, example, target=target)
    x = example if not example.is_floating_point() or example.dim() == 0 else torch.randn_like(example)
    before = x.clone()
    leaves_equal(fast(x), model(x))
    assert torch.equal(x, before)
    assert fast.stats()["fallback"] == 0
    if name == "same tensor twice":
        first, second = fast(x)
        assert first is second


# --- mutation, aliasing and shared weights


class Mutating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x[:, 0] = 7
        y = self.linear(x)
        self.average = 0.9 * self.average + 0.1 * y.mean(0)
        return y + self.average * self.count


@pytest.mark.parametrize("passes", [(), None], ids=["plain", "default-passes"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_model_that_writes_to_its_input_and_buffers(target: str, passes: Any) -> None:
    model = Mutating()
    own = copy.deepcopy(model)
    example = torch.randn(2, 4)
    given, state, random_state = example.clone(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fast = optimize(model, example, target=target, passes=passes)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(example, given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        for rows in (2, 2, 3, 2):  # three rows run on the fallback, which shares the state
            ours = torch.randn(rows, 4)
            theirs = ours.clone()
            torch.testing.assert_close(fast(ours), own(theirs))
            assert torch.equal(ours, theirs)
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, own.state_dict()[name], msg=f"{name} after {rows} rows")
    assert fast.stats()["fallback"] == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(self.first(self.embedding(ids)))))


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_tied_weights_and_shared_modules(target: str) -> None:
    model = Tied()
    ids = torch.randint(0, 11, (2, 5))
    fast = optimize(model, ids, target=target)
    assert model.head.weight is model.embedding.weight
    ids = torch.randint(0, 11, (2, 5))
    torch.testing.assert_close(fast(ids), model(ids))


# --- the model stays as it is


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dropout(self.linear(x)))


def test_the_model_is_not_changed() -> None:
    model = Hooked().train()
    model.norm.eval()
    model.linear.weight.requires_grad_(False)
    model.linear.register_forward_hook(lambda module, args, output: output * 2)
    parameters = {n: (p, p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    flags = {n: m.training for n, m in model.named_modules()}
    hooks = {n: dict(m._forward_hooks) for n, m in model.named_modules()}
    attributes = set(vars(model))
    x = torch.randn(3, 4, requires_grad=True)
    fast = optimize(model, x)
    y = fast(x)
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: dict(m._forward_hooks) for n, m in model.named_modules()} == hooks
    assert set(vars(model)) == attributes
    for name, parameter in model.named_parameters():
        same, value, requires_grad = parameters[name]
        assert parameter is same
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is requires_grad
        assert parameter.grad is None
    assert not y.requires_grad
    assert x.grad is None
    with torch.no_grad():
        assert torch.equal(y, copy.deepcopy(model).eval()(x))  # hook included, dropout off
    model(x).sum().backward()  # and it still trains
    assert model.linear.bias.grad is not None


def test_weights_changed_in_place_are_told_and_refit_follows() -> None:
    model = nn.Linear(4, 2)
    fast = optimize(model, X, target="onnxruntime")
    before = fast(X)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.warns(AccelkitWarning, match=r"weights were changed after optimize\(\).*refit\(model.state_dict\(\)\)"):
        fast(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X)  # told once
    fast.refit(model.state_dict())
    assert not torch.allclose(fast(X), before)
    torch.testing.assert_close(fast(X), model(X).detach())


def test_the_example_may_be_changed_afterwards(tmp_path: Any) -> None:
    x = torch.randn(2, 4)
    fast = optimize(nn.Linear(4, 2), x)
    x.zero_()
    fast.save(tmp_path / "m.accel")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(rebuilt|sample)", category=AccelkitWarning)
        accelkit.load(tmp_path / "m.accel", cache=False)


# --- structures


Pair = namedtuple("Pair", "left right")


@dataclass
class Record:
    value: torch.Tensor
    other: torch.Tensor


class Structures(nn.Module):
    def forward(self, data: dict[str, Any], pair: Pair, maybe: torch.Tensor | None = None) -> Any:
        total = data["a"] + data["b"][0] * data["b"][1]
        if maybe is not None:
            total = total + maybe
        return {"list": [total, (pair.left, None)], "pair": Pair(pair.right * 2, total)}


def test_nested_inputs_and_outputs() -> None:
    model = Structures()

    def example() -> dict[str, Any]:
        return {
            "data": {"a": torch.randn(3), "b": [torch.randn(3), torch.randn(3)]},
            "pair": Pair(torch.randn(2), torch.randn(2)),
        }

    fast = optimize(model, example())
    inputs = example()
    leaves_equal(fast(**inputs), model(**inputs))
    leaves_equal(fast(inputs["data"], inputs["pair"], None), model(**inputs))
    assert isinstance(fast(**inputs)["pair"], Pair)
    assert fast.stats()["fallback"] == 0
    leaves_equal(fast(**inputs, maybe=torch.ones(3)), model(**inputs, maybe=torch.ones(3)))
    other_order = {"b": inputs["data"]["b"], "a": inputs["data"]["a"]}
    leaves_equal(fast(other_order, inputs["pair"]), model(other_order, inputs["pair"]))
    assert fast.stats()["fallback"] == 2


class Records(nn.Module):
    def forward(self, record: Record) -> Record:
        return Record(record.value * 2, record.other + record.value)


def test_dataclasses_in_and_out() -> None:
    fast = optimize(Records(), (Record(torch.randn(3), torch.randn(3)),))
    given = Record(torch.randn(3), torch.randn(3))
    result, expected = fast(given), Records()(given)
    assert type(result) is Record
    assert torch.equal(result.value, expected.value)
    assert torch.equal(result.other, expected.other)


class Variadic(nn.Module):
    def forward(self, x: torch.Tensor, *rest: torch.Tensor, scale: float = 2.0, **named: Any) -> torch.Tensor:
        total = x + sum(rest) * scale
        return total * named["factor"] if "factor" in named else total


def test_variadic_forwards() -> None:
    model, parts = Variadic(), [torch.randn(3) for _ in range(4)]
    fast = optimize(model, (parts[0], parts[1], parts[2]))
    torch.testing.assert_close(fast(*parts[1:]), model(*parts[1:]))
    torch.testing.assert_close(fast(*parts[1:], scale=2.0), model(*parts[1:]))
    assert fast.stats()["fallback"] == 0
    torch.testing.assert_close(fast(*parts), model(*parts))  # another number of arguments
    torch.testing.assert_close(fast(*parts[1:], factor=parts[0]), model(*parts[1:], factor=parts[0]))
    assert fast.stats()["fallback"] == 2
    named = optimize(model, {"x": parts[0], "factor": parts[1], "scale": 3.0})
    torch.testing.assert_close(named(parts[2], factor=parts[3], scale=3.0), model(parts[2], factor=parts[3], scale=3.0))
    assert named.stats()["fallback"] == 0


def test_model_outputs_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    inputs = {"input_ids": torch.randint(1, 50, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    fast = optimize(model, inputs)
    result, expected = fast(**inputs), model(**inputs)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state.detach())
    torch.testing.assert_close(result["pooler_output"], expected[1].detach())
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    torch.testing.assert_close(fast(ids, mask)[0], expected[0].detach())
    torch.testing.assert_close(fast(attention_mask=mask, input_ids=ids)[0], expected[0].detach())
    assert fast.stats()["fallback"] == 0
    as_tuple = fast(**inputs, return_dict=False)  # another constant
    assert isinstance(as_tuple, tuple)


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
        fast = optimize(model, X)
        expected = model(X)
        assert torch.equal(fast(X), expected)
    assert torch.equal(fast(X), expected)
