"""What a GPU kernel multiplies in, by its name.

    sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize...   ->  a matrix product in tf32
    generatedNativePointwise, __myl_Add...               ->  no matrix product

NVIDIA's GEMM, convolution and attention kernels carry the types of their operands, products and sums in their names. A name
that says none gives None: not told, never guessed. The forms were read from TensorRT engine listings and profiles
(trt-engine-explorer's examples, cuBLAS and CUTLASS kernel lists); tests hold one of each.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TYPES = {
    "tf32": "tf32", "bf16": "bf16", "f16": "fp16", "fp16": "fp16", "f32": "fp32", "fp32": "fp32", "f64": "fp64", "i8": "int8",
    "u8": "int8", "int8": "int8", "e4m3": "fp8", "e5m2": "fp8",
}  # fmt: skip
_TYPE = r"(?:tf32|bf16|f16|f32|f64|i8|u8|i32|e4m3|e5m2)"
# xmma: operands A and B, then what is multiplied and what is summed in, then the result
_XMMA = re.compile(
    rf"(?<![a-z0-9]){_TYPE}{_TYPE}_(?P<product>tf32|bf16|f16|f32|f64|i8|u8|e4m3|e5m2)(?P<sums>{_TYPE})(?![a-z0-9])"
)
_PAIR = re.compile(rf"(?<![a-z0-9])(?P<product>tf32|bf16|f16|f32|f64|i8|e4m3|e5m2){_TYPE}(?![a-z0-9])")
_ATTENTION = re.compile(r"f?mha|flash_(?:attn|attention|fprop)")
_ATTENTION_TYPE = re.compile(r"_(?P<product>fp16|bf16|f16|fp32|f32|tf32|int8|i8|e4m3)(?:_|$)")
_PRODUCT = re.compile(
    r"gemm|gemv|cudnn(?!::)|fprop|dgrad|xmma|cutlass|cublas|convolution|conv[123]d|winograd|mha|flash_"
)
_PLAIN: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"tf32|tensorop_s1688(?:gemm|fprop|conv)"), "tf32"),
    (re.compile(r"bf16_s\d+(?:gemm|cudnn|fprop)|_bf16_"), "bf16"),
    (re.compile(r"_h\d{3,6}(?:gemm|cudnn|fprop)|(?:fp16|f16|_h)_s\d+(?:gemm|cudnn|fprop)|hgemm|hcudnn|fp16_"), "fp16"),
    (re.compile(r"_i\d{3,6}(?:gemm|cudnn|fprop)|int8|imma"), "int8"),
    (re.compile(r"(?<![a-z])s(?:gemm|cudnn)|ffma"), "fp32"),
)


class Arithmetic(NamedTuple):
    """`product`: whether it is a matrix product (convolution, attention); `precision`: of it, None where the name does not
    tell."""

    product: bool
    precision: str | None


def arithmetic(name: str) -> Arithmetic:
    """What a kernel (or tactic) of this name computes.

    >>> arithmetic("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16")
    Arithmetic(product=True, precision='fp16')
    >>> arithmetic("generatedNativePointwise")
    Arithmetic(product=False, precision=None)
    """
    text = name.lower()
    if not _PRODUCT.search(text):
        return Arithmetic(False, None)
    if _ATTENTION.search(text):
        found = _ATTENTION_TYPE.search(text)
        return Arithmetic(True, _TYPES[found["product"]] if found else None)
    for pattern in (_XMMA, _PAIR):
        if found := pattern.search(text):
            return Arithmetic(True, _TYPES[found["product"]])
    return Arithmetic(True, next((precision for pattern, precision in _PLAIN if pattern.search(text)), None))


def sums_in(name: str) -> str | None:
    """What a kernel of this name adds its products up in; None where the name does not tell.

    >>> sums_in("sm90_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x128x64")
    'fp16'
    """
    found = _XMMA.search(name.lower())
    return _TYPES.get(found["sums"]) if found else None
