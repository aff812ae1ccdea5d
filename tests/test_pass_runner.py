"""The runner's invariants: each broken by a planted pass, and each PassError names that pass and what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from accelkit.errors import InputError, PassError
from accelkit.pass_api import GraphPass, PassResult
from accelkit.pass_runner import count_operators, run_passes
from accelkit.testing import apply, graph_text, run

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from pass_checks import graph_of, guards

aten = torch.ops.aten


def planted(work, reports: bool = True) -> GraphPass:
    """A pass that does `work(graph)` and says that it did something."""

    class PlantedBug(GraphPass):
        def run(self, graph: fx.GraphModule) -> PassResult:
            result = PassResult()
            work(graph)
            if reports:
                result.rewrote("something")
            return result

    return PlantedBug()


def find(graph: fx.GraphModule, target) -> fx.Node:
    return graph.graph.find_nodes(op="call_function", target=target)[0]


def inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return graph.graph.find_nodes(op="placeholder")


def insert(graph: fx.GraphModule, target, *args) -> fx.Node:
    with graph.graph.inserting_before(graph.graph.output_node()):
        return graph.graph.call_function(target, args)


def returns(graph: fx.GraphModule, *nodes: fx.Node) -> None:
    graph.graph.output_node().args = (nodes,)


def exp(graph: fx.GraphModule) -> fx.Node:
    return find(graph, aten.exp.default)


def sin(graph: fx.GraphModule) -> fx.Node:
    return find(graph, aten.sin.default)


def raises(graph: fx.GraphModule) -> None:
    raise ZeroDivisionError("by nothing")


def rotten_order(graph: fx.GraphModule) -> None:
    exp(graph).append(inputs(graph)[0])


def does_not_fit(graph: fx.GraphModule) -> None:
    node = exp(graph)
    node.target, node.args = aten.mm.default, (inputs(graph)[0], inputs(graph)[0])


def other_dtype(graph: fx.GraphModule) -> None:
    returns(graph, insert(graph, aten.to.dtype, exp(graph), torch.float64), sin(graph))


def other_shape(graph: fx.GraphModule) -> None:
    returns(graph, insert(graph, aten.unsqueeze.default, exp(graph), 0), sin(graph))


def fewer_outputs(graph: fx.GraphModule) -> None:
    returns(graph, exp(graph))


def other_input(graph: fx.GraphModule) -> None:
    with graph.graph.inserting_before(inputs(graph)[0]):
        graph.graph.placeholder("more")


def writes(graph: fx.GraphModule) -> None:
    insert(graph, aten.copy_.default, graph.graph.find_nodes(op="get_attr")[0], exp(graph))


def writes_to_input(graph: fx.GraphModule) -> None:
    insert(graph, aten.relu_.default, insert(graph, aten.view.default, inputs(graph)[0], [-1]))


def returns_input(graph: fx.GraphModule) -> None:
    returns(graph, insert(graph, aten.view.default, inputs(graph)[0], [2, 3]), sin(graph))


def returns_weight(graph: fx.GraphModule) -> None:
    returns(graph, graph.graph.find_nodes(op="get_attr")[0], sin(graph))


def returns_one_twice(graph: fx.GraphModule) -> None:
    returns(graph, exp(graph), insert(graph, aten.view.default, exp(graph), [2, 3]))


BROKEN = {
    raises: "pass planted_bug failed: ZeroDivisionError: by nothing",
    rotten_order: "pass planted_bug left a malformed graph: .*before it has been defined",
    does_not_fit: r"after pass planted_bug: exp \(aten.mm.default\) does not fit its inputs \(x: f32\[2, 3\]",
    other_dtype: r"planted_bug changed output 0 from f32\[2, 3\] on cpu to f64\[2, 3\] on cpu; cast back",
    other_shape: r"planted_bug changed output 0 from f32\[2, 3\] on cpu to f32\[1, 2, 3\]",
    fewer_outputs: "planted_bug changed the number of outputs from 2 to 1",
    other_input: "planted_bug changed the inputs from",
    writes: "planted_bug made the graph write to w$",
    writes_to_input: "planted_bug made the graph write to x$",
    returns_input: "planted_bug made output 0 share memory with x; copy it",
    returns_weight: "planted_bug made output 0 share memory with w; copy it",
    returns_one_twice: "planted_bug made outputs 0 and 1 share memory; copy one of them",
}


@pytest.mark.parametrize("work", BROKEN, ids=lambda work: work.__name__)
def test_each_invariant(work) -> None:
    graph = graph_of(lambda self, x: (x.exp() * 1, (x * self.w).sin()), torch.randn(2, 3), w=torch.randn(2, 3))
    returns(graph, exp(graph), sin(graph))
    with pytest.raises(PassError, match=BROKEN[work]):
        apply(planted(work), graph)


def test_a_new_guard() -> None:
    def asks(graph: fx.GraphModule) -> None:
        if inputs(graph)[0].meta["val"].shape[0] >= 8:
            exp(graph).target = aten.sin.default

    graph = graph_of(lambda self, x: x.exp(), torch.randn(4, 3), batch=True)
    with pytest.raises(
        PassError, match=r"planted_bug added 1 shape guard\(s\), which would freeze a dynamic dimension"
    ):
        apply(planted(asks), graph)


@pytest.mark.parametrize(
    "work",
    [lambda g: setattr(exp(g), "target", aten.cos.default), lambda g: g.graph.erase_node(find(g, aten.mul.Tensor))],
)
def test_a_silent_change(work) -> None:
    graph = graph_of(lambda self, x: (x * 2, x.exp())[1], torch.randn(2, 3))
    with pytest.raises(PassError, match=r"planted_bug changed (exp|mul) but reports no rewrite"):
        apply(planted(work, reports=False), graph)


def test_no_result() -> None:
    class Forgetful(GraphPass):
        def run(self, graph: fx.GraphModule) -> PassResult:
            return None  # type: ignore[return-value]

    with pytest.raises(PassError, match=r"forgetful returned NoneType; run\(\) must return a PassResult"):
        apply(Forgetful(), graph_of(lambda self, x: x.exp(), torch.randn(3)))


def test_errors_of_the_tree_pass_as_they_are() -> None:
    def refuses(graph: fx.GraphModule) -> None:
        raise InputError("limit_bytes must not be negative")

    with pytest.raises(InputError, match="limit_bytes"):
        apply(planted(refuses), graph_of(lambda self, x: x.exp(), torch.randn(3)))


def test_metadata_is_inferred_onwards() -> None:
    graph = graph_of(lambda self, x: (x.exp() * 2).sum(), torch.randn(3))

    def widens(graph: fx.GraphModule) -> None:
        wide = insert(graph, aten.to.dtype, inputs(graph)[0], torch.float64)
        exp(graph).prepend(wide)
        exp(graph).args = (wide,)
        returns(graph, insert(graph, aten.to.dtype, find(graph, aten.sum.default), torch.float32))

    apply(planted(widens), graph)
    assert graph_text(graph).splitlines()[2:5] == [
        "%1: f64[3] = aten.exp(%0)", "%2: f64[3] = aten.mul.Tensor(%1, 2)", "%3: f64[] = aten.sum(%2)",
    ]  # fmt: skip


def test_sizes_known_only_at_run_time_keep_their_names() -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    graph = graph_of(lambda self, x: torch.nonzero(x * 1).sum(1) * 2, x)

    def unscales(graph: fx.GraphModule) -> None:
        find(graph, aten.mul.Tensor).target = aten.add.Tensor

    before = graph_text(graph).splitlines()[-1]
    apply(planted(unscales), graph)
    assert graph_text(graph).splitlines()[-1] == before
    assert run(graph, x)[0].tolist() == [0, 2, 4]


def test_the_record() -> None:
    graph = graph_of(lambda self, x: x.exp() * 2, torch.randn(3))
    seen: list[GraphPass] = []
    one = planted(lambda graph: setattr(exp(graph), "target", aten.sin.default))
    (record,) = run_passes(graph, [one], on_pass=seen.append)
    assert seen == [one]
    assert (record.name, record.rewrites, record.nodes_before, record.nodes_after) == (
        "planted_bug",
        ("something",),
        2,
        2,
    )
    assert 0 < record.seconds < 10
    assert count_operators(graph) == 2
    assert record.to_json()["refusals"] == ()
    x = torch.randn(3)
    assert torch.equal(run(graph, x)[0], x.sin() * 2)  # the generated code is the new graph's


def test_a_dynamic_graph_keeps_its_guards() -> None:
    graph = graph_of(lambda self, x: x.view(x.shape[0], -1).exp(), torch.randn(4, 3), batch=True)
    before = guards(graph)
    apply(planted(lambda graph: setattr(exp(graph), "target", aten.sin.default)), graph)
    assert guards(graph) == before
    assert run(graph, torch.randn(9, 3))[0].shape == (9, 3)
