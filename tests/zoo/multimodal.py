"""Models of pictures (or sound) and text together."""

from __future__ import annotations

from typing import Any

from .case import BOTH, ONE, Attention, Case, transformers_cases, transformers_model
from .inputs import MakeInputs, image, normal, text

TEXT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 98,
}  # fmt: skip
PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def cases() -> dict[str, Case]:
    """Name -> Case; nothing is built yet."""
    found: dict[str, Case] = {}
    picture = {"pixel_values": normal(3, 32, 32)}
    pair = text(extra=picture)

    def add(name: str, class_name: str, make_inputs: MakeInputs, attention: Attention = ONE, **options: Any) -> None:
        found.update(transformers_cases("multimodal", name, class_name, make_inputs, attention, **options))

    two: dict[str, Any] = {"text_config": TEXT, "vision_config": PICTURE, "projection_dim": 16}
    add("clip", "CLIPModel", pair, BOTH, **two)
    add("clip-text", "CLIPTextModelWithProjection", text(), **TEXT, projection_dim=16)
    add("clip-vision", "CLIPVisionModelWithProjection", image(), **PICTURE, projection_dim=16)
    add("siglip", "SiglipModel", pair, BOTH, text_config=TEXT, vision_config=PICTURE)
    add("chinese-clip", "ChineseCLIPModel", pair, **two)
    add(
        "altclip",
        "AltCLIPModel",
        pair,
        text_config={**TEXT, "project_dim": 16},
        vision_config=PICTURE,
        projection_dim=16,
    )
    add(
        "blip",
        "BlipForImageTextRetrieval",
        pair,
        text_config={**TEXT, "encoder_hidden_size": 32},
        vision_config=PICTURE,
        image_text_hidden_size=16,
    )
    add("blip-text", "BlipModel", pair, text_config=TEXT, vision_config=PICTURE, projection_dim=16)
    add("metaclip-2", "MetaClip2Model", pair, **two)
    add(
        "groupvit",
        "GroupViTModel",
        pair,
        text_config=TEXT,
        vision_config={**PICTURE, "depths": [1, 1, 0], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
        projection_dim=16,
        projection_intermediate_dim=16,
    )
    add(
        "flava",
        "FlavaModel",
        pair,
        text_config=TEXT,
        image_config=PICTURE,
        multimodal_config={**TEXT},
        hidden_size=32,
        projection_dim=16,
    )
    add(
        "visual-bert",
        "VisualBertModel",
        text(types=True, extra={"visual_embeds": normal(4, 24)}),
        **TEXT,
        visual_embedding_dim=24,
    )
    add(
        "lxmert",
        "LxmertModel",
        text(types=True, extra={"visual_feats": normal(4, 24), "visual_pos": normal(4, 4)}),
        vocab_size=99,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=24,
    )
    add(
        "layoutlmv3",
        "LayoutLMv3Model",
        text(extra=picture),
        input_size=32,
        **{**TEXT, **PICTURE},
        coordinate_size=6,
        shape_size=4,
        has_relative_attention_bias=False,
        has_spatial_attention_bias=False,
    )
    add("owlvit", "OwlViTModel", pair, **two)
    found["clipseg"] = Case(
        "multimodal", transformers_model("CLIPSegForImageSegmentation", **two, extract_layers=[0, 1], reduce_dim=16,
                                         decoder_num_attention_heads=2, decoder_intermediate_size=32),
        pair, {}, fixed_batch="its forward compares `len(input_ids)`, a Python number, with the pictures' batch",
    )  # fmt: skip
    return found
