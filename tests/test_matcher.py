"""RewritePass: where a pattern fits, where it does not, and what stands there afterwards."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from accelkit.errors import PassError
from accelkit.pass_api import RewritePass
from accelkit.testing import apply, graph_text, run

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from pass_checks import assert_same_bits, graph_of

aten = torch.ops.aten


@dataclass(frozen=True)
class LinearRelu(RewritePass):
    """relu(linear(x, w, b)) -> relu(addmm(b, x, w^T)), for the sake of the tests"""

    def pattern(self, x, w, b):
        return aten.relu.default(aten.linear.default(x, w, b))

    def replacement(self, x, w, b):
        return aten.relu.default(aten.addmm.default(b, x, aten.permute.default(w, [1, 0])))

    def check(self, match):
        match.require(match.value("x").dim() == 2, "x is not a matrix")
        match.require(match.tensor("b").numel() > 0, "there is no bias")


def linear(self, x):
    return torch.relu(torch.nn.functional.linear(x, self.w, self.b))


def test_golden() -> None:
    x = torch.randn(2, 4)
    graph = graph_of(linear, x, w=torch.randn(3, 4), b=torch.randn(3))
    before = run(graph, x)
    assert apply(LinearRelu(), graph).rewrites == ("relu",)
    assert (
        graph_text(graph)
        == """\
