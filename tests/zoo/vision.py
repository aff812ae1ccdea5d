"""Vision backbones and heads: transformers, hybrids and convolutional networks of transformers' own."""

from __future__ import annotations

from typing import Any

from .case import BOTH, ONE, Attention, Case, transformers_cases
from .inputs import MakeInputs, image, normal, tensors, text, uniform

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}


def cases() -> dict[str, Case]:
    """Name -> Case; nothing is built yet."""
    found: dict[str, Case] = {}

    def add(name: str, class_name: str, make_inputs: MakeInputs, attention: Attention = ONE, **options: Any) -> None:
        found.update(transformers_cases("vision", name, class_name, make_inputs, attention, **options))

    add("vit", "ViTModel", image(), BOTH, **VIT)
    add("vit-classifier", "ViTForImageClassification", image(), BOTH, num_labels=10, **VIT)
    add("deit", "DeiTModel", image(), BOTH, **VIT)
    add("deit-distilled", "DeiTForImageClassificationWithTeacher", image(), num_labels=10, **VIT)
    add("beit", "BeitModel", image(), BOTH, use_relative_position_bias=True, layer_scale_init_value=0.1, **VIT)
    add("data2vec-vision", "Data2VecVisionModel", image(), ("eager",), use_relative_position_bias=True, **VIT)
    add("vit-msn", "ViTMSNModel", image(), **VIT)
    add("vit-mae", "ViTMAEModel", tensors(pixel_values=normal(3, 32, 32), noise=uniform(16)), **VIT)
    add("ijepa", "IJepaModel", image(), **VIT)
    add("dinov2", "Dinov2Model", image(), BOTH, mlp_ratio=2, **VIT)
    add("dinov2-registers", "Dinov2WithRegistersModel", image(), mlp_ratio=2, num_register_tokens=2, **VIT)
    add("dinov3-vit", "DINOv3ViTModel", image(), num_register_tokens=2, **VIT)
    add(
        "hiera", "HieraModel", image(64), embed_dim=8, image_size=[64, 64], patch_stride=[4, 4], patch_size=[7, 7],
        patch_padding=[3, 3], depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2], masked_unit_size=[8, 8],
        num_query_pool=1,
    )  # fmt: skip
    add("swin", "SwinModel", image(), **SWIN)
    add("swin-classifier", "SwinForImageClassification", image(), num_labels=10, **SWIN)
    add("swinv2", "Swinv2Model", image(), **SWIN)
    add("donut-swin", "DonutSwinModel", image(), **SWIN)
    add(
        "convnext",
        "ConvNextModel",
        image(64),
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_stages=2,
        layer_scale_init_value=0.1,
    )
    add("convnextv2", "ConvNextV2Model", image(64), hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    add(
        "mobilevit", "MobileViTModel", image(64), image_size=64, hidden_sizes=[32, 40, 48], neck_hidden_sizes=[8, 16,
        24, 32, 40, 48, 64], num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    add("mobilevitv2", "MobileViTV2Model", image(64), image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1])
    add("mobilenet-v1", "MobileNetV1Model", image(64), depth_multiplier=0.125, min_depth=4)
    add("mobilenet-v2", "MobileNetV2Model", image(64), depth_multiplier=0.125, min_depth=4)
    add(
        "levit", "LevitModel", image(64), image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1], key_dim=[8, 8, 8], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2],
    )  # fmt: skip
    add(
        "poolformer", "PoolFormerModel", image(64), hidden_sizes=[16, 24], depths=[1, 1], num_encoder_blocks=2,
        patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], layer_scale_init_value=0.1,
    )  # fmt: skip
    add(
        "pvt", "PvtModel", image(32), image_size=32, num_encoder_blocks=2, depths=[1, 1],
        sequence_reduction_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[4, 2], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    add(
        "pvt-v2", "PvtV2Model", image(32), image_size=32, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
        hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    add(
        "segformer", "SegformerForSemanticSegmentation", image(64), num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    add("glpn", "GLPNModel", image(64), num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])  # fmt: skip
    add("resnet", "ResNetModel", image(), embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    add(
        "resnet-bottleneck",
        "ResNetForImageClassification",
        image(),
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        num_labels=10,
    )
    add("regnet", "RegNetModel", image(), embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8)
    add(
        "efficientnet",
        "EfficientNetModel",
        image(64),
        image_size=64,
        width_coefficient=0.25,
        depth_coefficient=0.1,
        hidden_dim=320,
    )
    add(
        "cvt", "CvtModel", image(), embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], mlp_ratio=[2.0, 2.0,
        2.0],
    )  # fmt: skip
    add("dpt", "DPTForDepthEstimation", image(), backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16, **{**VIT, "num_hidden_layers": 4})  # fmt: skip
    add("yolos", "YolosModel", image(), num_detection_tokens=4, **{**VIT, "image_size": [32, 32]})
    add(
        "focalnet", "FocalNetModel", image(), image_size=32, patch_size=2, embed_dim=16, hidden_sizes=[16, 32],
        depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3],
    )  # fmt: skip
    add(
        "vitdet", "VitDetModel", image(), window_size=2, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
        image_size=32, pretrain_image_size=32, patch_size=8, use_relative_position_embeddings=True,
    )  # fmt: skip
    add(
        "swiftformer",
        "SwiftFormerModel",
        image(64),
        image_size=64,
        depths=[1, 1],
        embed_dims=[16, 32],
        downsamples=[True, True],
    )
    add(
        "timesformer",
        "TimesformerModel",
        tensors(pixel_values=normal(2, 3, 16, 16)),
        num_frames=2,
        **{**VIT, "image_size": 16},
    )
    add(
        "videomae",
        "VideoMAEModel",
        tensors(pixel_values=normal(4, 3, 16, 16)),
        num_frames=4,
        tubelet_size=2,
        **{**VIT, "image_size": 16},
    )
    add(
        "vivit",
        "VivitModel",
        tensors(pixel_values=normal(4, 3, 16, 16)),
        num_frames=4,
        tubelet_size=[2, 8, 8],
        **{**VIT, "image_size": 16},
    )
    add(
        "imagegpt",
        "ImageGPTModel",
        text(mask=False),
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=99,
        n_positions=64,
        use_cache=False,
    )
    return found
