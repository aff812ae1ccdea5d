"""What set_precision knows about operators, as data: who multiplies matrices, who wants equal dtypes, who stays in
float32 and why."""

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


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _aten(words: str) -> tuple[str, ...]:
    return tuple(f"aten.{word}" for word in words.split())


_NO_KERNEL = "PyTorch has no low-precision CPU kernel for it"  # OpInfo.dtypes in torch.testing, PyTorch 2.13

KEEP: tuple[Keep, ...] = (
    Keep(
        _aten("cumsum cumprod logcumsumexp prod renorm trapezoid cumulative_trapezoid"),
        "each partial result is rounded, and the error grows with the length",
    ),
    Keep(
        _aten("norm frobenius_norm nuclear_norm dist pdist pairwise_distance"),
        "squares are rounded before they are summed",
    ),
    Keep(_aten("*_loss *_loss_nd *_loss2d kl_div binary_cross_entropy*"), "a loss sums many small terms"),
    Keep(
        _aten("erfinv special_erfinv logit special_logit atanh acos asin"),
        "its slope is unbounded at the ends, where rounding the input changes the result most",
    ),
    Keep(
        _aten("exp exp2 expm1 sinh cosh pow square reciprocal rsqrt tan"),
        "its results leave float16's range, 6e-8 to 65504, for everyday inputs",
        ("fp16",),
    ),
    Keep(
        _aten(
            "linalg_* cholesky* inverse logdet slogdet det lu_* svd qr geqrf ormqr orgqr pinverse matrix_exp "
            "matrix_power triangular_solve"
        ),
        _NO_KERNEL,
    ),
    Keep(
        _aten("fft_* _fft_* stft istft complex polar view_as_complex"),
        "there is no complex number of this precision",
    ),
    Keep(
        _aten(
            "cdist _cdist_forward _euclidean_dist quantile nanquantile histc histogram* avg_pool3d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa rrelu polygamma special_* ctc_loss"
        ),
        _NO_KERNEL,
    ),
)

# All floating-point operands in one dtype, the low one: where the time goes, and where hardware is fast.
MATRIX_PRODUCTS = _names(
    "linear matmul mm bmm mv dot vdot inner addmm addbmm addmv addr baddbmm einsum tensordot bilinear chain_matmul "
    "linalg_multi_dot conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc "
    "_convolution scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_attention_math _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_cudnn_attention lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"
)

# Kernels (or ONNX operators) that want their operands in the first one's dtype, instead of promoting.
SAME_DTYPE = _names(
    "layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm lerp prelu "
    "grid_sampler grid_sampler_2d grid_sampler_3d index_put index_add index_copy scatter scatter_add scatter_reduce "
    "masked_scatter select_scatter slice_scatter diagonal_scatter embedding embedding_bag embedding_renorm "
    "searchsorted bucketize _weight_norm weight_norm"
)

# Input in low precision, weight and statistics in float32: supported on every device, and the statistics lose nothing.
BATCH_NORMS = _names(
    "batch_norm _native_batch_norm_legit_no_training native_batch_norm _batch_norm_no_update cudnn_batch_norm"
)

LOOK_UPS = _names("embedding embedding_bag")

COMPARISONS = _names("eq ne lt le gt ge isclose equal")

# Give a tensor of their own from a tensor's shape; its values do not matter.
SHAPE_ONLY = _names(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty "
    "new_empty_strided"
)

CASTS = _names("to _to_copy type_as convert_element_type")

# One tensor in, the same numbers out.
MOVES = _names(
    "view reshape _unsafe_view flatten unflatten transpose t permute numpy_T mT movedim swapaxes expand expand_as "
    "squeeze unsqueeze select slice narrow split chunk unbind contiguous clone alias detach lift_fresh_copy "
    "lift_fresh repeat tile repeat_interleave flip roll index index_select gather triu tril diagonal broadcast_to "
    "view_as reshape_as pixel_shuffle pixel_unshuffle dropout unfold"
)

# A number they are given becomes an element of their result.
FILLS = _names(
    "full full_like new_full scalar_tensor fill masked_fill where constant_pad_nd pad index_fill clamp clamp_min "
    "clamp_max nan_to_num threshold hardtanh maximum minimum"
)

# The numbers of their operands come out, possibly added up: how a mask travels to the scores.
MASK_ARITHMETIC = _names("add sub rsub mul neg")
MASK_MOVES = (
    MOVES | CASTS | _names("cat stack where masked_fill maximum minimum clamp clamp_min clamp_max index_put scatter")
)

# Of the operators that fill: those whose number stands where a mask says so (bounds of a clamp do not).
MASK_SOURCES = _names("full full_like new_full scalar_tensor fill masked_fill where constant_pad_nd pad index_fill")

# Choose among their operand's numbers.
SELECTIONS = _names("amax amin max min sort topk")
