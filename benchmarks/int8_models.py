"""What INT8's accuracy is measured on: a trained ViT and held-out digits; a sentence encoder and real sentences.

digits    percent of the held-out images, points against float32, share of images with float32's class
minilm    cosine of each embedding to float32's, rank correlation of pairwise similarities, nearest neighbours kept
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import digits_vit
import torch
from torch import nn

from accelkit.cli import sentences as texts

BATCHES = 16
"""Of calibration: FasterTransformer's guides take 10 to 20."""
SENTENCE_BATCH = 16


@dataclass(frozen=True)
class Task:
    """A model with data.

    Attributes:
        title: of its tables.
        model: in float32 and eval mode. example: what it is built with. calibration: batches that are not measured on.
        options: of `optimize` and `Calibration.collect`.
        measure: a callable model -> figures by name; the float32 model's own are the base.
        facts: of the data, for the results file.
        distil: training batches for QAT, each (inputs, labels), for a number of passes over the data; None: no QAT row.
        inputs: the names of the model's inputs whose first dimension is the batch, for QAT.
    """

    title: str
    model: nn.Module
    example: Any
    calibration: list[Any]
    measure: Callable[[Callable[..., Any]], dict[str, float]]
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    distil: Callable[[int], Any] | None = None
    inputs: tuple[str, ...] = ()


def digits(settings: digits_vit.Settings | None = None) -> Task:
    """The ViT of digits_vit.py, trained now where no weights are kept; calibrated on training images."""
    s = settings or digits_vit.Settings()
    model, data = digits_vit.load(s)
    images, labels = data.held_out_images, data.held_out_labels
    with torch.no_grad():
        exact = model(images)
    base = digits_vit.accuracy(model, images, labels)

    def measure(quantised: Callable[..., Any]) -> dict[str, float]:
        with torch.no_grad():
            scores = quantised(images)
        percent = 100.0 * float((scores.argmax(1) == labels).double().mean())
        return {
            "accuracy": percent,
            "points": percent - base,
            "same_class": float((scores.argmax(1) == exact.argmax(1)).double().mean()),
            "relative_error": relative(scores, exact),
        }

    facts = {"held_out": len(labels), "trained_on": len(data.labels), "settings": s.digest, "layers": s.layers,
             "width": s.width, "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    title = f"ViT ({s.layers} layers, {s.width} wide) on scikit-learn's digits, {len(labels)} held-out images"
    batches = list(data.images[: BATCHES * s.batch].split(s.batch))
    return Task(
        title,
        model,
        images,
        batches,
        measure,
        {},
        facts,
        lambda n: digits_vit.batches(data, s, n, s.seed + 2),
        ("images",),
    )


def minilm(count: int = 64) -> Task:
    """all-MiniLM-L6-v2 with mean pooling; calibrated on sentences of the Python manual, measured on others and the demo's.

    Args:
        count: sentences of the manual that are measured on, beside the demo's 64.
    """
    model, tokenize = texts.load_encoder()
    manual = manual_sentences()
    random.Random(0).shuffle(manual)
    measured = [*texts.load_sentences(), *manual[:count]]
    seen = manual[count : count + BATCHES * SENTENCE_BATCH]
    inputs, calibration = (texts.batches(some, tokenize, SENTENCE_BATCH) for some in (measured, seen))
    exact = texts.embed(model, inputs)

    def measure(quantised: Callable[..., Any]) -> dict[str, float]:
        return embedding_figures(texts.embed(quantised, inputs), exact)

    title = f"all-MiniLM-L6-v2, embeddings of {len(measured)} sentences"
    facts = {"sentences": len(measured), "calibrated_on": len(seen), "text": digest([*measured, *seen])}
    return Task(title, model, inputs[0], calibration, measure, {"dynamic_shapes": texts.dynamic_shapes()}, facts)


def embedding_figures(found: torch.Tensor, exact: torch.Tensor, neighbours: int = 3) -> dict[str, float]:
    """How alike two sets of embeddings [sentences, width] are."""
    cosine = nn.functional.cosine_similarity(found.double(), exact.double())
    pairs = torch.triu_indices(len(exact), len(exact), 1)
    before, after = ((e.double() @ e.double().T)[pairs[0], pairs[1]] for e in (exact, found))
    first, kept = texts.nearest(exact, 1), texts.nearest(found, 1)
    similarity = exact.double() @ exact.double().T
    given_up = (similarity.gather(1, first) - similarity.gather(1, kept)).squeeze(1)
    many = [texts.nearest(e, neighbours) for e in (exact, found)]
    return {
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "rank_correlation": rank_correlation(before, after),
        "nearest_kept": texts.share_of_equal_neighbours(first, kept),
        "nearest_3_kept": texts.share_of_equal_neighbours(*many),
        "nearest_given_up": float(given_up.max()),
        "relative_error": relative(found, exact),
    }


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's coefficient of two vectors; of equal values the earlier one ranks first."""
    ranks = [v.argsort(stable=True).argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the exact one."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def manual_sentences() -> list[str]:
    """Sentences of the language reference that every Python brings (`help()` reads it), without code and markup."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if paragraph.startswith((" ", "*", "|", "-")) or "::" in paragraph:
                continue
            parts = re.split(r"(?<=[.])\s+(?=[A-Z])", " ".join(paragraph.split()))
            found += [p for p in parts if 5 <= len(p.split()) <= 60 and re.fullmatch(r"[A-Z][^\[\]{}|=\\]*\.", p)]
    return list(dict.fromkeys(found))


def digest(lines: list[str]) -> str:
    """Tells two sets of sentences apart: the manual's are those of the Python that runs."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "minilm": minilm}
