"""accelkit's fused operators, `torch.ops.accelkit.*`: importing this package defines them.

One file each: the schema, the meaning in plain PyTorch (what it computes, and what runs on a CPU), the fake, and which kernel
runs on a GPU and why not. Passes put them into graphs; a backend that does not know one gets its meaning back.

    x -> linear -> gelu            accelkit.linear_activation
    (x + residual) -> layer_norm   accelkit.residual_layer_norm
    Q K^T -> softmax -> V          accelkit.attention, without transposed copies
"""

from __future__ import annotations

from accelkit.ops import (
    attention,
    embedding_layer_norm,
    folded_linear,
    linear_activation,
    linear_residual_layer_norm,
    pack_rows,
    packed_layout,
    patch_embedding,
    residual_layer_norm,
    residual_rms_norm,
    row_moments,
    sparse_attention,
    unpack_rows,
    variable_length_attention,
)
from accelkit.ops.operator import OPERATORS, Operator, operator_of

__all__ = [
    "OPERATORS",
    "Operator",
    "attention",
    "embedding_layer_norm",
    "folded_linear",
    "linear_activation",
    "linear_residual_layer_norm",
    "operator_of",
    "pack_rows",
    "packed_layout",
    "patch_embedding",
    "residual_layer_norm",
    "residual_rms_norm",
    "row_moments",
    "sparse_attention",
    "unpack_rows",
    "variable_length_attention",
]