%w: f32[3, 4] = attribute
%b: f32[3] = attribute
%x: f32[2, 4] = input
%0: f32[4, 3] = aten.permute(%w, [1, 0])
%1: f32[2, 3] = aten.addmm(%b, %x, %0)
%2: f32[2, 3] = aten.relu(%1)
return (%2)"""
    )
    torch.testing.assert_close(run(graph, x), before)


LEFT_ALONE = {
    "check": (lambda self, x: linear(self, x[None]), "x is not a matrix"),
    "no bias": (
        lambda self, x: torch.relu(torch.nn.functional.linear(x, self.w)), "b is the number None, not a tensor",
    ),
    "computed bias": (
        lambda self, x: torch.relu(torch.nn.functional.linear(x, self.w, x[:1].sum(1).expand(3))),
        "b (expand) is computed at run time, not a weight",
    ),
    "inner node used twice": (
        lambda self, x: ((y := torch.nn.functional.linear(x, self.w, self.b)).relu(), y.sin()),
        "linear is also used by sin",
    ),
    "inner node is an output": (
        lambda self, x: ((y := torch.nn.functional.linear(x, self.w, self.b)).relu(), y),
        "linear is also used by output",
    ),
    "another operator": (lambda self, x: torch.sigmoid(torch.nn.functional.linear(x, self.w, self.b)), None),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    function, reason = LEFT_ALONE[case]
    graph = graph_of(function, torch.randn(2, 4), w=torch.randn(3, 4), b=torch.randn(3))
    text = graph_text(graph)
    record = apply(LinearRelu(), graph)
    assert graph_text(graph) == text
    assert [r.reason for r in record.refusals] == ([] if reason is None else [reason])


def rewriting(pattern, replacement) -> RewritePass:
    return type("Rewriting", (RewritePass,), {"pattern": pattern, "replacement": replacement})()


def rewrites_of(pattern, function, *inputs: torch.Tensor) -> int:
    return len(apply(rewriting(pattern, lambda self, x: aten.exp.default(x)), graph_of(function, *inputs)).rewrites)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda self, x: x * 2, 1),
        (lambda self, x: x * 3, 0),
        (lambda self, x: x * 2 * 2, 2),
        (lambda self, x: x * True, 0),
    ],
)
def test_numbers_in_patterns(function, count: int) -> None:
    assert rewrites_of(lambda self, x: aten.mul.Tensor(x, 2), function, torch.randn(3)) == count


def test_a_bool_is_not_a_number() -> None:
    assert rewrites_of(lambda self, x: aten.mul.Tensor(x, 1), lambda self, x: x * True, torch.randn(3)) == 0


def test_missing_arguments_are_the_defaults() -> None:
    def pattern(self, x):
        return aten.softmax.int(aten.gelu.default(x), 1)

    x = torch.randn(2, 3)
    assert rewrites_of(pattern, lambda self, x: torch.softmax(torch.nn.functional.gelu(x), dim=1), x) == 1
    assert (
        rewrites_of(pattern, lambda self, x: torch.softmax(torch.nn.functional.gelu(x, approximate="tanh"), 1), x) == 0
    )


def test_one_parameter_twice_is_one_value() -> None:
    def pattern(self, x):
        return aten.mul.Tensor(x, aten.sigmoid.default(x))

    x, y = torch.randn(3), torch.randn(3)
    assert rewrites_of(pattern, lambda self, x, y: x * torch.sigmoid(x), x, y) == 1
    assert rewrites_of(pattern, lambda self, x, y: x * torch.sigmoid(y), x, y) == 0


def test_a_random_operator_is_refused() -> None:
    one = rewriting(lambda self, x: aten.dropout.default(x, 0.5, True), lambda self, x: aten.exp.default(x))
    graph = graph_of(lambda self, x: torch.dropout(x, 0.5, True) * 2, torch.randn(3))
    assert [r.reason for r in apply(one, graph).refusals] == ["dropout has a side effect or is random"]


def test_several_results() -> None:
    def pattern(self, x, y):
        total = aten.add.Tensor(x, y)
        return aten.exp.default(total), total

    def replacement(self, x, y):
        total = aten.add.Tensor(y, x)
        return aten.exp.default(total), total

    def function(self, x, y):
        total = x + y
        return total.exp(), total.sin()

    x, y = torch.randn(3), torch.randn(3)
    graph = graph_of(function, x, y)
    before = run(graph, x, y)
    assert apply(rewriting(pattern, replacement), graph).rewrites == ("exp",)
    assert "aten.add.Tensor(%y, %x)" in graph_text(graph)
    assert "aten.add.Tensor(%x, %y)" not in graph_text(graph)
    for old, new in zip(before, run(graph, x, y), strict=True):
        assert_same_bits(old, new)

    def early(self, x, y):
        total = x + y
        sine = total.sin()
        return total.exp(), sine

    record = apply(rewriting(pattern, replacement), graph_of(early, x, y))
    assert [r.reason for r in record.refusals] == ["add is used by sin before exp is computed"]


def test_several_patterns_for_one_replacement() -> None:
    @dataclass(frozen=True)
    class Either(RewritePass):
        def pattern(self, x, y):
            return aten.add.Tensor(aten.exp.default(x), y)

        def other(self, x, y):
            return aten.add.Tensor(y, aten.exp.default(x))

        def patterns(self):
            return self.pattern, self.other

        def replacement(self, x, y):
            return aten.sub.Tensor(y, aten.neg.default(aten.exp.default(x)))

    x = torch.randn(3)
    graph = graph_of(lambda self, x: (x.exp() + x.sin(), x.cos() + x.exp()), x)
    assert len(apply(Either(), graph).rewrites) == 2


def test_a_replacement_that_is_its_parameter() -> None:
    x = torch.randn(3)
    graph = graph_of(lambda self, x: x.sin().neg().neg().cos(), x)
    one = rewriting(lambda self, x: aten.neg.default(aten.neg.default(x)), lambda self, x: x)
    assert len(apply(one, graph).rewrites) == 1
    assert graph_text(graph).splitlines()[-2:] == ["%1: f32[3] = aten.cos(%0)", "return (%1)"]


def test_a_wrong_number_of_results_names_the_pass() -> None:
    one = rewriting(lambda self, x: aten.exp.default(x), lambda self, x: (aten.exp.default(x), aten.sin.default(x)))
    with pytest.raises(PassError, match=r"rewriting failed: .*: the pattern has 1 results, the replacement 2"):
        apply(one, graph_of(lambda self, x: x.exp() + 1, torch.randn(3)))


def test_a_pattern_with_a_loose_part_names_the_pass() -> None:
    def pattern(self, x):
        aten.sin.default(x)
        return aten.exp.default(x)

    with pytest.raises(PassError, match=r"the first result must depend on all nodes, not so on \{sin"):
        apply(rewriting(pattern, lambda self, x: x), graph_of(lambda self, x: x.exp(), torch.randn(3)))
