"""The standard passes, one a file, written with accelkit's public names alone, and the order in which they run.

canonical form -> no dropout -> folds -> precision -> clean-up -> fused operators -> ONNX clean-up (ONNX-based targets)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from accelkit.precision import FP32, Int8, Precision, as_precision

if TYPE_CHECKING:
    from accelkit.attention_patterns import Pattern
    from accelkit.pass_api import GraphPass, OnnxPass

DEFAULT: tuple[str, ...] = (
    "canonicalise",  # first: every later pass needs one pattern instead of several
    "remove_dropout",  # before the fusions: it stands between their operators
    "fuse_conv_batch_norm",
    "fuse_linear_batch_norm",
    "set_precision",  # only in half precisions; after the fusions, whose folds are computed from the full weights
    "remove_no_ops",  # takes the casts that set_precision put twice
    "fold_constants",  # casts of weights included
    "eliminate_common_subexpressions",
    # fused operators: in the precision's dtypes, and where no constant or duplicate stands between their parts
    "recognise_attention",
    "reorder_rows",  # after recognise_attention, which leaves it the permutations around linear layers
    "merge_qkv",
    "fuse_embedding_layer_norm",  # before the residual norms: its sums are theirs where it refuses
    "fuse_patch_embedding",
    "fuse_residual_layer_norm",
    "fuse_residual_rms_norm",
    "fuse_linear_activation",
    "calibrate_int8",  # only in int8; behind the fusions: its layers are those that engines get
    "eliminate_dead_code",  # last on the fx graph: what the others left behind
    "onnx_optimizer",  # the ONNX-based targets run these two after the export
    "onnx_graph_surgeon",
)


def default_passes(
    precision: Precision | str = FP32, *, remove_padding: bool = False, attention: str | Pattern | torch.Tensor = "auto"
) -> tuple[GraphPass | OnnxPass, ...]:
    """The passes of `optimize(passes=None)` for a precision, in order.

    Args:
        precision: as for `optimize`.
        remove_padding: with the pass of that name, after the fusions; it changes what results hold at padding.
        attention: the kernel that computes attention, or a pattern of accelkit.attention_patterns (a boolean tensor will do) that
            makes it sparse, which changes what the model computes: see swap_attention, which runs where this is not "auto".

    Example:
        >>> [p.name for p in default_passes()][:2]
        ['canonicalise', 'remove_dropout']
    """
    precision = as_precision(precision)
    passes = []
    names = list(DEFAULT)
    if remove_padding:
        names.insert(names.index("eliminate_dead_code"), "remove_padding")
    if isinstance(attention, torch.Tensor) or attention != "auto":
        names.insert(names.index("remove_padding" if remove_padding else "eliminate_dead_code"), "swap_attention")
    options: dict[str, dict[str, Any]] = {
        "set_precision": {"precision": precision},
        "calibrate_int8": {"precision": precision},
        "swap_attention": {"kind": attention},
    }
    for name in names:
        if name == "set_precision" and precision.dtype is torch.float32:
            continue  # fp32 and tf32 are what the graph is in already
        if name == "calibrate_int8" and not isinstance(precision, Int8):
            continue
        class_name = "".join(word.capitalize() for word in name.split("_"))
        pass_type = getattr(import_module(f"{__name__}.{name}"), class_name)
        passes.append(pass_type(**options.get(name, {})))
    return tuple(passes)
