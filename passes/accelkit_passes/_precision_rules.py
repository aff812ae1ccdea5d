"""What set_precision knows about operators, as data: who multiplies matrices, who wants equal dtypes, who stays in float32 and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """Operators that stay in float32.

    Attributes:
        operators: fnmatch patterns over operator names (`aten.linalg_*`).
        reason: what goes wrong otherwise; shown in the report.
        precisions: the precisions it goes wrong in.
    """

    operators: tuple[str, ...]
    reason: str
    precisions: tuple[str, ...] = ("bf16", "fp16")


_NO_KERNEL = "PyTorch has no low-precision CPU kernel for it"  # OpInfo.dtypes in torch.testing, PyTorch 2.13

KEEP: tuple[Keep, ...] = (
    Keep(
        ("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.prod", "aten.renorm", "aten.trapezoid", "aten.cumulative_trapezoid"),
        "each partial result is rounded, and the error grows with the length",
    ),
    Keep(("aten.norm", "aten.frobenius_norm", "aten.nuclear_norm", "aten.dist", "aten.pdist", "aten.pairwise_distance"),
         "squares are rounded before they are summed"),
    Keep(("aten.*_loss", "aten.*_loss_nd", "aten.*_loss2d", "aten.kl_div", "aten.binary_cross_entropy*"),
         "a loss sums many small terms"),
    Keep(("aten.erfinv", "aten.special_erfinv", "aten.logit", "aten.special_logit", "aten.atanh", "aten.acos", "aten.asin"),
         "its slope is unbounded at the ends, where rounding the input changes the result most"),
    Keep(("aten.exp", "aten.exp2", "aten.expm1", "aten.sinh", "aten.cosh", "aten.pow", "aten.square", "aten.reciprocal", "aten.rsqrt",
          "aten.tan"),
         "its results leave float16's range, 6e-8 to 65504, for everyday inputs", ("fp16",)),
    Keep(("aten.linalg_*", "aten.cholesky*", "aten.inverse", "aten.logdet", "aten.slogdet", "aten.det", "aten.lu_*", "aten.svd", "aten.qr",
          "aten.geqrf", "aten.ormqr", "aten.orgqr", "aten.pinverse", "aten.matrix_exp", "aten.matrix_power", "aten.triangular_solve"),
         _NO_KERNEL),
    Keep(("aten.fft_*", "aten._fft_*", "aten.stft", "aten.istft", "aten.complex", "aten.polar", "aten.view_as_complex"),
         "there is no complex number of this precision"),
    Keep(("aten.cdist", "aten._cdist_forward", "aten._euclidean_dist", "aten.quantile", "aten.nanquantile", "aten.histc", "aten.histogram*",
          "aten.avg_pool3d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa", "aten.rrelu", "aten.polygamma",
          "aten.special_*", "aten.ctc_loss"),
         _NO_KERNEL),
)  # fmt: skip

# All floating-point operands in one dtype, the low one: where the time goes, and where hardware is fast.
MATRIX_PRODUCTS = frozenset(
    "linear matmul mm bmm mv dot vdot inner addmm addbmm addmv addr baddbmm einsum tensordot bilinear chain_matmul linalg_multi_dot "
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc _convolution "
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention "
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split()
)

# Kernels (or ONNX operators) that want their operands in the first one's dtype, instead of promoting.
SAME_DTYPE = frozenset(
    "layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm lerp prelu grid_sampler "
    "grid_sampler_2d grid_sampler_3d index_put index_add index_copy scatter scatter_add scatter_reduce masked_scatter select_scatter "
    "slice_scatter diagonal_scatter embedding embedding_bag embedding_renorm searchsorted bucketize _weight_norm weight_norm".split()
)

# Input in low precision, weight and statistics in float32: supported on every device, and the statistics lose nothing.
BATCH_NORMS = frozenset("batch_norm _native_batch_norm_legit_no_training native_batch_norm _batch_norm_no_update cudnn_batch_norm".split())

LOOK_UPS = frozenset("embedding embedding_bag".split())

COMPARISONS = frozenset("eq ne lt le gt ge isclose equal".split())

# Give a tensor of their own from a tensor's shape; its values do not matter.
SHAPE_ONLY = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_empty_strided".split()
)

CASTS = frozenset("to _to_copy type_as convert_element_type".split())

# One tensor in, the same numbers out.
MOVES = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose t permute numpy_T mT movedim swapaxes expand expand_as squeeze unsqueeze "
    "select slice narrow split chunk unbind contiguous clone alias detach lift_fresh_copy lift_fresh repeat tile repeat_interleave flip roll "
    "index index_select gather triu tril diagonal broadcast_to view_as reshape_as pixel_shuffle pixel_unshuffle dropout unfold".split()
)

# A number they are given becomes an element of their result.
FILLS = frozenset(
    "full full_like new_full scalar_tensor fill masked_fill where constant_pad_nd pad index_fill clamp clamp_min clamp_max nan_to_num "
    "threshold hardtanh maximum minimum".split()
)

# The numbers of their operands come out, possibly added up: how a mask travels to the scores.
MASK_ARITHMETIC = frozenset("add sub rsub mul neg".split())
MASK_MOVES = MOVES | CASTS | frozenset("cat stack where masked_fill maximum minimum clamp clamp_min clamp_max index_put scatter".split())
