"""What computes an attention on a GPU: measured for its shape where it was compiled or tuned for it, else by rule.

    (dtype, sizes, mask, causal, kind) -> one of accelkit.ops.attention.KINDS but "auto", and the Triton kernel's configuration

The rules come from measurements on one H200 (CUDA-graph replays, fp16, heads 64 wide): without a mask the Triton kernel leads
cuDNN, and both lead flash and the efficient kernel, at 196 and 577 keys (benchmarks/results/h200/kernel_choices.json); at 128
cuDNN led in a trial that was not kept. With a mask, PyTorch's kernels want it
written out for every head and query; the Triton kernel reads it as it broadcasts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accelkit.kernels import dependent_launch_on
from accelkit.ops.attention_kinds import refusal_of
from accelkit.tuning.choices import Choices


class AttentionProblem(NamedTuple):
    """What a measured choice holds for.

    Attributes:
        batch, length, heads, width: the query's sizes. keys, key_heads: the key's. value_width: the value's.
        dtype: of the operands. tf32: whether float32's products may run in tf32.
        mask: as `mask_form` says. causal: as in `accelkit.attention`.
        packed: whether the rows of the operands lie apart, as in one product of Q, K and V.
        kind: "auto", or "triton" where that was asked for.
    """

    batch: int
    length: int
    heads: int
    width: int
    keys: int
    key_heads: int
    value_width: int
    dtype: torch.dtype
    tf32: bool
    mask: str
    causal: bool
    packed: bool
    kind: str


class TritonConfig(NamedTuple):
    """`accelkit.kernels.attention.AttentionConfig`, which only a machine with Triton can import."""

    style: str
    block_m: int
    block_n: int
    warps: int
    stages: int
    pdl: bool = False


class AttentionChoice(NamedTuple):
    """A kernel, and the Triton kernel's configuration; None: by rule, or another kernel."""

    kind: str
    config: TritonConfig | None = None


def choice_of(
    kind: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> AttentionChoice:
    """What to run for an attention of this kind; a measured choice that cannot run is passed over."""
    if kind not in ("auto", "triton"):
        return AttentionChoice(kind)
    problem = problem_of(query, key, value, mask, causal, kind)
    tuned = None if problem is None else chosen[query.device, problem]
    if tuned is not None and refusal_of(tuned.kind, query, key, value, mask, causal) is None:
        return tuned
    return AttentionChoice(_by_rule(query, key, value, mask, causal) if kind == "auto" else kind)


def chosen_kind(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> str:
    """The kind to run for "auto"; "math" where no fused kernel takes the operands (PyTorch then picks for itself)."""
    return choice_of("auto", query, key, value, mask, causal).kind


def problem_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, kind: str = "auto"
) -> AttentionProblem | None:
    """The problem of these operands; None where a size is not known yet."""
    batch, length, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    value_width = value.shape[3]
    if not all(isinstance(size, int) for size in (batch, length, heads, width, keys, key_heads, value_width)):
        return None
    dtype = query.dtype
    tf32 = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    packed = query.stride(1) > heads * width or key.stride(1) > key_heads * width
    return AttentionProblem(
        batch, length, heads, width, keys, key_heads, value_width, dtype, tf32, mask_form(mask), causal, packed, kind
    )


def mask_form(mask: Tensor | None) -> str:
    """ "none", or "boolean" or "additive" with "by key" or "by query and key": what decides a mask's cost."""
    if mask is None:
        return "none"
    kind = "boolean" if mask.dtype is torch.bool else "additive"
    by_key = mask.dim() < 2 or (isinstance(mask.shape[-2], int) and mask.shape[-2] == 1)
    return f"{kind} by {'key' if by_key else 'query and key'}"


def default_on(device: torch.device, problem: AttentionProblem) -> AttentionChoice:
    """The rules' choice for a problem, the Triton kernel's configuration written out."""
    kind = problem.kind
    if kind == "auto":
        p = problem
        sizes = (
            (p.batch, p.length, p.heads, p.width),
            (p.batch, p.keys, p.key_heads, p.width),
            (p.batch, p.keys, p.key_heads, p.value_width),
        )
        query, key, value = (torch.empty(size, dtype=p.dtype, device="meta") for size in sizes)
        kind = _by_rule(query, key, value, _mask_of(problem), p.causal)
    return AttentionChoice(kind, _triton_default(device, problem) if kind == "triton" else None)


def candidates_on(device: torch.device, problem: AttentionProblem) -> list[AttentionChoice]:
    """The kernels worth measuring for a problem, the Triton kernel in several configurations."""
    from accelkit.kernels import attention

    p, pdl = problem, dependent_launch_on(device)
    limit = attention.shared_bytes_on(device)
    configs = attention.candidates(p.length, p.keys, p.width, p.dtype, p.causal, p.mask != "none", limit)
    found = [AttentionChoice("triton", TritonConfig(*c)._replace(pdl=pdl)) for c in configs]
    if p.kind == "triton":
        return found
    return list(dict.fromkeys([*kernels_on(device, problem), *found]))


def kernels_on(device: torch.device, problem: AttentionProblem) -> list[AttentionChoice]:
    """Every kernel once, the rules' choice first, the Triton kernel as the rules configure it."""
    from accelkit.ops import attention_kinds
    from accelkit.ops.operator import without_triton

    triton = [AttentionChoice("triton", _triton_default(device, problem))] if without_triton() is None else []
    others = ("cudnn", "flash", "efficient", *(("xformers",) if attention_kinds.without_xformers() is None else ()))
    default = default_on(device, problem)
    return list(dict.fromkeys([default, *triton, *(AttentionChoice(kind) for kind in others)]))


chosen = Choices("attention", AttentionProblem, AttentionChoice, candidates_on)
"""What measuring found, by device and problem; filled by `accelkit.tuning`."""


def _by_rule(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> str:
    for kind in _in_order(query, key, mask):
        if refusal_of(kind, query, key, value, mask, causal) is None:
            return kind
    return "math"


def _in_order(query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[str, ...]:
    if query.dtype is torch.float32:
        return ("efficient", "triton")
    if mask is not None:
        return ("triton", "efficient")
    return (
        ("triton", "cudnn", "flash", "efficient") if key.shape[1] > 128 else ("cudnn", "triton", "flash", "efficient")
    )


def _triton_default(device: torch.device, p: AttentionProblem) -> TritonConfig:
    from accelkit.kernels import attention

    found = attention.default(p.length, p.keys, p.width, p.dtype, p.causal)
    return TritonConfig(*found)._replace(pdl=dependent_launch_on(device))


def _mask_of(p: AttentionProblem) -> Tensor | None:
    """A tensor without memory, of the mask's form."""
    if p.mask == "none":
        return None
    dtype = torch.bool if p.mask.startswith("boolean") else p.dtype
    rows = 1 if p.mask.endswith("by key") else p.length
    return torch.empty((p.batch, 1, rows, p.keys), dtype=dtype, device="meta")
