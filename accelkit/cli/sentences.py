"""A real sentence encoder on real text: all-MiniLM-L6-v2 and 64 English sentences of 3 to 58 words.

    token vectors -> mean over the tokens that are not padding -> length 1

That is the pooling its model card gives (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2). The
sentences, in demo_sentences.txt, were written for accelkit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import nn

import accelkit

MAX_BATCH, MAX_LENGTH = 64, 256
TensorDict = dict[str, torch.Tensor]


class SentenceEncoder(nn.Module):
    """A transformers encoder with mean pooling: token ids -> unit vectors, [batch, width].

    `input_ids`, `attention_mask` and `token_type_ids` are [batch, length], as a tokenizer gives them.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        tokens = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        counted = attention_mask.unsqueeze(-1).to(tokens.dtype)
        mean = (tokens * counted).sum(1) / counted.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=1)


def load_sentences() -> list[str]:
    """The demo's sentences."""
    return files("accelkit.cli").joinpath("demo_sentences.txt").read_text(encoding="utf-8").splitlines()


def load_encoder() -> tuple[SentenceEncoder, Callable[[Sequence[str]], TensorDict]]:
    """The encoder with its real weights, and what turns sentences into its inputs.

    Raises:
        InputError: a package is missing; the message has the pip install.
    """
    from accelkit.models import load_minilm_tokenizer, load_model

    tokenizer = load_minilm_tokenizer()
    model, _ = load_model("minilm")

    def tokenize(sentences: Sequence[str]) -> TensorDict:
        return dict(tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt"))

    return SentenceEncoder(model).eval(), tokenize


def dynamic_shapes() -> dict[str, dict[int, accelkit.Dim]]:
    """Batch and length vary, so that every call below runs on what was compiled."""
    dims = {0: accelkit.Dim("batch", max=MAX_BATCH), 1: accelkit.Dim("length", min=2, max=MAX_LENGTH)}
    return {name: dict(dims) for name in ("input_ids", "attention_mask", "token_type_ids")}


def batches(sentences: Sequence[str], tokenize: Callable[[Sequence[str]], TensorDict], size: int) -> list[TensorDict]:
    """Tokenised batches in the sentences' order; each is padded to its own longest sentence."""
    return [tokenize(sentences[start : start + size]) for start in range(0, len(sentences), size)]


def embed(model: Callable[..., Any], inputs: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """Embeddings of all batches, [sentences, width]."""
    with torch.no_grad():
        return torch.cat([model(**batch) for batch in inputs])


def nearest(embeddings: torch.Tensor, count: int = 3) -> torch.Tensor:
    """For each sentence the `count` others of largest cosine similarity, nearest first: indices, [sentences, count]."""
    similarity = embeddings.double() @ embeddings.double().T
    similarity.fill_diagonal_(-2.0)  # below every cosine: a sentence is not its own neighbour
    return similarity.topk(count, dim=1).indices


def share_of_equal_neighbours(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of all neighbours in `a`, the share that `b` has for the same sentence, in whatever order."""
    found = (a.unsqueeze(2) == b.unsqueeze(1)).any(2)
    return float(found.double().mean())
