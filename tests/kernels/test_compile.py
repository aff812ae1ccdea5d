"""The kernels compile for Hopper on any machine: the interpreter takes what the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="the kernels need Triton")
# Gluon's language changes between versions; the kernels in it are written for 3.6, and passed over where a Triton refuses them.
pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="Gluon kernels are written for Triton 3.6"
)

PROGRAM = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accelkit.kernels import attention, rows
from accelkit.kernels.attention_kernels import dense_kernel, variable_length_kernel
from accelkit.kernels.attention_one_pass import one_pass_kernel
from accelkit.kernels.linear_hopper import linear_kernel
from accelkit.kernels.linear_one_tile import default_stages, one_tile_kernel
from accelkit.kernels.linear_tiles import linear_tiles_kernel
from accelkit.kernels.moments import row_moments_kernel
from accelkit.kernels.norms_kernels import embedding_kernel, norm_kernel, wide_norm_kernel
from accelkit.kernels.split import product_kernel, sum_and_norm_kernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

def compile(kernel, config, pointers, more={}, **constants):
    """Every argument that is no constant is a pointer, a float or an aligned integer, by its name."""
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        elif name.endswith("_desc"):
            signature[name] = pointers[name]
        elif name == "scale" or name.endswith("eps"):
            signature[name] = "fp32"
        else:
            signature[name] = pointers.get(name, "*fp16") if name.endswith("_ptr") else "i32"
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, values, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages} | more
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    waits, starts = (compiled.asm["ptx"].count(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
    assert (waits > 0) == (starts > 0) == constants["PDL"], (kernel, waits, starts)
    assert compiled.metadata.shared <= 227 * 1024, (config, compiled.metadata.shared)
    return compiled

def dense(config, keys, mask="none", by_key=True, causal=False, dtype="fp16", width=64):
    block_d = triton.next_power_of_2(width)
    shared = dict(BLOCK_M=config.block_m, WIDTH=width, BLOCK_D=block_d, MASK=mask, BY_KEY=by_key, CAUSAL=causal,
                  PRECISION="tf32x3", PDL=True)
    pointers = {f"{name}_ptr": f"*{dtype}" for name in ("query", "key", "value", "out")}
    pointers["mask_ptr"] = "*u8"
    if mask == "none":
        shared["mask_ptr"] = None
    if config.style == "one_pass":
        first, second, third, whole = attention.one_pass_blocks(keys)
        return compile(one_pass_kernel, config, pointers, FIRST=first, SECOND=second, THIRD=third, WHOLE=whole, **shared)
    if config.style == "descriptors":
        block = f"tensordesc<{dtype}[1, 1, {config.block_n}, {block_d}]>"
        pointers.update(key_desc=block, value_desc=block)
    else:
        shared.update(key_desc=None, value_desc=None)
    tail = config.block_n if causal else attention._tail(keys, config.block_n)
    return compile(dense_kernel, config, pointers, BLOCK_N=config.block_n, TAIL=tail, SPECIALISE=False, **shared)

Config = attention.AttentionConfig
copies = dense(Config("descriptors", 128, 64, 4, 3), 577).asm["ptx"]
assert "wgmma" in copies and "cp.async.bulk.tensor" in copies and "griddepcontrol.wait" in copies
assert "cp.async" in dense(Config("pointers", 128, 64, 8, 3), 577, "boolean").asm["ptx"]
dense(Config("pointers", 64, 64, 4, 3), 577, "additive", by_key=False, causal=True)
dense(Config("pointers", 64, 32, 4, 2), 197, "boolean", dtype="fp32", width=80)
dense(Config("one_pass", 64, 0, 4, 1), 197, "boolean")
dense(Config("one_pass", 128, 0, 8, 1), 128)
compile(variable_length_kernel, Config("pointers", 64, 64, 4, 2), {"offsets_ptr": "*i32"}, BLOCK_M=64, BLOCK_N=64, TAIL=64,
        WIDTH=64, BLOCK_D=64, CAUSAL=False, PRECISION="tf32", PDL=False)
for kernel in (norm_kernel, wide_norm_kernel):
    pointers = {"rows_ptr": "*i32", "residual_ptr": "*fp32"}
    compile(kernel, Config("", 1, 1, 2, 1), pointers, CENTRE=True, ROWS=1, BLOCK=1024, PDL=True)
compile(embedding_kernel, Config("", 1, 1, 2, 1), {f"index_{i}_ptr": "*i64" for i in range(3)}, ROWS=1, BLOCK=1024, PDL=True)
numbers = {f"{name}_ptr": "*i32" for name in ("counts", "sources", "positions", "offsets", "rows")}
for kernel in (rows.count_kernel, rows.place_kernel):
    compile(kernel, Config("", 1, 1, 4, 1), {**numbers, "mask_ptr": "*u8"}, BLOCK=128, PDL=True)
for kernel in (rows.pack_kernel, rows.unpack_kernel):
    compile(kernel, Config("", 1, 1, 4, 1), numbers, ROWS=4, BLOCK=1024, PDL=True)
compile(row_moments_kernel, Config("", 1, 1, 4, 1), {f"{name}_ptr": "*fp32" for name in ("statistics", "moments")},
        GROUP=64, GROUPS=16, BLOCK_M=32, PDL=True)
tile = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, PDL=True)
compile(product_kernel, Config("", 1, 1, 4, 3), {"parts_ptr": "*fp32"}, SPLIT_K=384, **tile)
compile(sum_and_norm_kernel, Config("", 1, 1, 4, 1), {"parts_ptr": "*fp32"}, SPLITS=4, BLOCK_N=1024, PDL=True)
compile(linear_tiles_kernel, Config("", 1, 1, 4, 3), {"rows_ptr": "*i32"}, GROUP=8, EVEN_K=True, HAS_ROWS=False, HAS_BIAS=True,
        HAS_RESIDUAL=True, ACTIVATION="gelu", **tile)

# Gluon's kernels, which the interpreter does not run
layout = gl.NVMMASharedLayout.get_default_for([128, 64], gl.float16)
floats = ("statistics", "x_statistics", "residual_statistics", "moments", "residual_moments", "column_sums", "parts")
def tiles(block_m, block_n):
    rows = f"tensordesc<fp16[{block_m}, 64],{layout!r}>"
    descriptors = dict(x_desc=rows, out_desc=rows, residual_desc=rows, w_desc=f"tensordesc<fp16[{block_n}, 64],{layout!r}>")
    return descriptors | {f"{name}_ptr": "*fp32" for name in floats} | {"rows_ptr": "*i32"}
for pdl in (False, True):
    compile(linear_kernel, Config("", 1, 1, 4, 3), tiles(128, 128), {"maxnreg": 168}, BLOCK_M=128, BLOCK_N=128, STAGES=5,
            HAS_ROWS=False, HAS_BIAS=True, HAS_MOMENTS=True, HAS_RESIDUAL=False, HAS_RESIDUAL_MOMENTS=False, STATISTICS=False,
            ACTIVATION="gelu", PDL=pdl, EARLY=pdl)
def one_tile(block_m, block_n, **options):
    constants = dict(PARTS=False, HAS_BIAS=True, X_GROUPS=0, HAS_RESIDUAL=False, RESIDUAL_GROUPS=0, STATISTICS=False,
                     ACTIVATION="none", PDL=True, EARLY=True, STAGES=default_stages((block_m, block_n)))
    more = {"maxnreg": 80 if block_n == 64 else 96}
    return compile(one_tile_kernel, Config("", 1, 1, block_m // 16, 3), tiles(block_m, block_n), more, BLOCK_M=block_m,
                   BLOCK_N=block_n, **constants | options)
whole = one_tile(128, 128, ACTIVATION="gelu", X_GROUPS=12)
assert whole.metadata.shared <= 113 * 1024, whole.metadata.shared  # for two on a multiprocessor
one_tile(64, 64, HAS_RESIDUAL=True, RESIDUAL_GROUPS=12, STATISTICS=True)
one_tile(128, 128, PARTS=True)
one_tile(64, 128, PDL=False, EARLY=False)
print("compiled")
'''


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
