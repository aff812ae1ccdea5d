"""Small models in every form that users bring: one attention a layer, no transposed copy left, the same numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_modules import (
    BEFORE,
    HEAD,
    HEADS,
    LENGTH,
    PASSES,
    WIDTH,
    Jeonsworld,
    Layers,
    MultiheadAttention,
    SelfAttention,
    Timm,
    attentions,
    moves_data,
    repeat_kv,
    torch_encoder,
)
from torch import Tensor, nn
from torch.nn import functional as F

from accelkit.pass_runner import run_passes
from accelkit.testing import float64_reference, relative_error, run, trace
from accelkit_passes.set_precision import SetPrecision

SCALE = HEAD**-0.5


def padding() -> Tensor:
    """[batch, keys], True where there is a token."""
    return torch.arange(LENGTH)[None, :] < torch.tensor([[LENGTH], [LENGTH - 3]])


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * SCALE
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * SCALE**0.5) @ (k * SCALE**0.5).transpose(-1, -2), -1) @ v


def scale_by_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q / torch.sqrt(torch.tensor(float(HEAD))) @ k.transpose(-1, -2), -1) @ v


def float32_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(2, 3) * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(F.softmax(scores, 2), v).view(-1, HEADS, *q.shape[1:])


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.einsum("bkhd,bqhd->bhqk", k, q).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    return scores.masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    lowest = torch.tensor(torch.finfo(scores.dtype).min)
    return torch.where(keep[:, None, None, :], scores, lowest).softmax(-1) @ v


def bert_before_finfo(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    extended = keep[:, None, None, :].to(q.dtype)
    return written_out(q, k, v, (1.0 - extended) * -10000.0)


def expanded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    inverted = 1.0 - keep[:, None, None, :].expand(-1, 1, LENGTH, -1).to(q.dtype)
    mask = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(q.dtype).min)
    return written_out(q, k, v, mask)


def sdpa_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, keep[:, None, None, :] & allowed)


def causal_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written_out(q, k, v, torch.full((LENGTH, LENGTH), float("-inf")).triu(1))


def position_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return written_out(q, k, v, bias)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    return written_out(q, repeat_kv(k, times), repeat_kv(v, times))


def grouped_by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return by_sdpa(q, *(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v)))


def own(core: Callable[..., Tensor], key_heads: int = HEADS) -> Callable[[], nn.Module]:
    return lambda: Layers(functools.partial(SelfAttention, core, key_heads))


def in_two(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Layers(make)


class Bert(nn.Module):
    """transformers' BERT, which makes its masks itself."""

    def __init__(self, kind: str, mask: bool) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=64,
            max_position_embeddings=32, attn_implementation=kind,
        )  # fmt: skip
        self.bert, self.mask = transformers.BertModel(config, add_pooling_layer=False), mask

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = keep.long() if self.mask else None
        return self.bert(inputs_embeds=x, attention_mask=mask).last_hidden_state


