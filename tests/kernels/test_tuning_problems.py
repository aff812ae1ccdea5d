"""Every kind of problem: the operator's own operands give it, its candidates are right, calls look its choice up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from accelkit.kernels import attention, linear, norms, split
from accelkit.ops import OPERATORS, attention_choice
from accelkit.tuning.measuring import measure
from accelkit.tuning.problems import task_of

half = torch.float16


def calls(device: str) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Name of the problem -> operator and operands."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(half)

    x, w, b = normal(2, 8, 32), normal(64, 32), normal(64)
    q, k, v = normal(2, 8, 3, 2, 16).unbind(2)
    lengths = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    index = torch.randint(0, 64, (2, 8), device=device)
    few = torch.tensor([5], dtype=torch.int32, device=device)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool, device=device)
    long = torch.randn(8, 8, device=device).to(half)
    return {
        "linear 16 x 32 to 64 float16, gelu": ("linear_activation", (x, w, b, "gelu")),
        "linear 16 x 32 to 64 float16, residual, counted":
            ("linear_activation", (x, w, b, "none", normal(2, 8, 64), few)),
        "linear 4 x 192 to 64 float16": ("patch_embedding", (normal(1, 3, 16, 16), normal(64, 3, 8, 8), b)),
        "split linear 16 x 32 to 64 float16, residual layer norm":
            ("linear_residual_layer_norm", (x, w, b, normal(2, 8, 64), b, b)),
        "attention 2 x 2 x 8 x 16 float16, triton": ("attention", (q, k, v, None, False, None, "triton")),
        "attention 2 x 2 x 8 x 16 float16, mask boolean by key": ("attention", (q, k, v, mask)),
        "attention 2 x 2 x 8 x 16 float16, mask additive by query and key": ("attention", (q, k, v, long)),
        "variable-length attention 2 x 2 x at most 8 x 16, 8 rows, float16":
            ("variable_length_attention", (q[0], k[0], v[0], lengths, 8)),
        "residual layer norm 16 x 32 float16": ("residual_layer_norm", (x, x, None, None)),
        "residual RMS norm 16 x 32 float16": ("residual_rms_norm", (x, x, None)),
        "embedding layer norm 16 x 32 float16, 2 tables": ("embedding_layer_norm", ([index] * 2, [w, w], None, None)),
    }  # fmt: skip


def no_time(launch: Any, launches: int) -> Any:
    return lambda: 1.0


@pytest.mark.parametrize("name", calls("cpu"))
def test_candidates_are_right(name: str, device: str) -> None:
    operator, operands = calls(device)[name]
    task = task_of(operator, *operands)
    assert task is not None
    assert str(task) == name
    assert task.candidates()[0] == task.default()
    result = measure(task, no_time)
    assert not result.wrong
    assert result.choice == task.default()
    assert set(task.candidates()) == {*result.times_ms, *result.failed}
    for config, reason in result.failed.items():
        assert getattr(config, "kind", "triton") != "triton", reason  # other kernels may need a GPU, or refuse


@pytest.mark.parametrize("name", calls("cpu"))
def test_calls_look_the_choice_up(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem of a graph's operands is the one that the call itself asks for."""
    operator, operands = calls(device)[name]
    task = task_of(operator, *operands)
    assert task is not None
    asked = []
    kind = type(task.choices)
    monkeypatch.setattr(kind, "__getitem__", lambda self, where: asked.append((self, where)), raising=False)
    OPERATORS[operator].kernel(*operands)
    assert (task.choices, (task.device, task.problem)) in asked


def test_a_choice_is_what_runs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    ran: list[Any] = []
    for module, implementation in ((linear, "cublas"), (linear, "tiles")):
        original = module._IMPLEMENTATIONS[implementation]
        monkeypatch.setitem(
            linear._IMPLEMENTATIONS, implementation, lambda *a, original=original: ran.append(a[-1]) or original(*a)
        )
    operator, operands = calls(device)["linear 16 x 32 to 64 float16, gelu"]
    task = task_of(operator, *operands)
    assert task is not None
    for config in task.candidates():
        monkeypatch.setitem(task.choices, (task.device, task.problem), config)
        OPERATORS[operator].kernel(*operands)
    assert ran == [c for c in task.candidates() if c.implementation != "hopper"]


def test_what_has_no_problem() -> None:
    x = torch.randn(2, 8, 32).half()
    assert task_of("row_moments", x) is None
    assert task_of("linear_activation", x[:0], x[0], None) is None
    assert task_of("residual_layer_norm", x, x.float(), None, None) is None
    q = torch.randn(2, 8, 2, 16).half()
    assert task_of("attention", q, q, q, None, False, None, "cudnn") is None
    assert task_of("attention", q, q[:, :0], q[:, :0]) is None


def test_every_kind_of_choice_has_a_problem() -> None:
    kinds = {task_of(operator, *operands).choices.kind for operator, operands in calls("cpu").values()}  # type: ignore[union-attr]
    modules = (attention, linear, norms, split, attention_choice)
    assert kinds == {module.chosen.kind for module in modules}


def test_dynamic_sizes_are_not_looked_up() -> None:
    """A problem is of numbers; for a size that is not known there is none, and no guard."""
    seen: list[Any] = []

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            seen.append(task_of("attention", q, q, q))
            seen.append(task_of("residual_layer_norm", x, x, None, None))
            seen.append(attention_choice.chosen_kind(q, q, q, None, False))
            return q + 1

    batch = torch.export.Dim("batch", min=2)
    operands = (torch.randn(3, 8, 2, 16).half(), torch.randn(3, 8, 32).half())
    program = torch.export.export(Model(), operands, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    assert seen[-3:-1] == [None, None]
    assert seen[-1] in ("triton", "cudnn")
    assert len(program.range_constraints) == 1
