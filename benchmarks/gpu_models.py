"""The models of the GPU benchmarks: accelkit's own, the ones that published tables were taken on, and tiny stand-ins.

subject("vit-b16-384").make_inputs(8)          # as in accelkit.models
subject("bert-base-128-padded")                # lengths whose mean is 40 % of 128
subject("vit-b16-384", tiny=True)              # two layers of width 64, for a look whether all works
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from accelkit.models import BERT_LENGTH, MODELS, SEED, EncoderBlock, Inputs, ModelSpec

PADDED_MEAN = 0.4
"""Mean length of the padded batches, as a share of the longest."""


def subject(name: str, tiny: bool = False) -> ModelSpec:
    """A model by name, or the tiny stand-in of its kind."""
    if tiny:
        return _TINY[name.partition("-")[0] + ("-padded" if name.endswith("padded") else "")]
    return _EXTRA[name] if name in _EXTRA else MODELS[name]


def lengths(batch: int, longest: int = BERT_LENGTH, mean: float = PADDED_MEAN) -> list[int]:
    """Sequence lengths, the same ones at every call: uniform, then moved by single tokens until the mean is met."""
    generator = torch.Generator().manual_seed(SEED + batch)
    upper = min(longest, round(2 * mean * longest))
    drawn: list[int] = torch.randint(1, upper + 1, (batch,), generator=generator).tolist()
    wanted = max(batch, round(mean * longest * batch))
    while (off := wanted - sum(drawn)) != 0:
        step = 1 if off > 0 else -1
        index = int(torch.randint(batch, (1,), generator=generator))
        if 1 <= drawn[index] + step <= longest:
            drawn[index] += step
    return drawn


def padded_inputs(batch: int, longest: int = BERT_LENGTH, vocabulary: tuple[int, int] = (1000, 30000)) -> Inputs:
    """Token ids followed by padding (0), and the mask that says so; each [batch, longest], int64."""
    generator = torch.Generator().manual_seed(SEED + batch)
    ids = torch.randint(*vocabulary, (batch, longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths(batch, longest)).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make().eval()
        with torch.no_grad():  # biases and norms off their zeros and ones: a fusion that loses one shows as an error
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _vit(
    image: int, width: int, layers: int, heads: int, inside: int, bias: bool = True, labels: int = 1000
) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image, patch_size=16, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inside, qkv_bias=bias, num_labels=labels, attn_implementation="sdpa",
    )  # fmt: skip
    return _seeded(lambda: ViTForImageClassification(config))


def _vit_spec(description: str, image: int, **sizes: Any) -> ModelSpec:
    return ModelSpec(description, functools.partial(_vit, image, **sizes), functools.partial(_images, image))


def _images(image: int, batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, image, image, generator=torch.Generator().manual_seed(SEED + batch))}


def _tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(**sizes, vocab_size=100, max_position_embeddings=_TINY_LENGTH, attn_implementation="sdpa")
    return _seeded(lambda: BertModel(config))


def _tiny_full_rows(batch: int) -> Inputs:
    ids = torch.randint(1, 100, (batch, _TINY_LENGTH), generator=torch.Generator().manual_seed(SEED + batch))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_TINY_LENGTH = 16

_EXTRA = {
    "vit-xformers-96": _vit_spec(
        "the small ViT of the xFormers table: 224 x 224, patches of 16, 96 wide, 8 layers, 8 heads; random weights",
        224, width=96, layers=8, heads=8, inside=288, bias=False,
    ),
    "vit-b16-1024": _vit_spec(
        "ViT-B/16 at 1024 x 1024: 4097 tokens; random weights", 1024, width=768, layers=12, heads=12, inside=3072
    ),
    "bert-base-128-padded": ModelSpec(
        "BERT-base, rows of 128 tokens of which 40 % are text, the rest padding; random weights",
        MODELS["bert-base-128"].make, padded_inputs,
    ),
}  # fmt: skip

_TINY = {
    "vit": _vit_spec("a tiny ViT", 32, width=64, layers=2, heads=4, inside=128, labels=10),
    "bert": ModelSpec("a tiny BERT", _tiny_bert, _tiny_full_rows),
    "bert-padded": ModelSpec(
        "a tiny BERT, padded", _tiny_bert, functools.partial(padded_inputs, longest=_TINY_LENGTH, vocabulary=(1, 100))
    ),
    "encoder": ModelSpec(
        "a tiny encoder block", lambda: _seeded(lambda: EncoderBlock(64, 4, 128)),
        lambda batch: (torch.randn(batch, 9, 64, generator=torch.Generator().manual_seed(SEED + batch)),),
    ),
}  # fmt: skip
