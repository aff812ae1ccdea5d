"""A zoo of small random-weight models: what accelkit must take on every target, and what plain export cannot take.

The contract, for tests:

    from zoo import ZOO

    case = ZOO["bert-sdpa"]
    model, make_inputs = case.build()     # nn.Module in eval mode, float32, CPU; the same weights at every call
    output = model(**make_inputs(3))      # dict of keyword tensors for a batch of 3; the same ones at every call
    case.dynamic                          # {"input_ids": 0, "attention_mask": 0}: input -> index of its batch dimension
    case.fixed_batch                      # "" or why no other batch size can be served; then `dynamic` is {}
    case.kind, case.attention             # "text" ..., "eager" | "sdpa" | ""

* `ZOO`: plain torch.export and torch.onnx.export with ONNX Runtime handle every one, captured at batch 3 and called at
  batches 1, 2, 3 and 5, with a relative error of at most 1e-5 against eager. accelkit must handle no fewer.
* `MORE`: handled as well, but close relatives of what is in ZOO, or slow to export; for an occasional longer run.
* `HARD`: name -> HardCase, which the plain path refuses or gets wrong, with `fails_at` and `reason`.

A test of all: `@pytest.mark.parametrize("name", ZOO)`. Nothing is built, nor transformers imported, before `build()`.
Eager float32 is within 3e-6 of float64 on all of ZOO, so an error above 1e-5 is not rounding. (In MORE, mra and xglm
cannot run in float64.)
Inputs of text have real padding masks with rows of different lengths. Outputs vary (no NaN, no constant).
"""

from __future__ import annotations

from . import audio, decoders, hard, multimodal, plain, text, vision
from .case import Case
from .hard import HardCase

__all__ = ["HARD", "MORE", "ZOO", "Case", "HardCase"]

_RELATIVES = frozenset({
    "bert-tokens", "bert-answers", "bert-no-mask-eager", "roberta-classifier", "camembert", "xlm-roberta",
    "megatron-bert", "splinter", "rembert", "data2vec-text", "bert-generation", "mra", "yoso", "canine", "funnel",
    "flaubert", "xmod", "tapas", "luke", "eurobert-eager", "gte", "lilt", "electra-eager", "ernie-eager",
    "vit-classifier-eager", "deit-eager", "deit-distilled", "vit-msn", "ijepa", "dinov2-registers",
    "swin-classifier", "donut-swin", "mobilevit", "mobilenet-v1", "pvt-v2", "glpn", "cvt", "vivit", "hubert-eager",
    "unispeech-sat", "data2vec-audio", "wav2vec2-conformer", "sew-d", "clap-audio", "groupvit", "flava",
    "metaclip-2", "blip-text", "lxmert", "owlvit", "layoutlmv3", "altclip", "gptj", "codegen", "phi3", "olmo",
    "olmo2", "granite", "starcoder2", "nemotron", "helium", "persimmon", "stablelm", "openai-gpt", "ctrl", "cohere",
    "xglm", "biogpt", "gpt-bigcode", "mbart", "pegasus", "marian", "m2m100", "blenderbot", "plbart", "mt5", "umt5",
})  # fmt: skip


def _all_cases() -> dict[str, Case]:
    parts = [part.cases() for part in (text, vision, audio, multimodal, decoders, plain)]
    together = {name: case for part in parts for name, case in part.items()}
    if sum(map(len, parts)) != len(together) or _RELATIVES - together.keys():
        raise ValueError(f"two models of one name, or relatives that are none: {_RELATIVES - together.keys()}")
    return together


_ALL = _all_cases()
ZOO: dict[str, Case] = {name: case for name, case in _ALL.items() if name not in _RELATIVES}
MORE: dict[str, Case] = {name: case for name, case in _ALL.items() if name in _RELATIVES}
HARD: dict[str, HardCase] = hard.cases()