NONE, KEYS = "none", "bool[2, 1, 1, 10]"
# name: (model, further inputs, the mask that is left, heads of the keys)
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], str]] = {
    "sdpa": (own(by_sdpa), tuple, NONE),
    "matmul": (own(written_out), tuple, NONE),
    "scale on q and k": (own(scale_on_both), tuple, NONE),
    "scale a constant": (own(scale_by_constant), tuple, NONE),
    "softmax in float32": (own(float32_softmax), tuple, NONE),
    "bmm": (own(batched), tuple, NONE),
    "einsum": (own(einsum), tuple, NONE),
    "masked_fill": (own(filled), lambda: (padding(),), KEYS),
    "where": (own(chosen), lambda: (padding(),), KEYS),
    "-10000": (own(bert_before_finfo), lambda: (padding(),), KEYS),
    "expanded mask": (own(expanded), lambda: (padding(),), KEYS),
    "sdpa, keys & ones": (own(sdpa_keys), lambda: (padding(),), KEYS),
    "causal constant": (own(causal_buffer), tuple, "causal"),
    "position bias": (own(position_bias), lambda: (torch.randn(1, HEADS, LENGTH, LENGTH),), "float32[1, 4, 10, 10]"),
    "repeat_kv": (own(grouped, 2), tuple, NONE),
    "multi-query": (own(grouped, 1), tuple, NONE),
    "enable_gqa": (own(grouped_by_sdpa, 2), tuple, NONE),
    "repeat_interleave": (own(interleaved, 2), tuple, NONE),
    "jeonsworld": (in_two(Jeonsworld), tuple, NONE),
    "timm fused": (in_two(lambda: Timm(True)), tuple, NONE),
    "timm": (in_two(lambda: Timm(False)), tuple, NONE),
    "MultiheadAttention": (in_two(MultiheadAttention), tuple, NONE),
    "MultiheadAttention, weights asked for": (in_two(lambda: MultiheadAttention(True)), tuple, NONE),
    "MultiheadAttention, padding": (in_two(MultiheadAttention), lambda: (~padding(),), KEYS),
    "MultiheadAttention, padding and weights": (in_two(lambda: MultiheadAttention(True)), lambda: (~padding(),), KEYS),
    "TransformerEncoder": (lambda: torch_encoder(batch_first=True), tuple, NONE),
    "TransformerEncoder, pre-norm": (lambda: torch_encoder(batch_first=True, norm_first=True), tuple, NONE),
    "BERT eager": (lambda: Bert("eager", True), lambda: (padding(),), KEYS),
    "BERT sdpa": (lambda: Bert("sdpa", True), lambda: (padding(),), KEYS),
    "BERT eager without mask": (lambda: Bert("eager", False), lambda: (padding(),), NONE),
    "BERT sdpa without mask": (lambda: Bert("sdpa", False), lambda: (padding(),), NONE),
}


def built(form: str) -> tuple[nn.Module, tuple[Tensor, ...], str]:
    torch.manual_seed(len(form))
    make, others, mask = FORMS[form]
    return make().eval(), (torch.randn(2, LENGTH, WIDTH), *others()), mask


def mask_of(node: Any) -> str:
    mask, causal = (*node.args, None, False)[3:5] if len(node.args) < 5 else node.args[3:5]
    if mask is None:
        return "causal" if causal else NONE
    value = mask.meta["val"]
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


@pytest.mark.parametrize("form", FORMS)
def test_form(form: str) -> None:
    model, inputs, mask = built(form)
    graph = trace(model, *inputs)
    before = run(graph, *inputs)[0]
    run_passes(graph, PASSES)
    fused = attentions(graph)
    assert len(fused) == 2
    assert {mask_of(node) for node in fused} == {mask}
    assert moves_data(graph) == []
    truth = float64_reference(model, *inputs)[0]
    error, allowed = (relative_error(y, truth) for y in (run(graph, *inputs)[0], before))
    assert error <= 2 * allowed + 1e-7


@pytest.mark.parametrize("form", ["matmul", "MultiheadAttention, padding", "BERT eager", "timm"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_form_in_half_precision(form: str, precision: str) -> None:
    model, inputs, mask = built(form)
    graph = trace(model, *inputs)
    half = [*BEFORE[:2], SetPrecision(precision=precision), *BEFORE[2:]]
    run_passes(graph, half)
    before = run(graph, *inputs)[0]
    run_passes(graph, PASSES)
    assert {mask_of(node) for node in attentions(graph)} == {mask}
    assert len(attentions(graph)) == 2
    assert moves_data(graph) == []
    truth = float64_reference(model, *inputs)[0]
    assert relative_error(run(graph, *inputs)[0], truth) <= 2 * relative_error(before, truth)


def test_batch_second_keeps_one_copy_a_layer() -> None:
    """The operands are views; the result has to come back to [length, batch]."""
    model = torch_encoder(batch_first=False).eval()
    x = torch.randn(LENGTH, 2, WIDTH)
    graph = trace(model, x)
    before = run(graph, x)[0]
    run_passes(graph, PASSES)
    for node in attentions(graph):
        assert all(not operand.target.__name__.startswith("contiguous") for operand in node.args[:3])
    assert len(attentions(graph)) == 2
    assert relative_error(run(graph, x)[0], before) < 1e-6
