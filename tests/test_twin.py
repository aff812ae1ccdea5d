"""The twin shares tensors and nothing else; what runs inside `preserved` leaves no trace."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from accelkit import CaptureError
from accelkit.twin import eval_twin, preserved, quiet, same_buffers, version


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.linear.weight
        self.register_buffer("state", torch.zeros(3))
        self.plain = torch.ones(3)
        self.names = ["a"]


def test_tensors_are_shared_and_the_rest_is_not() -> None:
    model = Model().train()
    model.linear.register_forward_hook(lambda *args: None)
    twin = eval_twin(model)
    assert twin.linear.weight is twin.tied.weight is model.linear.weight
    assert twin.state is model.state
    assert twin.plain is model.plain
    assert len(twin.linear._forward_hooks) == 1
    twin.names.append("b")
    twin.state = torch.ones(3)
    assert model.names == ["a"]
    assert torch.equal(model.state, torch.zeros(3))
    assert model.training
    assert not twin.training
    assert not twin.linear.training


def test_what_cannot_be_copied_is_said() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(
        CaptureError, match=r"Linear cannot be copied \(TypeError: .*lock.*Give the class a __deepcopy__"
    ):
        eval_twin(model)


def test_preserved_restores_values_replaced_buffers_and_random_numbers() -> None:
    model = Model()
    own, before, state = model.state, version(model.linear.weight), torch.get_rng_state()

    def use_and_fail() -> None:
        with preserved(model):
            model.state.add_(1)
            model.state = model.state * 2
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert model.state is own
    assert torch.equal(own, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert version(model.linear.weight) == before
    written = version(own)
    with preserved(model):
        pass
    assert version(own) == written  # what was not written to is not written back


def test_running_statistics_are_written_without_being_counted() -> None:
    norm = nn.BatchNorm1d(3).train()
    with preserved(norm):
        nn.functional.batch_norm(torch.randn(5, 3), norm.running_mean, norm.running_var, training=True)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))


def test_same_buffers_writes_a_replaced_buffer_into_the_first() -> None:
    model = Model()
    own = model.state
    with same_buffers(model):
        model.state = model.state + 5
    assert model.state is own
    assert torch.equal(own, torch.full((3,), 5.0))


def test_quiet_ends() -> None:
    import logging

    logger = logging.getLogger("accelkit.test.quiet")
    logger.setLevel(logging.INFO)
    with quiet("accelkit.test.quiet"):
        assert not logger.isEnabledFor(logging.ERROR)
    assert logger.level == logging.INFO
