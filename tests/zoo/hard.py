"""Models that plain torch.export, or plain torch.onnx.export with ONNX Runtime, refuses or gets wrong.

Seen with torch 2.13, transformers 5.23, onnxruntime 1.31, on a CPU, exported at batch 3 with a dynamic batch dimension.
Whoever handles one of them has done better than the plain path; whoever cannot has to say so rather than be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .case import Case, batch_first, transformers_model
from .decoders import GPT2, LLAMA
from .inputs import MakeInputs, image, text
from .text import TINY
from .vision import VIT


@dataclass(frozen=True)
class HardCase(Case):
    """A Case that the plain path fails at `fails_at`, for this `reason`.

    `fails_at` is "export" (torch.export raises), "program" (the exported program raises when it is called), "onnx"
    (torch.onnx.export raises, or ONNX Runtime on loading what it gave) or "numbers" (ONNX Runtime's answer is silently
    wrong).
    """

    fails_at: str = ""
    reason: str = ""


EMPTY_ROWS = (
    "padding rows have nothing to attend to: scaled_dot_product_attention gives 0 where a row's mask is all False; "
    "the ONNX export (below opset 23, which has an Attention operator) masks with the smallest float instead of -inf, "
    "and gives the average of all values"
)
DATA_DEPENDENT = "its Python code branches on values of the mask, which a graph cannot hold"


def cases() -> dict[str, HardCase]:
    """Name -> HardCase; nothing is built yet."""
    found: dict[str, HardCase] = {}

    def add(
        name: str,
        class_name: str,
        make_inputs: MakeInputs,
        fails_at: str,
        reason: str,
        attention: str = "",
        **options: Any,
    ) -> None:
        model = transformers_model(class_name, attention, **options)
        found[name] = HardCase("hard", model, make_inputs, batch_first(make_inputs), attention, "", fails_at, reason)

    add(
        "falcon-alibi", "FalconModel", text(), "onnx",
        "computes its ALiBi in bfloat16; CPU sessions have no Mul for that", alibi=True, multi_query=False, **LLAMA,
    )  # fmt: skip
    add(
        "mixtral", "MixtralModel", text(), "onnx", "no ONNX form for transformers::grouped_mm_fallback, its experts",
        num_local_experts=4, **LLAMA,
    )  # fmt: skip
    prompt = text(left=True)
    add("gpt2-left-sdpa", "GPT2LMHeadModel", prompt, "numbers", EMPTY_ROWS, "sdpa", **GPT2)
    add("llama-left-sdpa", "LlamaForCausalLM", prompt, "numbers", EMPTY_ROWS, "sdpa", **LLAMA)
    add("mistral-left-sdpa", "MistralModel", prompt, "numbers", EMPTY_ROWS, "sdpa", sliding_window=6, **LLAMA)
    add(
        "modernbert-window-sdpa", "ModernBertModel", text(), "numbers", EMPTY_ROWS, "sdpa",
        global_attn_every_n_layers=2, local_attention=6, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
        **TINY,
    )  # fmt: skip
    add(
        "bit", "BitModel", image(), "numbers",
        "ONNX Runtime's Pad_Fusion moves a padding with zeros into MaxPool, which pads with -inf",
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4,
    )  # fmt: skip
    add(
        "data2vec-vision-sdpa", "Data2VecVisionModel", image(), "program",
        "attention with an additive mask comes out in another memory layout than the fake tensors say: `contiguous()` "
        "was dropped at capture as doing nothing, and the `view` after it fails",
        "sdpa", use_relative_position_bias=True, **VIT,
    )  # fmt: skip
    add(
        "xlnet", "XLNetModel", text(types=True), "onnx", "the exporter finds no overload for `1.0 - mask`",
        **{**TINY, "max_position_embeddings": None}, d_model=32, n_layer=2, n_head=4, d_inner=64,
    )  # fmt: skip
    add(
        "nystromformer-landmarks", "NystromformerModel", text(mask=False), "export",
        "transformers expands the mask to [batch, 1, length, length] and adds it to scores of [landmarks, length]; "
        "eagerly it works without a mask only, and a capture makes the mask explicit",
        **TINY, num_landmarks=4, segment_means_seq_len=12, conv_kernel_size=5,
    )  # fmt: skip
    add("longformer", "LongformerModel", text(16), "export", DATA_DEPENDENT, **TINY, attention_window=[8, 8])
    return found
