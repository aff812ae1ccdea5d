"""The zoo keeps its contract: every model builds, runs, varies, and is the same every time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from zoo import HARD, MORE, ZOO, Case

EVERY = {**ZOO, **MORE, **HARD}


def flat(output: Any) -> list[torch.Tensor]:
    """The tensors of any output structure, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in flat(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in flat(value)]
    assert output is None or not is_dataclass(output), f"cannot look into a {type(output).__name__}"
    return []


def run(case: Case, batch: int) -> list[torch.Tensor]:
    model, make_inputs = case.build()
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    inputs = make_inputs(batch)
    assert set(case.dynamic) == (set() if case.fixed_batch else set(inputs))
    assert all(inputs[name].shape[dim] == batch for name, dim in case.dynamic.items())
    with torch.no_grad():
        return flat(model(**inputs))


@pytest.mark.parametrize("name", EVERY)
def test_model_runs_varies_and_is_deterministic(name: str) -> None:
    if not name.startswith("plain-"):
        pytest.importorskip("transformers")
    outputs = run(EVERY[name], batch=3)
    assert outputs
    for output in outputs:
        values = output.double()
        assert torch.isfinite(values).all()
        assert 1e-2 < values.std() < 1e3
        others = values.roll(1, 0)  # a model in which the signal dies, or that ignores its input, gives equal rows
        assert (values - others).norm() > 1e-2 * values.norm()
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(outputs, run(EVERY[name], batch=3), strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_rounding_leaves_room_below_the_tolerance(name: str) -> None:
    if not name.startswith("plain-"):
        pytest.importorskip("transformers")
    model, make_inputs = ZOO[name].build()
    inputs = make_inputs(3)
    with torch.no_grad():
        outputs = flat(model(**inputs))
        exact = flat(model.double()(**{k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}))
    for a, b in zip(outputs, exact, strict=True):
        assert (a - b).double().norm() <= 3e-6 * b.double().norm()


@pytest.mark.parametrize("name", [n for n, case in EVERY.items() if "attention_mask" in case.dynamic])
def test_rows_have_padding_of_different_lengths(name: str) -> None:
    mask = EVERY[name].make_inputs(5)["attention_mask"]
    assert set(mask.unique().tolist()) == {0, 1}
    assert len(set(mask.sum(1).tolist())) >= 2


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "bart", "clip", "wav2vec2"])
def test_both_attention_implementations_compute_the_same(name: str) -> None:
    pytest.importorskip("transformers")
    eager, fused = run(EVERY[f"{name}-eager"], 3), run(EVERY[f"{name}-sdpa"], 3)
    for a, b in zip(eager, fused, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_the_zoo_is_as_wide_as_it_claims() -> None:
    kinds = Counter(case.kind for case in ZOO.values())
    assert {"text", "vision", "audio", "multimodal", "decoder", "encoder-decoder", "convolution"} == set(kinds)
    assert kinds["convolution"] >= 6
    assert sum(not name.startswith("plain-") for name in ZOO) >= 44
    stems = {name.removesuffix("-eager") for name in EVERY if name.endswith("-eager")}
    assert sum(f"{stem}-sdpa" in EVERY for stem in stems) >= 10
    assert len(EVERY) == len(ZOO) + len(MORE) + len(HARD)
    assert all(case.reason and case.fails_at in {"export", "program", "onnx", "numbers"} for case in HARD.values())


def test_looking_at_the_zoo_imports_no_transformers() -> None:
    code = "import sys, zoo; print('transformers' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], capture_output=True, text=True
    )
    assert found.stdout == "False\n", found.stderr
