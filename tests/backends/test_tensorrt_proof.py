"""Reading back what a TensorRT engine runs in: layer listings of each version, kernel names, what is told and what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from accelkit import LoweringError
from accelkit.backends.tensorrt.judging import require_precision
from accelkit.backends.tensorrt.kernel_names import arithmetic
from accelkit.backends.tensorrt.proof import Layer, Proof, layers_of, onnx_nodes, prove

# --- kernels

KERNELS = {
    "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16": "fp16",
    "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize256x64x32_stage3_g1_tensor16x8x8_t1r3s3": "tf32",
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32": "int8",
    "sm80_xmma_gemm_f32f32_f32f32_f32_nt_n_tilesize256x128x8_stage3_warpsize4x2x1_ffma_aligna4_alignc4": "fp32",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "bf16",
    "sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n": "fp8",
    "sm50_xmma_cublas_gemvx_f16f16_f32": "fp16",
    "ampere_scudnn_128x64_relu_xregs_large_nn_v1": "fp32",
    "maxwell_sgemm_64x64_nn": "fp32",
    "cutlass_80_simt_sgemm_128x64_8x5_tn_align1": "fp32",
    "volta_h884gemm_64x64_ldg8_nn_v0": "fp16",
    "turing_h1688cudnn_256x64_ldg8_relu_exp_small_nhwc_tn_v1": "fp16",
    "ampere_fp16_s16816gemm_fp16_256x128_ldg8_relu_f2f_stages_32x1_tn": "fp16",
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn": "bf16",
    "cutlass_80_tensorop_f16_s16816gemm_relu_f16_128x256_32x3_nn_align8": "fp16",
    "cutlass_80_tensorop_s1688gemm_128x64_16x6_tn_align4": "tf32",
    "fmha_v2_flash_attention_fp16_64_64_S_64_sm80_kernel_nl": "fp16",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0": "fp16",
    "_gemm_mha_v2_0x6cab41e6e0d2a4f2": None,
    "sm75_xmma_gemm_of_tomorrow": None,
}
NO_PRODUCTS = (
    "generatedNativePointwise",
    "__myl_CastMulMeanSub_0x1b2",
    "void genericReformat::copyPackedKernel<float, __half>(unsigned int)",
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>",
)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_name_what_they_multiply_in(name: str) -> None:
    assert arithmetic(name) == (True, KERNELS[name])


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_other_kernels(name: str) -> None:
    assert arithmetic(name) == (False, None)


# --- layers


def tensor(dtype: str, name: str = "t") -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": [1, 8], "Format/Datatype": dtype}


def layer(name: str, kind: str, inputs: Any, outputs: Any, **more: Any) -> dict[str, Any]:
    sides = [[tensor(d) for d in ([side] if isinstance(side, str) else side)] for side in (inputs, outputs)]
    return {"Name": name, "LayerType": kind, "Inputs": sides[0], "Outputs": sides[1], **more}


def listing(*layers: Any) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["x", "output_0"]})


LINEAR_16, LINEAR_32 = "Row major linear FP16 format", "Row major linear FP32"
GEMM = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16"

V8 = (
    layer("Reformatting CopyNode for Input Tensor 0 to Conv_0", "Reformat", LINEAR_32, LINEAR_16),
    layer("Conv_0 + Relu_1", "CaskConvolution", LINEAR_32, LINEAR_32, ParameterType="Convolution",
          Weights={"Type": "Float", "Count": 9408}, TacticName="ampere_scudnn_128x64_relu_xregs_large_nn_v1"),
    layer("Conv_3", "CaskConvolution", "Channel major FP32 format where channel % 4 == 0", LINEAR_32,
          TacticName="sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize256x64x32"),
    layer("MatMul_4 + Add_5", "CaskGemmMatrixMultiply", LINEAR_16, LINEAR_32, TacticName=GEMM),
    layer("MatMul_6", "MatrixMultiply", LINEAR_16, LINEAR_32, Weights={"Type": "Half", "Count": 64}),
    layer("MatMul_7", "MatrixMultiply", [LINEAR_16, LINEAR_32], LINEAR_32),
    layer("PWN(Sigmoid_8)", "PointWiseV2", LINEAR_16, LINEAR_16, TacticName=""),
    layer("Softmax_9", "SoftMaxV2", LINEAR_16, LINEAR_32),
    layer("Shape_10", "PointWiseV2", "Row major linear INT32", "Row major linear INT32"),
    layer("{ForeignNode[a.../b]}", "Myelin", LINEAR_16, LINEAR_16, TacticName="", TacticValue="0x0000000000000000"),
    layer("Transpose_11", "Shuffle", LINEAR_16, LINEAR_16),
)  # fmt: skip

V10 = (
    layer("__myl_CastMulMean_myl0_0", "kgen", "Float", "Half"),
    layer("/fc1/MatMul_myl0_1", "gemm", "Half", "Half", TacticName="sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64"),
    layer("_gemm_mha_v2_myl0_2", "kgen", "Half", "Half", TacticName="_gemm_mha_v2_0x6cab"),
    layer("/fc2/MatMul_myl0_3", "gemm", "BFloat16", "Float", TacticName=""),
    layer("__myl_Add_myl0_4", "kgen", "Half", "Half"),
    layer("copy", "NoOp", "Half", "Half"),
    layer("", "signal", [], []),
)  # fmt: skip


def test_layers_of_8() -> None:
    layers, notes = layers_of(listing(*V8))
    assert notes == ()
    assert [(one.name.split(" ")[0], one.kind, one.precision) for one in layers] == [
        ("Reformatting", "movement", None),
        ("Conv_0", "product", "fp32"),
        ("Conv_3", "product", "tf32"),
        ("MatMul_4", "product", "fp16"),
        ("MatMul_6", "product", "fp16"),
        ("MatMul_7", "product", None),  # its operands differ, and nothing else tells
        ("PWN(Sigmoid_8)", "other", "fp16"),
        ("Softmax_9", "other", None),
        ("Shape_10", "movement", None),  # integers
        ("{ForeignNode[a.../b]}", "region", None),
        ("Transpose_11", "movement", None),
    ]


def test_layers_of_10() -> None:
    layers, _ = layers_of(listing(*V10))
    assert [(one.kind, one.precision) for one in layers] == [
        ("other", None),
        ("product", "fp16"),
        ("product", "fp16"),
        ("product", "bf16"),
        ("other", "fp16"),
        ("movement", None),
        ("movement", None),
    ]


def test_float32_operands_are_tf32_for_all_we_know_where_it_was_allowed() -> None:
    text = listing(layer("MatMul_0", "MatrixMultiply", LINEAR_32, LINEAR_32))
    assert layers_of(text)[0][0].precision == "fp32"
    assert layers_of(text, "")[0][0].precision is None


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("no JSON", "TensorRT's list of layers cannot be read"),
        ('{"Layers": 3}', "has a form that is not known"),
        (listing("Conv_0 + Relu_1", "{ForeignNode[a...b]}"), "the engine tells the names of its layers only"),
    ],
)
def test_listings_that_tell_nothing(text: str, note: str) -> None:
    layers, notes = layers_of(text)
    assert [one.precision for one in layers] == [None] * len(layers)
    assert note in notes[0]
    assert require_precision(Proof(layers), "fp16") == ()  # no proof is no accusation


def test_listings_with_holes() -> None:
    layers, _ = layers_of(
        json.dumps([{"Name": "a"}, {}, {"Name": "b", "LayerType": "gemm", "Inputs": None, "Outputs": [7]}])
    )
    assert [(one.kind, one.precision) for one in layers] == [("other", None), ("other", None), ("product", None)]


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("MatMul_4 + Add_5", ["MatMul_4", "Add_5"]),
        ("PWN(PWN(Sigmoid_1), Mul_2)", ["Sigmoid_1", "Mul_2"]),
        ("{ForeignNode[/a/MatMul.../b/Add]}", ["/a/MatMul", "/b/Add"]),
    ],
)
def test_nodes_in_a_layers_name(name: str, nodes: list[str]) -> None:
    assert onnx_nodes(name) == nodes


# --- together


def proof_of(
    *layers: Any, kernels: Any = None, times: Mapping[str, Any] | None = None, precision: str = "fp16"
) -> Proof:
    def listed() -> Mapping[str, float]:
        if isinstance(kernels, Exception):
            raise kernels
        return kernels or {}

    return prove(listing(*layers), listed, lambda: times or {}, precision)


def test_shares_of_layers_and_of_time() -> None:
    proof = proof_of(
        layer("a", "MatrixMultiply", LINEAR_16, LINEAR_16),
        layer("b", "MatrixMultiply", LINEAR_16, LINEAR_16),
        layer("c", "SoftMaxV2", LINEAR_32, LINEAR_32),
        layer("d", "SoftMaxV2", LINEAR_16, LINEAR_32),
        layer("e", "Reformat", LINEAR_16, LINEAR_32),
        times={"a": [0.9, 0.8, 1.0], "b": [0.7], "c": [0.3], "d": [0.2], "e": [0.1]},
    )
    assert proof.precisions() == {"fp16": 2, "fp32": 1, "unknown precision": 1}
    assert proof.sentences() == [
        "fp16: 50 % of 4 layers, 75 % of the time; fp32: 25 % of 4 layers, 15 % of the time; unknown precision: 25 % of 4 layers, "
        "10 % of the time (2 ms, and 0.1 ms of moving data)"
    ]
    assert Proof.from_json(json.loads(json.dumps(proof.to_json()))) == proof


def test_no_times() -> None:
    proof = proof_of(layer("a", "MatrixMultiply", LINEAR_16, LINEAR_16))
    assert proof.sentences() == ["fp16: 100 % of 1 layers", "TensorRT's profiler reported no times"]


REGION = layer("{ForeignNode[a...b]}", "Myelin", LINEAR_16, LINEAR_16)


def test_a_fused_region_is_told_by_the_kernels_that_ran() -> None:
    proof = proof_of(
        REGION, kernels={GEMM: 0.9, f"{GEMM}_2": 0.1, "__myl_Add": 0.3}, times={"{ForeignNode[a...b]}": [1.2]}
    )
    assert proof.precisions() == {"fp16": 1}
    assert proof.kernels == {"fp16": 1.0}
    assert "matrix-product kernels that ran, by their names: fp16 100 % of 1 ms" in proof.sentences()
    assert "1 fused region of TensorRT's, told by the kernels that ran" in proof.sentences()


@pytest.mark.parametrize(
    ("kernels", "sentence"),
    [
        ({"__myl_Add": 0.3}, "which show their borders only, so their precision is not told"),
        ({GEMM: 0.9, "_gemm_mha_v2_0x6": 0.1}, "by their names: fp16 90 %, unknown precision 10 % of 1 ms"),
        (
            RuntimeError("torch.profiler lists no kernels"),
            "inside fused regions could not be listed: torch.profiler lists no",
        ),
    ],
)
def test_a_fused_region_that_is_not_told(kernels: Any, sentence: str) -> None:
    proof = proof_of(REGION, kernels=kernels)
    assert proof.precisions() == {"unknown precision": 1}  # its borders are fp16, which proves nothing
    assert any(sentence in one for one in proof.sentences())
    assert require_precision(proof, "fp16") == ()


def test_kernels_are_not_listed_where_nothing_is_open() -> None:
    proof = proof_of(layer("a", "MatrixMultiply", LINEAR_16, LINEAR_16), kernels=AssertionError("listed"))
    assert proof.kernels is None


# --- judging


def products(**precisions: str) -> Proof:
    return Proof(tuple(Layer(name, "product", precision, 1.0) for name, precision in precisions.items()))


@pytest.mark.parametrize(
    ("asked", "got", "message"),
    [
        (
            "fp16",
            "fp32",
            r"fp16 was asked for, and TensorRT built 1 of 2 matrix-product layers in another precision \(b in fp32",
        ),
        ("fp16", "bf16", "b in bf16"),
        ("bf16", "fp16", "b in fp16"),
        ("fp32", "tf32", "b in tf32; 50% of the products' time.*ask for precision='tf32'"),
        ("fp32", "fp16", "b in fp16"),
        ("tf32", "fp16", "b in fp16"),
    ],
)
def test_another_precision_than_asked(asked: str, got: str, message: str) -> None:
    assert require_precision(products(a=asked, b=asked), asked) == ()
    with pytest.raises(LoweringError, match=message):
        require_precision(products(a=asked, b=got), asked)


def test_tf32_is_a_permission() -> None:
    assert require_precision(products(a="tf32", b="fp32"), "tf32") == ()


def test_layers_kept_in_fp32_on_purpose() -> None:
    proof = products(**{"MatMul_1 + Add_2": "fp32", "MatMul_3": "fp16"})
    assert require_precision(proof, "fp16", ["MatMul_1"]) == ()
    with pytest.raises(LoweringError, match=r"MatMul_1 \+ Add_2 in fp32"):
        require_precision(proof, "fp16", ["MatMul_3", "MatMul_11"])
    narrower = products(MatMul_1="int8")
    with pytest.raises(LoweringError, match="MatMul_1 in int8"):
        require_precision(narrower, "fp16", ["MatMul_1"])


def test_a_tiny_product_in_a_wider_precision_is_told() -> None:
    layers = (Layer("large", "product", "fp16", 9.9), Layer("tiny", "product", "fp32", 0.1))
    (sentence,) = require_precision(Proof(layers), "fp16")
    assert sentence == "1 matrix products run in a wider precision, being faster so (1.0%): tiny in fp32"
    narrower = (Layer("large", "product", "fp32", 9.9), Layer("tiny", "product", "tf32", 0.1))
    with pytest.raises(LoweringError, match="tiny in tf32"):  # fp32 is a promise
        require_precision(Proof(narrower), "fp32")


def test_other_layers_do_not_count() -> None:
    layers = (Layer("norm", "other", "fp32", 9.0), Layer("a", "product", "fp16", 1.0), Layer("b", "product", None, 1.0))
    assert require_precision(Proof(layers), "fp16") == ()


def test_kernels_inside_fused_regions_count() -> None:
    layers = (Layer("{ForeignNode[a...b]}", "region", None, 1.0),)
    with pytest.raises(
        LoweringError, match=r"inside TensorRT's fused regions run in another precision \(fp32 40 % of 1 ms\)"
    ):
        require_precision(Proof(layers, {"fp16": 0.6, "fp32": 0.4}), "fp16")
    with pytest.raises(LoweringError, match="tf32 1 %"):
        require_precision(Proof(layers, {"fp32": 0.99, "tf32": 0.01}), "fp32")
    assert require_precision(Proof(layers, {"fp16": 0.9, "unknown precision": 0.1}), "fp16") == ()
    (told,) = require_precision(Proof(layers, {"fp16": 0.6, "fp32": 0.4}), "fp16", ["MatMul_1"])
    assert "wider precision, where the graph says so: fp32 40 % of 1 ms" in told
    (told,) = require_precision(Proof(layers, {"fp16": 0.98, "fp32": 0.02}), "fp16")
    assert "being faster so" in told
