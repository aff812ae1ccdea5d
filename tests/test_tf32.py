"""tf32 is on inside the block alone, whichever of PyTorch's two names for the setting the user has used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from accelkit.backends.eager import Eager
from accelkit.fingerprint import engine_key
from accelkit.precision import FP32
from accelkit.testing import trace
from accelkit.tf32 import tensor_core_products

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    matmul.fp32_precision = "none"


def state() -> tuple[object, ...]:
    def old(owner: object) -> object:
        try:
            return owner.allow_tf32  # type: ignore[attr-defined]
        except RuntimeError:
            return "the two names disagree"

    return old(matmul), old(cudnn), matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


@pytest.mark.parametrize(
    "user",
    [
        lambda: None,
        lambda: setattr(matmul, "fp32_precision", "tf32"),
        lambda: setattr(matmul, "allow_tf32", True),
        lambda: setattr(cudnn, "allow_tf32", False),
        lambda: torch.set_float32_matmul_precision("high"),
    ],
)
def test_settings_come_back(user: Callable[[], None]) -> None:
    user()
    before = state()
    with tensor_core_products():
        with tensor_core_products():
            pass
        assert state() == (True, True, "tf32", "tf32", "tf32")
    assert state() == before
    with pytest.raises(ZeroDivisionError), tensor_core_products():
        _ = 1 / 0
    assert state() == before


def test_engines_are_kept_apart_by_the_setting_under_its_new_name() -> None:
    graph = trace(torch.nn.Linear(2, 2).eval(), torch.randn(1, 2))
    keys = [engine_key(graph, Eager(), FP32, (), [torch.randn(1, 2)])]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    keys.append(engine_key(graph, Eager(), FP32, (), [torch.randn(1, 2)]))
    assert keys[0] != keys[1]
