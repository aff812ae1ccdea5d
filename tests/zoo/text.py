"""Text encoders and their heads, with real padding masks."""

from __future__ import annotations

from typing import Any

from .case import BOTH, ONE, Attention, Case, transformers_cases
from .inputs import MakeInputs, boxes, text

TINY: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip


def cases() -> dict[str, Case]:
    """Name -> Case; nothing is built yet."""
    found: dict[str, Case] = {}

    def add(name: str, class_name: str, make_inputs: MakeInputs, attention: Attention = ONE, **options: Any) -> None:
        found.update(transformers_cases("text", name, class_name, make_inputs, attention, **{**TINY, **options}))

    add("bert", "BertModel", text(types=True), BOTH)
    add("bert-classifier", "BertForSequenceClassification", text(types=True), num_labels=5)
    add("bert-tokens", "BertForTokenClassification", text(), num_labels=4)
    add("bert-masked", "BertForMaskedLM", text(types=True))
    add("bert-answers", "BertForQuestionAnswering", text(types=True))
    add("bert-no-mask", "BertModel", text(mask=False), BOTH)
    add("roberta", "RobertaModel", text(), BOTH)
    add("roberta-classifier", "RobertaForSequenceClassification", text(), num_labels=3)
    add("camembert", "CamembertModel", text())
    add("xlm-roberta", "XLMRobertaModel", text())
    add("distilbert", "DistilBertModel", text(), BOTH, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    add("albert", "AlbertModel", text(types=True), BOTH, embedding_size=16)
    add("electra", "ElectraModel", text(types=True), BOTH, embedding_size=16)
    add(
        "deberta-v2", "DebertaV2Model", text(types=True), relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        type_vocab_size=2,
    )  # fmt: skip
    add(
        "deberta",
        "DebertaModel",
        text(types=True),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=2,
    )
    add("mpnet", "MPNetModel", text())
    add("convbert", "ConvBertModel", text(types=True), embedding_size=32, conv_kernel_size=3)
    add(
        "mobilebert", "MobileBertModel", text(types=True), embedding_size=16, intra_bottleneck_size=32,
        num_feedforward_networks=2, true_hidden_size=32,
    )  # fmt: skip
    add("squeezebert", "SqueezeBertModel", text(types=True), embedding_size=32)
    add("roformer", "RoFormerModel", text(types=True), embedding_size=32)
    add("nystromformer", "NystromformerModel", text(), num_landmarks=12, segment_means_seq_len=12, conv_kernel_size=5)
    add("megatron-bert", "MegatronBertModel", text(types=True))
    add("ernie", "ErnieModel", text(types=True), BOTH, use_task_id=False)
    add("layoutlm", "LayoutLMModel", text(types=True, extra={"bbox": boxes()}), max_2d_position_embeddings=1024)
    add("splinter", "SplinterModel", text(types=True))
    add("ibert", "IBertModel", text(), quant_mode=False)
    add("fnet", "FNetModel", text(mask=False, types=True))
    add(
        "modernbert", "ModernBertModel", text(shortest=10), BOTH, global_attn_every_n_layers=2, local_attention=6,
        bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    add(
        "funnel",
        "FunnelModel",
        text(16),
        num_hidden_layers=None,
        block_sizes=[1, 1],
        num_decoder_layers=1,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
    )
    add("big-bird", "BigBirdModel", text(16, types=True), attention_type="original_full")
    add("rembert", "RemBertModel", text(types=True), input_embedding_size=16, output_embedding_size=32)
    add("esm", "EsmModel", text(), BOTH, token_dropout=False, mask_token_id=4, position_embedding_type="rotary")
    add("data2vec-text", "Data2VecTextModel", text())
    add(
        "lilt",
        "LiltModel",
        text(extra={"bbox": boxes()}),
        hidden_size=48,
        channel_shrink_ratio=4,
        max_2d_position_embeddings=1024,
    )
    add("mra", "MraModel", text(32), block_per_row=1)
    add("yoso", "YosoModel", text(), use_expectation=True)
    add(
        "canine",
        "CanineModel",
        text(16),
        downsampling_rate=4,
        local_transformer_stride=8,
        num_hash_buckets=50,
        num_hash_functions=4,
    )
    add("luke", "LukeModel", text(), entity_vocab_size=10, entity_emb_size=16)
    add("bert-generation", "BertGenerationEncoder", text())
    add("eurobert", "EuroBertModel", text(), BOTH, num_key_value_heads=2)
    add("nomic-bert", "NomicBertModel", text(types=True))
    add("gte", "GteModel", text())
    add("xlm", "XLMModel", text(), emb_dim=32, n_layers=2, n_heads=4, n_words=99, pad_index=1)
    add("flaubert", "FlaubertModel", text(), emb_dim=32, n_layers=2, n_heads=4, n_words=99, pad_index=1)
    add("xmod", "XmodModel", text(), languages=["en_XX"], default_language="en_XX")
    add("tapas", "TapasModel", text(mask=True))
    return found
