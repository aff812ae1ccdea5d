"""Eager: the graph as it is, with results that are the caller's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accelkit.backend_api import CompileContext
from accelkit.backends.eager import Eager
from accelkit.testing import trace


def test_results_equal_the_graphs_and_nothing_is_stored() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU()).eval(), torch.randn(4, 8)
    engine = Eager().compile(trace(model, x), [x], CompileContext())
    other = torch.randn(8, 4).T
    with torch.no_grad():
        assert torch.equal(engine(other)[0], model(other))
    assert not engine(x.requires_grad_())[0].requires_grad
    assert engine.serialize() == {}


def test_aliases_of_inputs_and_weights_are_copied() -> None:
    class Aliases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x, x.view(-1), self.weight, x + 1

    model, x = Aliases(), torch.randn(2, 3)
    kept = x.clone(), model.weight.detach().clone()
    engine = Eager().compile(trace(model, x), [x], CompileContext())
    for result in engine(x):
        result.fill_(5.0)
    assert torch.equal(x, kept[0])
    assert torch.equal(model.weight.detach(), kept[1])


def test_weights_stay_live() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    engine = Eager().compile(trace(model, x), [x], CompileContext())
    with torch.no_grad():
        model.weight.add_(1.0)
        assert torch.equal(engine(x)[0], model(x))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")]
)
def test_facts(dtype: torch.dtype, name: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(dtype), torch.randn(2, 4, dtype=dtype)
    facts = Eager().compile(trace(model, x), [x], CompileContext()).describe()
    assert facts.precisions == {name: 2}
    assert facts.memory_bytes == 0
    assert name in Eager.precisions
