"""Decoders without a cache, and encoder-decoders fed their decoder's inputs."""

from __future__ import annotations

from typing import Any

from .case import BOTH, ONE, Attention, Case, transformers_cases
from .inputs import MakeInputs, ids, normal, tensors, text

LLAMA: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 98,
    "use_cache": False,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 1,
    "bos_token_id": 2, "eos_token_id": 98, "use_cache": False,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 98, "decoder_start_token_id": 2, "use_cache": False,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "relative_attention_num_buckets": 8, "pad_token_id": 1, "eos_token_id": 98, "decoder_start_token_id": 2,
    "use_cache": False,
}  # fmt: skip


def cases() -> dict[str, Case]:
    """Name -> Case; nothing is built yet."""
    found: dict[str, Case] = {}
    prompt = text()
    windowed = text(shortest=8)  # no padding row whose window of 6 holds padding only: that is one of HARD's
    pair = text(extra={"decoder_input_ids": ids(6)})

    def add(
        name: str,
        class_name: str,
        make_inputs: MakeInputs,
        attention: Attention = ONE,
        kind: str = "decoder",
        **options: Any,
    ) -> None:
        found.update(transformers_cases(kind, name, class_name, make_inputs, attention, **options))

    add("gpt2", "GPT2LMHeadModel", prompt, BOTH, **GPT2)
    add("gptj", "GPTJModel", prompt, rotary_dim=4, **GPT2)
    add("codegen", "CodeGenModel", prompt, rotary_dim=4, **GPT2)
    add(
        "gpt-neo",
        "GPTNeoModel",
        windowed,
        **LLAMA,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
    )
    add("gpt-bigcode", "GPTBigCodeModel", prompt, **GPT2)
    add("gpt-neox", "GPTNeoXForCausalLM", prompt, BOTH, **LLAMA)
    add("llama", "LlamaForCausalLM", prompt, BOTH, **LLAMA)
    add("mistral", "MistralModel", windowed, BOTH, sliding_window=6, **LLAMA)
    add("qwen2", "Qwen2Model", prompt, BOTH, **LLAMA)
    add("qwen3", "Qwen3Model", prompt, head_dim=8, **LLAMA)
    add("gemma", "GemmaModel", prompt, BOTH, head_dim=8, **LLAMA)
    add(
        "gemma2",
        "Gemma2Model",
        windowed,
        attention=("eager",),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        **LLAMA,
    )
    add("gemma3-text", "Gemma3TextModel", windowed, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, **LLAMA)
    add("opt", "OPTModel", prompt, BOTH, ffn_dim=64, word_embed_proj_dim=32, **LLAMA)
    add(
        "bloom",
        "BloomModel",
        prompt,
        vocab_size=99,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        pad_token_id=1,
        use_cache=False,
    )
    add("phi", "PhiModel", prompt, BOTH, **LLAMA)
    add("phi3", "Phi3Model", prompt, **LLAMA)
    add("falcon", "FalconModel", prompt, BOTH, alibi=False, new_decoder_architecture=True, num_kv_heads=2, **LLAMA)
    add("stablelm", "StableLmModel", prompt, **LLAMA)
    add("olmo", "OlmoModel", prompt, **LLAMA)
    add("olmo2", "Olmo2Model", prompt, **LLAMA)
    add("cohere", "CohereModel", prompt, **LLAMA)
    add("granite", "GraniteModel", prompt, **LLAMA)
    add("starcoder2", "Starcoder2Model", prompt, **LLAMA)
    add("biogpt", "BioGptModel", prompt, **LLAMA)
    add("xglm", "XGLMModel", prompt, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, **LLAMA)
    add("persimmon", "PersimmonModel", prompt, **LLAMA)
    add("nemotron", "NemotronModel", prompt, **LLAMA)
    add("helium", "HeliumModel", prompt, head_dim=8, **LLAMA)
    add("openai-gpt", "OpenAIGPTModel", prompt, **{k: v for k, v in GPT2.items() if k != "use_cache"})
    add("ctrl", "CTRLModel", prompt, **GPT2, dff=64)
    add(
        "mpt",
        "MptModel",
        prompt,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        expansion_ratio=2,
        vocab_size=99,
        use_cache=False,
    )
    seq = "encoder-decoder"
    add("t5", "T5ForConditionalGeneration", pair, kind=seq, **T5)
    add("t5-encoder", "T5EncoderModel", text(), kind=seq, **T5)
    add("mt5", "MT5Model", pair, kind=seq, **T5)
    add("umt5", "UMT5Model", pair, kind=seq, **T5)
    add("bart", "BartModel", pair, BOTH, kind=seq, **BART)
    add("mbart", "MBartModel", pair, kind=seq, **BART)
    add("pegasus", "PegasusModel", pair, kind=seq, **BART)
    add("marian", "MarianModel", pair, kind=seq, **BART)
    add("m2m100", "M2M100Model", pair, kind=seq, **BART)
    add("blenderbot", "BlenderbotModel", pair, kind=seq, **BART)
    add("plbart", "PLBartModel", pair, kind=seq, **BART)
    add(
        "whisper",
        "WhisperModel",
        tensors(input_features=normal(16, 24), decoder_input_ids=ids(6)),
        kind=seq,
        **BART,
        num_mel_bins=16,
        max_source_positions=12,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return found
