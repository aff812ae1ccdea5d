"""optimize(): the arguments' resolution, and the whole way with the default pipeline."""

from __future__ import annotations

import inspect
import warnings
from collections import UserDict
from typing import Any

import pytest
import torch
from planted import Planted, optimize
from torch import nn

import accelkit
from accelkit import AccelkitWarning, BackendUnavailableError, plugins
from accelkit.options import canonical_example
from accelkit.pass_api import GraphPass, OnnxPass
from accelkit.pipeline import make_plan


@pytest.mark.filterwarnings("ignore:.*slower")
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_the_whole_way(target: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    model(torch.randn(16, 3, 8, 8))  # statistics other than 0 and 1
    model.eval()
    fast = accelkit.optimize(model, torch.randn(2, 3, 8, 8), target=target, cache=False, progress=False)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    names = [record.name for record in fast.report().variants[0].ledger]
    assert any(n.startswith("fuse_conv_batch_norm") for n in names)


def test_examples_in_every_form() -> None:
    x = torch.randn(2)
    assert canonical_example(x) == ((x,), {})
    assert canonical_example([x, 1]) == ((x, 1), {})
    assert canonical_example((x,)) == ((x,), {})
    assert canonical_example({"a": x}) == ((), {"a": x})
    assert canonical_example(UserDict({"a": x})) == ((), {"a": x})  # as transformers' BatchEncoding


def test_auto_takes_the_first_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_plan(nn.Linear(2, 2), cache=False).backend.name == "onnxruntime"
    find = plugins.find(plugins.BACKENDS, "onnxruntime")
    monkeypatch.setattr(find, "unavailable", lambda self: "planted absence")
    assert make_plan(nn.Linear(2, 2), cache=False).backend.name != "onnxruntime"
    monkeypatch.setattr(accelkit.options, "AUTO_ORDER", {"cpu": ("onnxruntime",)})
    with pytest.raises(BackendUnavailableError, match=r"no target has fp32 on cpu here: onnxruntime: planted absence"):
        make_plan(nn.Linear(2, 2), cache=False)


def test_passes_by_name_and_value_keep_their_order() -> None:
    plan = make_plan(
        nn.Linear(2, 2),
        target="eager",
        passes=("remove_dropout", plugins.find(plugins.PASSES, "canonicalise")()),
        cache=False,
    )
    assert [p.name for p in plan.graph_passes] == ["remove_dropout", "canonicalise"]
    assert (
        make_plan(nn.Linear(2, 2), target="eager", passes="canonicalise", cache=False).graph_passes[0].name
        == "canonicalise"
    )
    default = make_plan(nn.Linear(2, 2), target="eager", cache=False)
    assert default.graph_passes
    assert all(isinstance(p, GraphPass) for p in default.graph_passes)
    assert all(isinstance(p, OnnxPass) for p in default.onnx_passes)


def test_slower_than_the_original_is_said_at_the_callers_line() -> None:
    def slowly(results: list[Any], inputs: Any) -> list[Any]:
        import time

        time.sleep(0.003)
        return results

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        fast = accelkit.optimize(
            nn.Linear(2, 2), torch.randn(1, 2), target=Planted(spoil=slowly), passes=(), cache=False
        )
    (warning,) = [w for w in told if issubclass(w.category, AccelkitWarning)]
    assert "slower than the original model here" in str(warning.message)
    assert (warning.filename, warning.lineno) == (__file__, line)
    assert any("slower than the original" in n for n in fast.report().variants[0].notes)


def test_the_signature_is_documented() -> None:
    parameters = inspect.signature(accelkit.optimize).parameters
    documented = accelkit.optimize.__doc__ or ""
    assert all(f"{name}:" in documented for name in parameters)
    assert next(n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY) == "target"


def test_a_compiled_module_is_captured_as_its_original() -> None:
    model = nn.Linear(4, 2)
    fast = optimize(torch.compile(model), torch.randn(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(fast(x), model(x))
    assert fast.report().breaks == []
