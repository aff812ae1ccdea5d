"""In-place operators in captured graphs: gone, with the same values bit for bit; composite operators still whole."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelkit import graph as graphs
from accelkit.capture import capture


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def relu_(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.relu_()
    return y + 1


def chained(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).add_(1).mul_(3).clamp_(-2, 2).sigmoid_()


def use_before_and_after(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    before = y * 2
    y.mul_(10)
    return before + y


def masked_fill_on_view(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.view(-1).masked_fill_(x.view(-1) > 0, -5.0)
    return y


def write_column(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0] = 1
    y[1:, 2] += x[1:, 1]
    return y


def view_then_write(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 1
    view = y.t()
    y.add_(1)
    return view * 2, y


def write_through_two_views(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    a, b = y[0], y[:, 1]
    a.add_(1)
    b.mul_(a[1].clone())
    return y


def on_input(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * 2


def on_slice_of_input(x: torch.Tensor) -> torch.Tensor:
    x[0].zero_()
    return x.sum()


def promoted_add(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.add_(torch.full((4,), 0.1, dtype=torch.float64))
    return y * 3


def promoted_add_then_again(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.add_(torch.full((4,), 0.1, dtype=torch.float64)).mul_(torch.full((4,), 1.1, dtype=torch.float64))
    y.relu_()
    return y


def comparison_in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.gt_(0.0)
    return y / 2


def integers_into_floats(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y.copy_(torch.arange(4))
    return y + x


def transposed_in_place(x: torch.Tensor) -> torch.Tensor:
    y = x @ x.t()
    y.t_()
    return y[0]


def unsqueezed_in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.unsqueeze_(0)
    return y + 1


def index_put(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.index_put_((torch.tensor([0, 1]), torch.tensor([1, 2])), torch.tensor([9.0, 8.0]))
    return y.index_add_(0, torch.tensor([0, 2]), x[:2])


def scattered(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(3, 4)
    y.scatter_(1, torch.tensor([[0], [1], [2]]), x[:, :1])
    y.fill_diagonal_(7.0)
    return y


def split_parts(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    left, right = y.split(2, dim=1)
    left.add_(right)
    return y


def strides_kept(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_strided((3, 4), (1, 3)).copy_(x)
    y.add_(x)
    return y.t().view(-1)


def no_use_of_result(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    F.relu(y, inplace=True)
    F.dropout(y, 0.5, training=False, inplace=True)
    return y


PATTERNS = [
    relu_,
    chained,
    use_before_and_after,
    masked_fill_on_view,
    write_column,
    view_then_write,
    write_through_two_views,
    on_input,
    on_slice_of_input,
    promoted_add,
    promoted_add_then_again,
    comparison_in_place,
    integers_into_floats,
    transposed_in_place,
    unsqueezed_in_place,
    index_put,
    scattered,
    split_parts,
    strides_kept,
    no_use_of_result,
]


def assert_same(model: nn.Module, *inputs: torch.Tensor) -> Any:
    """The captured graph's outputs, inputs and buffers after it are the model's, bit for bit."""
    ours, own = [i.clone() for i in inputs], [i.clone() for i in inputs]
    reference = copy.deepcopy(model)
    program = capture(model, inputs, {})
    with torch.no_grad():
        results = program.graph(*ours)
        expected = reference(*own)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(ours, own, strict=True):
        assert torch.equal(a, b)
    for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    for node in program.graph.graph.nodes:  # every node is what its metadata says
        if graphs.is_mutating(node):
            assert str(node.target) in ("aten.copy_.default", "aten.instance_norm.default")
            assert node.target is not torch.ops.aten.copy_.default or all(
                root.op in ("placeholder", "get_attr") for root in graphs.storage_roots(node.args[0])
            )
    return program


@pytest.mark.parametrize("function", PATTERNS, ids=lambda f: f.__name__)
def test_pattern(function: Any) -> None:
    program = assert_same(Fn(function), torch.randn(3, 4))
    values = {}

    def remember(node: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            fake = graphs.val(node)
            values[node] = value
            assert (value.dtype, value.shape) == (fake.dtype, fake.shape), node

    interpreter = torch.fx.Interpreter(program.graph)
    run = interpreter.run_node
    interpreter.run_node = lambda node: (lambda value: (remember(node, value), value)[1])(run(node))  # type: ignore[method-assign]
    interpreter.run(torch.randn(3, 4))
    assert values


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", torch.zeros(3, 4))
        self.register_buffer("replaced", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.history[1].add_(x[0])
        self.history[:, 2] = x[:, 0]
        self.replaced = self.replaced * 2
        return x + self.history + self.count + self.replaced


def test_writes_to_buffers_their_slices_and_replaced_buffers() -> None:
    assert_same(Counting(), torch.randn(3, 4))


class TrainingStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.variance, training=True)


class InstanceStatistics(TrainingStatistics):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * F.instance_norm(x[None].transpose(1, 2), self.mean, self.variance, use_input_stats=True)


@pytest.mark.parametrize("model", [TrainingStatistics(), InstanceStatistics()], ids=lambda m: type(m).__name__)
def test_running_statistics_that_no_schema_mentions(model: nn.Module) -> None:
    program = assert_same(model, torch.randn(6, 4))
    assert any(graphs.is_mutating(n) for n in program.graph.graph.nodes)


def test_composite_operators_stay_whole_beside_in_place_ones() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3, inplace=True),
        nn.SiLU(inplace=True),
        nn.GroupNorm(2, 4),
        nn.Hardswish(inplace=True),
        nn.Flatten(),
        nn.LayerNorm(4 * 36),
        nn.Linear(144, 5),
        nn.ELU(inplace=True),
    ).eval()
    program = assert_same(model, torch.randn(2, 3, 8, 8))
    names = [str(n.target).split(".")[1] for n in program.graph.graph.nodes if n.op == "call_function"]
    assert names == [
        "conv2d",
        "batch_norm",
        "relu",
        "dropout",
        "silu",
        "group_norm",
        "hardswish",
        "flatten",
        "layer_norm",
        "linear",
        "elu",
    ]


UNARY = ["relu_", "sigmoid_", "tanh_", "neg_", "abs_", "exp_"]
BINARY = ["add_", "sub_", "mul_", "maximum"]


class RandomProgram(nn.Module):
    """A random straight-line program of views, in-place and plain operators over a few values."""

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        self.seed, self.length = seed, length
        self.register_buffer("state", torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, x: torch.Tensor) -> Any:
        choose = random.Random(self.seed)
        values = [x, x * 0.5, self.state, torch.sin(self.state)]
        for _ in range(self.length):
            one, other = choose.choice(values), choose.choice(values)
            kind = choose.randrange(6)
            if kind == 0:
                getattr(one, choose.choice(UNARY))()
            elif kind == 1 and other.shape == one.shape and other is not one:
                getattr(one, choose.choice(BINARY[:3]))(other.clone())
            elif kind == 2:
                one[choose.randrange(one.shape[0])] = choose.random()
            elif kind == 3:
                values.append(choose.choice([one.t(), one[:2], one[:, 1:], one.view_as(one)]))
            elif kind == 4:
                values.append(one * 0.5)
            else:
                one.clamp_(-3, 3)
        return tuple(v.tanh() for v in values)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 9))
def test_random_programs(seed: int, length: int) -> None:
    torch.manual_seed(seed)
    assert_same(RandomProgram(seed, length), torch.randn(3, 4))
