"""Lowering: whatever a backend refuses, the whole computes the same, bit for bit; planted refusals and failures."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted
from torch import fx, nn

from accelkit import Dim, LoweringError
from accelkit import graph as graphs
from accelkit.backend_api import CompileContext
from accelkit.capture import capture
from accelkit.lowering import lower
from accelkit.pass_runner import PassRecord


def lowered_and_expected(model: nn.Module, backend: Planted, *inputs: torch.Tensor) -> tuple[Any, Any, Any]:
    program = capture(model, inputs, {})
    lowered = lower(program.graph, backend, program.inputs, CompileContext())
    with torch.no_grad():
        return lowered, lowered.call(*inputs), program.graph(*inputs)


def assert_equal(results: Any, expected: Any) -> None:
    assert len(results) == len(expected)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


class RandomDag(nn.Module):
    """A random graph of a few operators, some with sizes read from intermediate tensors."""

    OPS = ("sin", "relu", "tanh", "add", "mul", "mm", "cat", "size", "sum")

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        self.seed, self.length = seed, length
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> Any:
        choose = random.Random(self.seed)
        values = [x]
        for _ in range(self.length):
            op, a, b = choose.choice(self.OPS), choose.choice(values), choose.choice(values)
            if op in ("sin", "relu", "tanh"):
                values.append(getattr(torch, op)(a))
            elif op in ("add", "mul"):
                values.append(getattr(torch, op)(a[: x.shape[0]], b[: x.shape[0]]))
            elif op == "mm":
                values.append(torch.mm(a, self.weight))
            elif op == "cat":
                values.append(torch.cat([a, b])[: 2 * x.shape[0]])
            elif op == "size":
                values.append(a / a.shape[0])
            else:
                values.append(a - b.sum())
        picked = choose.sample(values, min(3, len(values)))
        return (*picked, values[-1].shape[0])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 12),
    refuse=st.frozensets(
        st.sampled_from(["sin", "relu", "tanh", "add", "mul", "mm", "cat", "div", "sub", "sum", "slice"])
    ),
)
def test_any_refusals_leave_the_result_as_it_is(seed: int, length: int, refuse: frozenset[str]) -> None:
    torch.manual_seed(seed)
    backend = Planted(refuse=refuse)
    program = capture(RandomDag(seed, length), (torch.randn(3, 4),), {}, {"x": {0: Dim("rows", max=9)}})
    lowered = lower(program.graph, backend, program.inputs, CompileContext())
    for rows in (3, 5, 2):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            assert_equal(lowered.call(x), program.graph(x))
    for piece in lowered.pieces:  # nothing refused went into an engine, and reasons are given for what did not
        assert not any(backend.unsupported(node) for node in piece.graph.graph.nodes)
    names = {refusal.node for refusal in lowered.refusals}
    operators = [n for n in program.graph.graph.nodes if n.op == "call_function" and not graphs.is_size(n)]
    assert {n.name for n in operators if backend.unsupported(n)} <= names
    assert sum(p.operators for p in lowered.pieces) + lowered.torch_operators >= len(operators)


def test_a_graph_that_is_taken_whole_is_one_engine() -> None:
    lowered, results, expected = lowered_and_expected(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU()), Planted(), torch.randn(2, 3)
    )
    assert_equal(results, expected)
    assert [p.operators for p in lowered.pieces] == [2]
    assert (lowered.refusals, lowered.torch_operators) == ([], 0)


class Sandwich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.sin(self.first(x)))


def test_a_refused_operator_between_two_pieces() -> None:
    lowered, results, expected = lowered_and_expected(Sandwich(), Planted(refuse=frozenset({"sin"})), torch.randn(2, 4))
    assert_equal(results, expected)
    assert [p.operators for p in lowered.pieces] == [1, 1]
    assert [(r.node, r.reason) for r in lowered.refusals] == [("sin", "aten.sin.default: planted refusal of sin")]


class Lonely(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.sin(x) * 2)


def test_too_little_work_for_an_engine_is_said() -> None:
    lowered, results, expected = lowered_and_expected(Lonely(), Planted(refuse=frozenset({"sin"})), torch.randn(3))
    assert_equal(results, expected)
    assert lowered.pieces == []
    assert any("too little work for an engine" in r.reason for r in lowered.refusals)


class RunTimeNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        number = k.sum().item()
        torch._check(number >= 1)
        return self.linear(x) * number + self.linear(x).mean()


def test_numbers_from_tensor_data_stay_in_pytorch() -> None:
    program = capture(RunTimeNumber(), (torch.randn(2, 4), torch.tensor([2, 3])), {})
    lowered = lower(program.graph, Planted(), program.inputs, CompileContext())
    for numbers in ([2, 3], [1, 0], [100, 7]):
        given = (torch.randn(2, 4), torch.tensor(numbers))
        with torch.no_grad():
            assert_equal(lowered.call(*given), program.graph(*given))
    assert lowered.pieces
    assert any("Python number from tensor data" in r.reason for r in lowered.refusals)
    assert any("computed from tensor data" in r.reason and "mul" in r.node for r in lowered.refusals)


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.linear(self.state + x)
        self.state.add_(before.sum(0))
        after = self.linear(self.state + x)
        x.mul_(2)
        return before + after + x


def test_writes_come_last_and_building_makes_none() -> None:
    model = Writing()
    x = torch.randn(3, 4)
    program = capture(model, (x,), {})
    lowered = lower(program.graph, Planted(), program.inputs, CompileContext())
    assert torch.equal(model.state, torch.zeros(4))
    assert torch.equal(program.inputs[0], x)
    given, own = x.clone(), x.clone()
    (result,) = lowered.call(given)
    state = model.state.clone()
    model.state.zero_()
    with torch.no_grad():
        expected = model(own)
    assert torch.equal(result, expected)
    assert torch.equal(given, own)
    assert torch.equal(state, model.state)
    for piece in lowered.pieces:
        assert not any(graphs.is_mutating(n) for n in piece.graph.graph.nodes)


class PassesThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> Any:
        return x, self.weight, x.shape[0], torch.cat([x, x]).shape[0], self.weight @ x.t()


def test_outputs_that_are_inputs_weights_and_sizes() -> None:
    model = PassesThrough()
    program = capture(model, (torch.randn(3, 2),), {}, {"x": {0: Dim("n", max=8)}})
    lowered = lower(program.graph, Planted(), program.inputs, CompileContext())
    x = torch.randn(5, 2)
    results = program.signature.unflatten(lowered.call(x))
    assert_equal(results, tuple(v.detach() if isinstance(v, torch.Tensor) else v for v in model(x)))
    assert results[2:4] == (5, 10)


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_model_that_computes_nothing() -> None:
    lowered, results, expected = lowered_and_expected(Nothing(), Planted(), torch.randn(3))
    assert_equal(results, expected)
    assert lowered.pieces == []


def test_a_failure_that_names_operators_is_retried_without_them() -> None:
    def no_sin(graph: fx.GraphModule) -> None:
        context.records.append(PassRecord("an onnx pass", (), (), 1, 1, 0.0))
        if names := [n.name for n in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)]:
            raise LoweringError("planted", dict.fromkeys(names, "planted: cannot compile"))

    context = CompileContext()
    program = capture(Sandwich(), (torch.randn(2, 4),), {})
    lowered = lower(program.graph, Planted(fail=no_sin), program.inputs, context)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert_equal(lowered.call(x), program.graph(x))
    assert [(r.node, r.reason) for r in lowered.refusals] == [("sin", "aten.sin.default: planted: cannot compile")]
    assert len(context.records) == len(lowered.pieces) == 2  # none of the failed attempt


def test_a_failure_that_names_nothing_is_raised() -> None:
    def fail(graph: fx.GraphModule) -> None:
        raise LoweringError("planted failure without a culprit")

    with pytest.raises(LoweringError, match="without a culprit"):
        lowered_and_expected(Sandwich(), Planted(fail=fail), torch.randn(2, 4))


def test_a_failure_that_names_strangers_is_raised_too() -> None:
    def fail(graph: fx.GraphModule) -> None:
        raise LoweringError("planted", {"no_such_node": "?"})

    with pytest.raises(LoweringError, match="planted"):
        lowered_and_expected(Sandwich(), Planted(fail=fail), torch.randn(2, 4))


def test_stages_run_without_gradients() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    _, results, _ = lowered_and_expected(Sandwich(), Planted(refuse=frozenset({"sin"})), x)
    assert not results[0].requires_grad


class InstanceStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.instance_norm(self.linear(x), self.mean, self.variance, use_input_stats=True)
        return self.linear(x)


def test_an_operator_that_writes_amid_the_graph_stays_in_pytorch() -> None:
    model = InstanceStatistics()
    program = capture(model, (torch.randn(2, 3, 4),), {})
    lowered = lower(program.graph, Planted(), program.inputs, CompileContext())
    x = torch.randn(2, 3, 4)
    model.mean.zero_()
    (result,) = lowered.call(x)
    statistics = model.mean.clone()
    model.mean.zero_()
    with torch.no_grad():
        assert torch.equal(result, model(x))
    assert torch.equal(statistics, model.mean)
    assert any("writes to a buffer" in r.reason for r in lowered.refusals)
