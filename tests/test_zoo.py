"""Every model of the zoo on every target: captured whole, served at three batch sizes, no further from eager than 1e-5.

Plain `torch.onnx.export` with ONNX Runtime handles all of ZOO; accelkit with its default passes on may lose none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import accelkit
from accelkit.accuracy import relative_error
from zoo import ZOO, Case

BATCHES = (1, 2, 5)
LIMIT = 1e-5

# Inductor compiles C++ for each model, twice where the batch varies: one implementation of each kind of layer runs every
# time, the rest with `pytest -m exhaustive`.
INDUCTOR = frozenset({
    "bert-sdpa", "bert-masked", "roberta-eager", "distilbert-sdpa", "albert-eager", "deberta-v2", "mpnet", "roformer",
    "ibert", "fnet", "modernbert-sdpa", "esm-sdpa", "vit-sdpa", "deit-sdpa", "beit-eager", "dinov2-sdpa", "swin",
    "convnext", "poolformer", "pvt", "resnet", "wav2vec2-sdpa", "ast-sdpa", "whisper-encoder-sdpa", "clip-eager",
    "siglip-sdpa", "blip", "gpt2-sdpa", "gpt-neox-eager", "llama-sdpa", "mistral-eager", "qwen3", "gemma-sdpa",
    "opt-eager", "bloom", "t5", "bart-sdpa", "plain-resnet", "plain-unet", "plain-temporal", "plain-encoder-mask",
})  # fmt: skip

# OpenVINO goes by way of the same ONNX as ONNX Runtime: attention, convolutions, and t5, on whose decoder its generated
# kernels fail.
OPENVINO = frozenset({"bert-sdpa", "t5", "plain-resnet"})


def _cases() -> Iterator[Any]:
    for name in ZOO:
        yield pytest.param(name, "eager")
        yield pytest.param(name, "onnxruntime")
        yield pytest.param(name, "inductor", marks=() if name in INDUCTOR else pytest.mark.exhaustive)
        yield pytest.param(name, "openvino", marks=() if name in OPENVINO else pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelkit.checks.TIMING_SECONDS", 0.0)


@pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")  # tiny models gain nothing, and accelkit says so
@pytest.mark.parametrize(("name", "target"), _cases())
def test_zoo(name: str, target: str) -> None:
    case = ZOO[name]
    model, make_inputs = case.build()
    batch = accelkit.Dim("batch", min=1, max=64)
    shapes = {key: {dimension: batch} for key, dimension in case.dynamic.items()} or None

    fast = accelkit.optimize(
        model, make_inputs(3), target=target, dynamic_shapes=shapes, tolerance=LIMIT, cache=False, progress=False
    )

    for size in _batches(case):
        inputs = make_inputs(size)
        with torch.no_grad():
            expected = model(**inputs)
        result = fast(**inputs)
        assert type(result) is type(expected)
        for got, wanted in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
            if isinstance(wanted, torch.Tensor):
                assert relative_error(got, wanted) <= LIMIT, f"batch {size}"
            else:
                assert got == wanted
    report = fast.report().to_json()
    assert fast.stats()["fallback"] == 0, fast.stats()["fallback_reasons"]
    assert not report["breaks"]
    assert sum(piece["operators"] for piece in report["variants"][0]["pieces"]) > 0


def _batches(case: Case) -> tuple[int, ...]:
    return (3,) if case.fixed_batch else BATCHES


def test_what_every_run_covers() -> None:
    assert len(ZOO) >= 40
    assert ZOO.keys() >= INDUCTOR | OPENVINO
    assert len(INDUCTOR) >= 40
