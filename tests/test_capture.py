"""Capture: composite operators whole, parameters shared, dynamic dimensions, and what is refused with where and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accelkit import CaptureError, Dim, InputError
from accelkit import graph as graphs
from accelkit.capture import capture, specialise
from accelkit.graph import graph_text
from accelkit.options import sizes_of


def targets(graph: Any) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function" and "." in str(n.target)]


def test_composite_operators_stay_one_node() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.LayerNorm(4), nn.Dropout(0.1)).train()
    names = targets(capture(model, (torch.randn(2, 8),), {}).graph)
    assert names == ["linear", "gelu", "layer_norm", "dropout"]
    assert model.training


def test_the_graphs_text() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).mul(2.0)

    text = graph_text(capture(Scaled(), (torch.randn(2, 8),), {}, {"x": {0: Dim("n")}}).graph)
    symbol = text.partition("[")[2].partition(",")[0]
    assert text.replace(symbol, "n") == (
        "%x: f32[n, 8] = input\n%0: f32[n, 8] = aten.relu(%x)\n%1: f32[n, 8] = aten.mul.Tensor(%0, 2.0)\nreturn (%1)"
    )


def test_attention_stays_open() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    names = targets(capture(layer, (torch.randn(2, 5, 16),), {}).graph)
    assert "scaled_dot_product_attention" in names
    assert not any("_native_multi_head" in n or "_transformer_encoder" in n for n in names)
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_are_the_models_own_and_every_node_has_its_fake_tensor() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = capture(model, (torch.randn(2, 3, 8, 8),), {})
    own = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert {id(t) for _, t in graphs.tensor_attributes(program.graph)} <= own
    for node in program.graph.graph.nodes:
        assert node.op == "output" or isinstance(graphs.val(node), torch.Tensor), node
    assert [n.op for n in program.graph.graph.nodes].count("call_module") == 0


class Variadic(nn.Module):
    def forward(
        self, x: torch.Tensor, /, *rest: torch.Tensor, scale: torch.Tensor, **named: torch.Tensor
    ) -> torch.Tensor:
        return x + sum(rest) * scale + sum(named.values())


def test_dynamic_dimensions_of_every_kind_of_parameter() -> None:
    n = Dim("n", max=9)
    names = ["x", "rest[0]", "rest[1]", "scale"]
    example = (*(torch.randn(3) for _ in range(3)),), {"scale": torch.randn(3)}
    program = capture(Variadic(), *example, {name: {0: n} for name in names})
    assert [s.name for s in program.signature.tensors] == names
    assert len({s.shape for s in program.signature.tensors}) == 1
    args, kwargs = (*(torch.randn(7) for _ in range(3)),), {"scale": torch.randn(7)}
    tensors = program.signature.tensors_of(program.signature.leaves(args, kwargs))
    assert program.signature.covers(tensors) is None
    assert torch.equal(program.graph(*tensors)[0], Variadic()(*args, **kwargs))
    with pytest.raises(InputError, match=r"fills \*\*named \(extra\): torch.export does not support that"):
        capture(Variadic(), args, kwargs | {"extra": torch.randn(7)}, {"x": {0: n}})


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"z": {0: Dim("n")}}, r"dynamic_shapes names 'z', but the example's inputs are input"),
        ({"input": {5: Dim("n")}}, r"names dimension 5, but input has 2: \[3, 4\]"),
        ({"input": {0: 8}}, r"must be an accelkit.Dim, not 8"),
        ({"input": {0: Dim("n", max=2)}}, r"the example's input has size 3 in dimension 0, outside Dim"),
        ({"input": 3}, r"must be a dict of dimension to accelkit.Dim, not 3"),
        (({0: Dim("n")}, {0: Dim("n")}), r"has 2 entries, forward takes 1 inputs"),
        ("batch", r"must be a dict by input name or a tuple, not str"),
    ],
)
def test_mistakes_in_dynamic_shapes(dynamic: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(nn.Linear(4, 2), (torch.randn(3, 4),), {}, dynamic)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a b"}, "must be a Python identifier"),
        ({"name": "n", "min": 0}, "sizes start at 1"),
        ({"name": "n", "min": 4, "max": 3}, "max=3 is smaller than min=4"),
        ({"name": "n", "opt": 9, "max": 8}, "opt=9 lies outside 1..8"),
    ],
)
def test_mistakes_in_dims(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dim(**options)


def test_a_negative_dimension_and_a_range_of_one_size() -> None:
    program = capture(nn.ReLU(), (torch.randn(3, 4),), {}, {"input": {-1: Dim("n"), 0: Dim("k", min=3, max=3)}})
    (spec,) = program.signature.tensors
    assert spec.shape[0] == 3
    assert isinstance(spec.shape[1], str)


class Refused(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_a_refusal_says_where_and_why(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        CaptureError, match=r"torch.export cannot capture Refused at .*test_capture.py:\d+: .*data-dependent"
    ):
        capture(Refused(), (torch.randn(3),), {})
    assert capfd.readouterr() == ("", "")


def test_a_dimension_that_the_model_fixes_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(3, -1) + torch.ones(3, 4)

    with pytest.raises(CaptureError, match="cannot capture Fixed"):
        capture(Fixed(), (torch.randn(3, 4),), {}, {"x": {0: Dim("n")}})


def test_the_example_is_copied_and_detached() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    program = capture(nn.Linear(4, 2), (x,), {})
    assert program.inputs[0] is not x
    assert not program.inputs[0].requires_grad
    assert torch.equal(program.inputs[0], x)


class WithSizes(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[int, torch.Tensor, int]:
        y = torch.cat([x, x])
        return x.shape[0], y * 2, y.shape[0]


def test_specialised_to_a_size() -> None:
    program = capture(WithSizes(), (torch.randn(3, 2),), {}, {"x": {0: Dim("n", max=8)}})
    fixed = specialise(program, sizes_of(program, {"n": 5}))
    x = torch.randn(5, 2)
    rows, doubled, twice = fixed.signature.unflatten(fixed.graph(x))
    assert (rows, twice) == (5, 10)
    assert torch.equal(doubled, WithSizes()(x)[1])
    assert fixed.signature.tensors[0].shape == (5, 2)
    assert fixed.signature.covers([torch.randn(4, 2)]) is not None
