"""The attention kernels compile for Hopper on any machine: the interpreter takes what the compiler does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

PROGRAM = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accelkit.kernels import attention, rows
from accelkit.kernels.attention_kernels import dense_kernel, variable_length_kernel
from accelkit.kernels.attention_one_pass import one_pass_kernel
from accelkit.kernels.norms_kernels import embedding_kernel, norm_kernel, wide_norm_kernel

def compile(kernel, config, pointers, **constants):
    """Every argument that is no constant is a pointer, a float or an aligned integer, by its name."""
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        elif name.endswith("_desc"):
            signature[name] = pointers[name]
        elif name in ("scale", "eps"):
            signature[name] = "fp32"
        else:
            signature[name] = pointers.get(name, "*fp16") if name.endswith("_ptr") else "i32"
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
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
    compile(kernel, Config("", 1, 1, 4, 1), {**numbers, "mask_ptr": "*u8"}, BLOCK=128)
for kernel in (rows.pack_kernel, rows.unpack_kernel):
    compile(kernel, Config("", 1, 1, 4, 1), numbers, ROWS=4, BLOCK=1024)
print("compiled")
'''


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout.strip() == "compiled", result.stderr[-3000:]
