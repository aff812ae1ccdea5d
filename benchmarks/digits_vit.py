"""A vision transformer for scikit-learn's digits: 8 x 8 images, 10 classes, trained in minutes on one core; plain PyTorch.

    python benchmarks/digits_vit.py                    trains it, or says what the kept one reaches
    model, data = load()                               trained weights are kept outside of the repository, by their settings

It stands for the ViTs of FasterTransformer's INT8 tables where neither their weights nor ImageNet can be had: layers
normalise first, a class token goes in front of the patches, GELU between the linear layers.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

CLASSES, SIDE = 10, 8


@dataclass(frozen=True)
class Settings:
    """What decides the weights, but for the machine's rounding.

    Attributes:
        held_out: images that training never sees; 500 of 1797, so that one is 0.2 points.
        shift: images are moved by up to that many pixels, and turned and scaled a little, while training.
        average: of weights over steps (exponential); what is kept are the averages.
    """

    width: int = 128
    layers: int = 6
    heads: int = 4
    patch: int = 2
    epochs: int = 30
    batch: int = 32
    rate: float = 1e-3
    decay: float = 0.05
    shift: float = 0.5
    turn: float = 0.1
    average: float = 0.98
    held_out: int = 500
    seed: int = 0

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Digits:
    """Images [count, 1, 8, 8] from -1 to 1 and their classes [count]; the held-out ones were in no training step."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value)
        result: torch.Tensor = self.out(attended.transpose(1, 2).reshape(x.shape))
        return result


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_before, self.norm_after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_before(x))
        return x + self.down(F.gelu(self.up(self.norm_after(x))))


class DigitsVit(nn.Module):
    """Images [batch, 1, 8, 8] in, scores [batch, 10] out."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        s = settings or Settings()
        self.patches = nn.Conv2d(1, s.width, s.patch, s.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, s.width))
        self.positions = nn.Parameter(0.5 * torch.randn(1, 1 + (SIDE // s.patch) ** 2, s.width))
        self.layers = nn.ModuleList(Layer(s.width, s.heads) for _ in range(s.layers))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        scores: torch.Tensor = self.head(self.norm(x)[:, 0])
        return scores


def digits(settings: Settings | None = None) -> Digits:
    """The data set, split once by the settings' seed."""
    from sklearn.datasets import load_digits

    s, raw = settings or Settings(), load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(s.seed))
    train, test = order[s.held_out :], order[: s.held_out]
    return Digits(images[train], labels[train], images[test], labels[test])


def moved(images: torch.Tensor, s: Settings, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted, turned and scaled a little, at random."""
    count = len(images)
    angle, scale = (torch.randn(count, generator=generator) * s.turn for _ in range(2))
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * s.shift * 2 / SIDE
    cos, sin = angle.cos() * (1 + scale / 2), angle.sin() * (1 + scale / 2)
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # what comes in from outside is background
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def batches(data: Digits, s: Settings, epochs: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training batches, moved at random; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for rows in order.split(s.batch):
            if len(rows) == s.batch:
                yield moved(data.images[rows], s, generator), data.labels[rows]


def accuracy(model: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of the images whose class is the highest score."""
    with torch.no_grad():
        return 100.0 * float((model(images).argmax(1) == labels).double().mean())


def train(s: Settings, data: Digits) -> DigitsVit:
    """One run; AdamW with a warm-up and a cosine. The held-out images choose nothing: the last weights are the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        model = DigitsVit(s)
    averaged = copy.deepcopy(model).eval()
    steps = s.epochs * (len(data.labels) // s.batch)
    optimiser = torch.optim.AdamW(model.parameters(), s.rate, weight_decay=s.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, s.rate, total_steps=steps, pct_start=0.1)
    for images, labels in batches(data, s, s.epochs, s.seed + 1):
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - s.average)
    return averaged


def cache_folder() -> Path:
    """Where weights are kept: $ACCELKIT_BENCHMARK_CACHE, else a folder beside other caches of the user."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accelkit-benchmarks"
    return Path(os.environ.get("ACCELKIT_BENCHMARK_CACHE") or default)


def load(settings: Settings | None = None) -> tuple[DigitsVit, Digits]:
    """The trained model in eval mode, trained now where no weights of these settings are kept, and its data."""
    s = settings or Settings()
    data, path = digits(s), cache_folder() / f"digits-vit-{s.digest}.pt"
    model = DigitsVit(s).eval()
    if not path.exists():
        weights = train(s, data).state_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model, data


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    started = time.perf_counter()
    model, data = load()
    seconds = time.perf_counter() - started
    held_out = accuracy(model, data.held_out_images, data.held_out_labels)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(data.labels)} images for training: {held_out:.2f} % of {len(data.held_out_labels)} "
          f"held-out images, after {seconds:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
