"""swap_attention with a pattern: golden text, what it is not for and why, dynamic shapes, numbers, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import graph_of, guards, quick, reasons
from torch import Tensor, nn

import accelkit
from accelkit.attention_patterns import Axial2D, Custom, GlobalTokens, Local2D, Pattern, Random
from accelkit.errors import InputError
from accelkit.testing import apply, graph_text, relative_error, run, trace
from accelkit_passes import default_passes
from accelkit_passes.swap_attention import SwapAttention

attention = torch.ops.accelkit.attention
AXIAL = Axial2D(2, 4)


def operands(
    length: int = 8, keys: int | None = None, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [torch.randn(batch, n, 2, 4, dtype=dtype) for n in (length, keys or length, keys or length)]


def test_graph_before_and_after() -> None:
    graph = graph_of(lambda self, q, k, v: attention(q, k, v, scale=0.5), *operands())
    record = apply(SwapAttention(AXIAL), graph)
    assert record.rewrites == ("attention: 62.5 % of the pairs of tokens",)
    assert graph_text(graph).splitlines()[3:] == [
        "%attention_pattern: b1[8, 8] = attribute",
        "%0: f32[2, 8, 2, 4] = accelkit.sparse_attention(%q, %k, %v, %attention_pattern, 0.5)",
        "return (%0)",
    ]
    assert torch.equal(graph.attention_pattern, AXIAL.mask(8))


def test_attentions_of_one_length_share_a_mask() -> None:
    graph = graph_of(lambda self, q, k, v: attention(attention(q, k, v), k, v), *operands())
    assert len(apply(SwapAttention(Random(0.5)), graph).rewrites) == 2
    assert [name for name, _ in graph.named_buffers()] == ["attention_pattern"]


CASES: list[tuple[Any, list[Tensor], Pattern, str]] = [
    (lambda self, q, k, v: attention(q, k, v, causal=True), operands(), AXIAL, "its own mask says who attends to whom"),
    (
        lambda self, q, k, v: attention(q, k, v, torch.ones(8, dtype=torch.bool)), operands(), AXIAL,
        "its own mask says who attends to whom",
    ),
    (lambda self, q, k, v: attention(q, k, v), operands(8, 6), AXIAL, "among the same tokens, not from 8 to 6"),
    (
        lambda self, q, k, v: attention(q, k, v), operands(9), AXIAL,
        "the pattern does not fit: it is for 8 tokens (2 x 4), not 9",
    ),
    (
        lambda self, q, k, v: nn.functional.scaled_dot_product_attention(q, k, v), operands(), AXIAL,
        "recognise_attention has to run before",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "inputs", "pattern", "reason"), CASES)
def test_left_alone(function: Any, inputs: list[Tensor], pattern: Pattern, reason: str) -> None:
    graph = graph_of(function, *inputs)
    before = graph_text(graph)
    (found,) = reasons(SwapAttention(pattern), graph)
    assert reason in found
    assert graph_text(graph) == before


def test_a_dynamic_length_is_refused() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return attention(q, q, q)

    graph = trace(Attention(), operands()[0], dynamic_shapes={"q": {1: accelkit.Dim("length", max=64)}})
    before = guards(graph)
    (found,) = reasons(SwapAttention(Random(0.5)), graph)
    assert "a pattern is made for one length, and this one's is dynamic" in found
    assert guards(graph) == before


def test_second_run_finds_nothing_and_the_batch_stays_dynamic() -> None:
    graph = graph_of(lambda self, q, k, v: attention(q, k, v), *operands(), batch=True)
    before = guards(graph)
    assert apply(SwapAttention(AXIAL), graph).rewrites
    assert apply(SwapAttention(AXIAL), graph).rewrites == ()
    assert guards(graph) == before
    result = run(graph, *(given := operands(batch=5)))[0]
    assert torch.equal(result, attention(*given, AXIAL.mask(8)))


@quick
@given(
    length=st.integers(1, 12), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_numbers(length: int, seed: int, dtype: torch.dtype) -> None:
    """Bit for bit what attention with the mask gives on a CPU; a tensor is a pattern too."""
    torch.manual_seed(seed)
    inputs, mask = operands(length, dtype=dtype), torch.rand(length, length) < 0.5
    graph = graph_of(lambda self, q, k, v: attention(q, k, v), *inputs)
    assert apply(SwapAttention(mask), graph).rewrites
    assert torch.equal(run(graph, *inputs)[0], attention(*inputs, mask))


def test_values() -> None:
    mask = AXIAL.mask(8)
    assert SwapAttention(mask) == SwapAttention(Custom(mask))
    assert str(SwapAttention(AXIAL | GlobalTokens(1))) == (
        "swap_attention(kind=Axial2D(height=2, width=4) | GlobalTokens(tokens=1))"
    )
    with pytest.raises(InputError, match="boolean tensor"):
        SwapAttention(mask.float())
    assert SwapAttention("math").changes_meaning is None


# --- through optimize


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


class Masked(nn.Module):
    """The encoder with the pattern as its mask: what the swap has to compute."""

    def __init__(self, model: nn.Module, pattern: Pattern) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("forbidden", ~pattern.mask(9))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x, mask=self.forbidden)
        return result


@pytest.mark.filterwarnings("ignore::accelkit.AccelkitWarning")
@pytest.mark.parametrize(("target", "precision"), [("fastertransformer", "bf16"), ("eager", "fp32")])
def test_a_model_on_request(target: str, precision: str, tmp_path: Path) -> None:
    model, pattern, x = encoder(), Local2D(2, 4, distance=2, prefix=1) | Random(0.9), torch.randn(3, 9, 32)
    passes = default_passes(precision, attention=pattern)
    fast = accelkit.optimize(model, x, target=target, precision=precision, passes=passes, cache=False)
    with torch.no_grad():
        expected = Masked(model, pattern)(x)
        assert relative_error(fast(x), expected) < (1e-5 if precision == "fp32" else 2e-2)
        assert relative_error(expected, model(x)) > 5e-2
    notes = fast.report().variants[0].notes
    assert f"{passes[-4]} changes what the model computes, as asked: tokens attend" in notes[0]
    assert "inputs that no engine covers run on the model as it was" in notes[0]
    assert any(
        n.startswith("errors are against a float64 run of the graph after swap_attention; its distance") for n in notes
    )
    fast.save(tmp_path / "sparse.accel")
    assert torch.equal(accelkit.load(tmp_path / "sparse.accel", cache=False)(x), fast(x))


def test_without_a_request_nothing_is_swapped() -> None:
    assert "swap_attention" not in [p.name for p in default_passes()]
    names = [p.name for p in default_passes(attention="math", remove_padding=True)]
    assert names.index("merge_qkv") < names.index("swap_attention") < names.index("remove_padding")
