"""Masks in their simplest form: what keeps keys, what is added, what says nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_modules import attentions
from pass_checks import graph_of
from torch import Tensor

from accelkit.pass_runner import run_passes
from accelkit.testing import apply, relative_error, run
from accelkit_passes.canonicalise import Canonicalise
from accelkit_passes.fold_constants import FoldConstants
from accelkit_passes.recognise_attention import RecogniseAttention

B, H, L, S, D = 2, 3, 4, 5, 8
LOW = torch.finfo(torch.float32).min
INF = float("-inf")

Mask = Callable[[Tensor, Tensor], Tensor]
KEYS, ALL, SCORES = "bool[2, 1, 1, 5]", "bool[2, 1, 4, 5]", "float32[2, 3, 4, 5]"

# name: (what is added to the scores, from a boolean [B, S] of keys and a [B, H, L, S] bias; the mask that is left)
ADDED: dict[str, tuple[Mask, str]] = {
    "where": (lambda keep, bias: torch.where(keep[:, None, None], 0.0, LOW), KEYS),
    "where the other way round": (lambda keep, bias: torch.where(~keep[:, None, None], LOW, 0.0), KEYS),
    "zeros filled": (lambda keep, bias: torch.zeros(B, 1, 1, S).masked_fill(~keep[:, None, None], INF), KEYS),
    "twice inverted": (lambda keep, bias: (1 - (1 - (1 - keep[:, None, None].float()))) * -1e9, KEYS),
    "or of what is out": (lambda keep, bias: torch.zeros(1).masked_fill(~keep[:, None, None] | ~keep[:, None, None], LOW), KEYS),
    "expanded": (lambda keep, bias: torch.where(keep[:, None, None].expand(B, H, L, S), 0.0, LOW), KEYS),
    "two of them": (lambda keep, bias: torch.where(keep[:, None, None], 0.0, LOW) + torch.where(bias[:, :1] > 0, 0.0, LOW), ALL),
    "where, of a bias": (lambda keep, bias: torch.where(keep[:, None, None], bias, LOW), SCORES),
    "a bias": (lambda keep, bias: bias, SCORES),
    "a bias per head": (lambda keep, bias: bias[:1, :, :1], "float32[1, 3, 1, 5]"),
    "half of a bias": (lambda keep, bias: bias * 0.5, SCORES),
    "a bias and nothing": (lambda keep, bias: bias + torch.zeros(L, S), SCORES),
    "integers": (lambda keep, bias: (bias * 9).long(), SCORES),
    "a number a query": (lambda keep, bias: bias[..., :1] * 3, "none"),
    "a flag a query": (lambda keep, bias: (bias[..., :1] > 0).expand(B, H, L, S), "none"),
    "nothing": (lambda keep, bias: torch.zeros(L, S), "none"),
    "full of nothing": (lambda keep, bias: keep.new_full((L, S), 0.0, dtype=torch.float32), "none"),
    "-100 is no mask": (lambda keep, bias: (1 - keep[:, None, None].float()) * -100, "float32[2, 1, 1, 5]"),
    "causal": (lambda keep, bias: torch.full((L, S), INF).triu(1), "causal"),
    "causal for every row": (lambda keep, bias: torch.full((L, S), LOW).triu(1).expand(B, 1, L, S), "causal"),
    "causal and keys": (
        lambda keep, bias: torch.where(keep[:, None, None] & torch.ones(L, S).tril().bool(), 0.0, LOW),
        "causal " + KEYS,
    ),
    "not quite causal": (lambda keep, bias: torch.full((L, S), INF).triu(2), "float32[1, 1, 4, 5]"),
    "ones": (lambda keep, bias: torch.where(keep[:, None, None] & torch.ones(L, S, dtype=torch.bool), 0.0, LOW), KEYS),
    "ones of the inputs' size": (
        lambda keep, bias: torch.where(keep[:, None, None] & torch.ones_like(bias[:, :1], dtype=torch.bool), 0.0, LOW),
        KEYS,
    ),
    "looked up": (
        lambda keep, bias: torch.where(keep[torch.arange(B)[:, None, None, None], torch.arange(S)], 0.0, LOW),
        KEYS,
    ),
    "looked up backwards": (
        lambda keep, bias: torch.where(keep[torch.arange(B)[:, None, None, None], torch.arange(S).flip(0)], 0.0, LOW),
        KEYS,
    ),
}  # fmt: skip


def left(added: Mask) -> tuple[str, list[str]]:
    """The mask of the fused attention after the numbers were compared, and the operators that make it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, L, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    keep = torch.tensor([[True] * S, [True] * 3 + [False] * 2])
    inputs = (q, k, v, keep, torch.randn(B, H, L, S))
    graph = graph_of(lambda self, q, k, v, keep, bias: (q @ k.mT + added(keep, bias)).softmax(-1) @ v, *inputs)
    run_passes(graph, [Canonicalise(), FoldConstants()])
    before = run(graph, *inputs)[0]
    assert len(apply(RecogniseAttention(), graph).rewrites) == 1
    after = run(graph, *inputs)[0]
    rows = ~before.isnan().any(-1)
    assert rows.any()
    assert relative_error(after[rows], before[rows]) < 1e-6
    (attention,) = attentions(graph)
    mask, causal = (*attention.args[3:5],)
    text = "none" if mask is None else f"{str(mask.meta['val'].dtype)[6:]}{list(mask.meta['val'].shape)}"
    operators = [node.target.__name__.partition(".")[0] for node in graph.graph.nodes if node.op == "call_function"]
    return text if not causal else "causal" if mask is None else f"causal {text}", operators


@pytest.mark.parametrize("name", ADDED)
def test_added_to_the_scores(name: str) -> None:
    added, expected = ADDED[name]
    assert left(added)[0] == expected


def test_looking_up_becomes_a_view_only_where_it_is_one() -> None:
    assert "index" not in left(ADDED["looked up"][0])[1]
    assert "index" in left(ADDED["looked up backwards"][0])[1]
