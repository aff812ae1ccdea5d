"""Speech and audio encoders on raw waves or on spectrograms."""

from __future__ import annotations

from typing import Any

from .case import BOTH, ONE, Attention, Case, transformers_cases
from .inputs import MakeInputs, normal, tensors, wave

ENCODER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WAVE: dict[str, Any] = {
    **ENCODER, "conv_dim": (16, 16, 16), "conv_stride": (4, 4, 2), "conv_kernel": (8, 4, 4),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
}  # fmt: skip
STABLE: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def cases() -> dict[str, Case]:
    """Name -> Case; nothing is built yet."""
    found: dict[str, Case] = {}

    def add(name: str, class_name: str, make_inputs: MakeInputs, attention: Attention = ONE, **options: Any) -> None:
        found.update(transformers_cases("audio", name, class_name, make_inputs, attention, **options))

    add("wav2vec2", "Wav2Vec2Model", wave(), BOTH, **WAVE)
    add("wav2vec2-ctc", "Wav2Vec2ForCTC", wave(), **WAVE, **STABLE)
    add("wav2vec2-mask", "Wav2Vec2Model", wave(mask=True), **WAVE, **STABLE)
    add("hubert", "HubertModel", wave(), BOTH, **WAVE)
    add("unispeech", "UniSpeechModel", wave(), **WAVE)
    add("unispeech-sat", "UniSpeechSatModel", wave(), **WAVE)
    add("wavlm", "WavLMModel", wave(), num_buckets=8, max_bucket_distance=16, **WAVE)
    add("sew", "SEWModel", wave(), squeeze_factor=2, **WAVE)
    add("sew-d", "SEWDModel", wave(), squeeze_factor=2, **WAVE)
    add("data2vec-audio", "Data2VecAudioModel", wave(), **WAVE)
    add("wav2vec2-conformer", "Wav2Vec2ConformerModel", wave(), conv_depthwise_kernel_size=3, **WAVE)
    add(
        "wav2vec2-bert", "Wav2Vec2BertModel", tensors(input_features=normal(16, 24)),
        feature_projection_input_dim=24, conv_depthwise_kernel_size=3, left_max_position_embeddings=4,
        right_max_position_embeddings=4, **ENCODER,
    )  # fmt: skip
    add("ast", "ASTModel", tensors(input_values=normal(24, 16)), BOTH, patch_size=4, max_length=24, num_mel_bins=16,
        frequency_stride=4, time_stride=4, **ENCODER)  # fmt: skip
    whisper: dict[str, Any] = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
        "max_source_positions": 12, "num_labels": 4, "classifier_proj_size": 16, "vocab_size": 99, "pad_token_id": 1,
        "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }  # fmt: skip
    add("whisper-encoder", "WhisperForAudioClassification", tensors(input_features=normal(16, 24)), BOTH, **whisper)
    add(
        "clap-audio", "ClapAudioModel", tensors(input_features=normal(1, 32, 32)), spec_size=32, num_mel_bins=32,
        window_size=4, patch_size=4, patch_stride=[4, 4], depths=[1, 1], num_attention_heads=[2, 4],
        patch_embeds_hidden_size=16, hidden_size=32, enable_fusion=False,
    )  # fmt: skip
    return found
