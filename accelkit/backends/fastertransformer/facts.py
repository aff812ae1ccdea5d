"""What an engine says of its operators: the precisions they run in, the fused ones, and why a kernel does not run."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from accelkit.backends.eager import result_type
from accelkit.backends.fastertransformer.prepare import why_no_kernel
from accelkit.ops import operator_of

_PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv", "einsum", "attention", "patch_embedding")


def precisions(graph: fx.GraphModule, tf32: bool) -> dict[str, int]:
    """Precision name -> number of operators whose result is in it; with `tf32`, float32 products are."""
    counts: Counter[str] = Counter()
    for node in graph.graph.nodes:
        name = result_type(node) if node.op == "call_function" else None
        if name is not None:
            counts["tf32" if tf32 and name == "fp32" and _is_product(node) else name] += 1
    return dict(counts)


def _is_product(node: fx.Node) -> bool:
    return any(word in str(node.target) for word in _PRODUCTS)


def operator_notes(graph: fx.GraphModule, device: torch.device) -> tuple[str, ...]:
    """Sentences: how many fused operators there are, and those that run their plain definitions, by reason."""
    fused = [(node, operator) for node in graph.graph.nodes if (operator := operator_of(node)) is not None]
    if not fused:
        return ("no fused operators in the graph: PyTorch's own run",)
    notes = [f"fused operators: {_counted(Counter(o.name for _, o in fused))}"]
    if device.type != "cuda":
        return (*notes, "on a CPU fused operators run their plain definitions")
    by_reason: dict[str, Counter[str]] = {}
    for node, operator in fused:
        if (reason := why_no_kernel(node)) is not None:
            by_reason.setdefault(reason, Counter())[operator.name] += 1
    notes += [f"{_counted(names)} run as plain PyTorch: {reason}" for reason, names in by_reason.items()]
    return tuple(notes)


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
