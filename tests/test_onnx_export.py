"""The ONNX model that a graph becomes: weights outside, dynamic sizes kept, PyTorch's meaning of attention."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelkit import Dim
from accelkit.culprits import culprits
from accelkit.errors import LoweringError
from accelkit.onnx_export import (
    EXTERNAL_BYTES,
    export_onnx,
    external_weights,
    initializer_name,
)
from accelkit.onnx_weights import hide_weights, restore_weights
from accelkit.testing import trace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Mixed(nn.Module):
    """A large float weight, a large integer table, a small float weight."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(16, 64)
        self.scale = nn.Parameter(torch.randn(64))
        self.register_buffer("table", torch.randint(0, 9, (500,)))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.large(x) * self.scale + self.table[index].unsqueeze(-1)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {i.name: i for i in model.graph.initializer}


def test_only_large_float_weights_stay_outside() -> None:
    model = Mixed().eval()
    graph = trace(model, torch.randn(2, 3, 16), torch.randint(0, 500, (2, 3)))
    exported = export_onnx(graph)
    found = initializers(exported)
    assert model.large.weight.nbytes >= EXTERNAL_BYTES > model.scale.nbytes
    weight = found[initializer_name("large.weight")]
    assert weight.data_location == weight.EXTERNAL
    assert not weight.raw_data
    assert tuple(weight.dims) == (64, 16)
    for name in ("scale", "table"):
        small = found[initializer_name(name)]
        assert small.data_location != small.EXTERNAL
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(small).copy()), getattr(model, name).detach())
    assert external_weights(exported, graph).keys() == {initializer_name("large.weight")}
    assert (
        external_weights(exported, graph)[initializer_name("large.weight")].data_ptr() == model.large.weight.data_ptr()
    )


def test_the_model_is_the_same_for_other_weights() -> None:
    inputs = torch.randn(2, 3, 16), torch.randint(0, 500, (2, 3))
    one, other = Mixed().eval(), Mixed().eval()
    other.table, other.scale, other.large.bias = one.table, one.scale, one.large.bias
    texts = [export_onnx(trace(m, *inputs)).SerializeToString(deterministic=True) for m in (one, other)]
    assert not torch.equal(one.large.weight, other.large.weight)
    assert texts[0] == texts[1]


def test_weights_of_another_shape_are_refused() -> None:
    inputs = torch.randn(2, 3, 16), torch.randint(0, 500, (2, 3))
    graph = trace(Mixed().eval(), *inputs)
    exported = export_onnx(graph)
    wider = Mixed()
    wider.large = nn.Linear(16, 65)
    wider.scale = nn.Parameter(torch.randn(65))
    with pytest.raises(LoweringError, match=r"large.weight has shape \[65, 16\], the stored model expects \[64, 16\]"):
        external_weights(exported, trace(wider.eval(), *inputs))
    with pytest.raises(LoweringError, match=r"needs large.weight, which the graph does not have"):
        external_weights(exported, trace(nn.ReLU(), torch.randn(2)))


def test_dynamic_dimensions_and_names() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.reshape(x.shape[0] * x.shape[1], 4), x.sum((1, 2)) + y

    batch, length = Dim("batch"), Dim("length")
    graph = trace(Two(), torch.randn(2, 5, 4), torch.randn(2), dynamic_shapes=({0: batch, 1: length}, {0: batch}))
    exported = export_onnx(graph)
    (x, y), outputs = exported.graph.input, exported.graph.output
    dims = [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
    assert dims[0] == y.type.tensor_type.shape.dim[0].dim_param != ""
    assert isinstance(dims[1], str)
    assert dims[1] != dims[0]
    assert dims[2] == 4
    assert ([i.name for i in exported.graph.input], [o.name for o in outputs]) == (["x", "y"], ["output_0", "output_1"])


def test_the_graph_and_the_users_logging_stay_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    graph = trace(Mixed().eval(), torch.randn(2, 3, 16), torch.randint(0, 500, (2, 3)))
    before, level = str(graph.graph), logging.getLogger("torch.onnx").level
    nodes = {n: dict(n.meta) for n in graph.graph.nodes}
    export_onnx(graph)
    assert str(graph.graph) == before
    assert logging.getLogger("torch.onnx").level == level
    assert all(dict(n.meta) == meta for n, meta in nodes.items())
    assert capfd.readouterr() == ("", "")


def test_hidden_weights_come_back() -> None:
    exported = export_onnx(trace(Mixed().eval(), torch.randn(2, 3, 16), torch.randint(0, 500, (2, 3))))
    before = initializers(exported).keys()
    inputs = [i.name for i in exported.graph.input]
    hidden = hide_weights(exported)
    assert [h.name for h in hidden] == [initializer_name("large.weight")]
    assert hidden[0].name not in initializers(exported)
    assert hidden[0].name in [i.name for i in exported.graph.input]
    restore_weights(exported, hidden)
    assert initializers(exported).keys() == before
    assert [i.name for i in exported.graph.input] == inputs


def test_one_exports_translations_are_no_others() -> None:
    """The exporter's table of operators is read once a process here (conftest.py), and each export has its own copy."""

    def abs_instead(x: object) -> object:
        from onnxscript import opset18

        return opset18.Abs(x)

    graph = trace(nn.ReLU(), torch.randn(2, 3))
    found = []
    for translations in ({}, {torch.ops.aten.relu.default: abs_instead}, {}):
        found.append([n.op_type for n in export_onnx(graph, translations=translations).graph.node])
    assert found == [["Relu"], ["Abs"], ["Relu"]]


def test_operators_without_an_onnx_form_are_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.special.bessel_j0(x).relu() @ x
            return torch.special.bessel_j0(y) + torch.linalg.svdvals(x).sum()

    graph = trace(Odd(), torch.randn(4, 4))
    with pytest.raises(LoweringError, match=r"torch.onnx.export cannot take the graph: .*(svd|bessel_j0)"):
        export_onnx(graph)

    def attempt(part: torch.fx.GraphModule) -> str | None:
        try:
            export_onnx(part)
        except LoweringError as error:
            return str(error)
        return None

    found = culprits(graph, attempt)
    assert {n.split("_")[0] + "_" + n.split("_")[1] for n in found} == {"special_bessel", "linalg_svdvals"}
    assert sum(n.startswith("special_bessel_j0") for n in found) == 2
    assert all("No ONNX function found" in why for why in found.values())


# --- attention


def attention_cases() -> list[tuple[str, dict[str, object], tuple[int, int, int, int]]]:
    return [
        ("plain", {}, (4, 5, 4, 7)),
        ("causal, square", {"is_causal": True}, (4, 6, 4, 6)),
        ("causal, more rows", {"is_causal": True}, (4, 7, 4, 5)),
        ("causal, more columns", {"is_causal": True}, (4, 5, 4, 7)),
        ("scale", {"scale": 0.37}, (4, 5, 4, 7)),
        ("grouped heads", {"enable_gqa": True}, (6, 5, 2, 5)),
    ]


def run(graph: torch.fx.GraphModule, *inputs: torch.Tensor) -> list[torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [torch.from_numpy(r) for r in session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})]


@pytest.mark.parametrize(("case", "options", "sizes"), attention_cases(), ids=lambda v: v if isinstance(v, str) else "")
def test_attention(case: str, options: dict[str, object], sizes: tuple[int, int, int, int]) -> None:
    heads, rows, few, columns = sizes

    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    q, k, v = torch.randn(2, heads, rows, 8), torch.randn(2, few, columns, 8), torch.randn(2, few, columns, 8)
    (result,) = run(trace(Attention(), q, k, v), q, k, v)
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("boolean", [True, False], ids=["bool mask", "float mask"])
def test_attention_to_nothing_gives_zeros_and_nan_stays_nan(boolean: bool) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    allowed = torch.rand(2, 1, 5, 5) > 0.4
    allowed[..., 0] = True
    allowed[1, 0, 2] = False
    mask = allowed if boolean else torch.randn(2, 1, 5, 5).masked_fill(~allowed, float("-inf"))
    graph = trace(Attention(), q, k, v, mask)
    (result,) = run(graph, q, k, v, mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.equal(expected[1, :, 2], torch.zeros(3, 8))
    torch.testing.assert_close(result, expected)
    q[0, 0, 0, 0] = float("nan")
    (result,) = run(graph, q, k, v, mask)
    assert result[0, 0, 0].isnan().all()
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), equal_nan=True)
