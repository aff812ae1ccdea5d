"""accelkit.attention(q, k, v, ...) -> accelkit.attention(q, k, v, ..., kind)      or, for a pattern:

    accelkit.attention(q, k, v) -> accelkit.sparse_attention(q, k, v, the pattern's mask)

Which kernel computes each attention: "cudnn", "flash", "efficient" (PyTorch's), "xformers", "triton" (accelkit's own),
"math" (matmul, softmax, matmul), or "auto", which leaves the choice to accelkit: a pass cannot measure, so the target does,
for each shape that it compiles for (fastertransformer on a GPU; its lines in the report have every kernel's time). Elsewhere
what was measured before holds, and rules where nothing was. Not in the default pipeline, whose attentions are "auto": kernels
beat plain attention by 12 times and lose to one another by 1.4, and which one wins depends on the shape.

A pattern (accelkit.attention_patterns) makes attention sparse, as xFormers' did: tokens attend to those that the pattern
allows only. That is another model, so it happens on request only, and the report says so.

Each kernel's constraints (dtype, head width, mask, grouped heads, device) are checked first; an attention that a kernel or a
pattern does not fit is refused with the reason and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from accelkit import ops
from accelkit.attention_patterns import Custom, Pattern
from accelkit.errors import unknown_name
from accelkit.graph import bound_arguments, set_attribute, val
from accelkit.ops import attention_kinds
from accelkit.pass_api import GraphPass, PassResult

ATTENTION = ops.attention.OPERATOR.overload
SPARSE = ops.sparse_attention.OPERATOR.overload
_UNRECOGNISED = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class SwapAttention(GraphPass):
    """Choose the kernel that computes attention.

    Attributes:
        kind: auto, triton, cudnn, flash, efficient, xformers or math; or a pattern of accelkit.attention_patterns, or a
            boolean tensor [length, length] (True: the row's token attends to the column's), for sparse attention.

    Raises:
        InputError: an unknown kind, or a tensor that is no mask.
    """

    kind: str | Pattern | torch.Tensor = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.kind, torch.Tensor):
            object.__setattr__(self, "kind", Custom(self.kind))
        if not isinstance(self.kind, Pattern) and self.kind not in ops.attention.KINDS:
            raise unknown_name("attention kind", self.kind, ops.attention.KINDS)

    @property
    def changes_meaning(self) -> str | None:
        if not isinstance(self.kind, Pattern):
            return None
        return "tokens attend to those that the pattern allows only"

    def run(self, graph: fx.GraphModule) -> PassResult:
        if isinstance(self.kind, Pattern):
            return _Sparse(graph, self.kind).run()
        result, kind = PassResult(), str(self.kind)
        for node in graph.graph.find_nodes(op="call_function", target=ATTENTION):
            bound = bound_arguments(node) or {}
            if bound["kind"] == kind:
                continue
            if (reason := _no_kernel(kind, bound)) is not None:
                result.refused(node, reason)
                continue
            node.args = (*(value for name, value in bound.items() if name != "kind"), kind)
            node.kwargs = {}
            result.rewrote(f"{node.name}: {bound['kind']} -> {kind}")
        return result


def _no_kernel(kind: str, bound: dict[str, object]) -> str | None:
    if kind == "auto":
        return None
    query, key, value = (_fake(bound[name]) for name in ("query", "key", "value"))
    mask = None if bound["mask"] is None else _fake(bound["mask"])
    reason = attention_kinds.refusal_of(kind, query, key, value, mask, bool(bound["causal"]))
    if reason is None and kind != "math" and query.device.type != "cuda":
        return f"{kind} attention runs on an NVIDIA GPU, and the model is on the {query.device}"
    return reason


class _Sparse:
    """One run over a graph: masks are made once a length and device."""

    def __init__(self, graph: fx.GraphModule, pattern: Pattern) -> None:
        self._graph, self._pattern = graph, pattern
        self._masks: dict[tuple[int, torch.device], tuple[str, str]] = {}

    def run(self) -> PassResult:
        result = PassResult()
        for node in self._graph.graph.find_nodes(op="call_function", target=_UNRECOGNISED):
            result.refused(node, "recognise_attention has to run before, and has left it as it is")
        for node in self._graph.graph.find_nodes(op="call_function", target=ATTENTION):
            bound = bound_arguments(node) or {}
            if (reason := self._refusal(bound)) is not None:
                result.refused(node, reason)
                continue
            query = _fake(bound["query"])
            name, share = self._mask(int(query.shape[1]), query.device)
            with self._graph.graph.inserting_before(node):
                allowed = self._graph.graph.get_attr(name)
            node.target, node.kwargs = SPARSE, {}
            node.args = (bound["query"], bound["key"], bound["value"], allowed, bound["scale"])
            result.rewrote(f"{node.name}: {share} of the pairs of tokens")
        return result

    def _refusal(self, bound: dict[str, object]) -> str | None:
        if bound["mask"] is not None or bound["causal"]:
            return "its own mask says who attends to whom, and a pattern would take its place"
        lengths: list[object] = [_fake(bound[name]).shape[1] for name in ("query", "key")]
        length, keys = lengths
        if not isinstance(length, int) or not isinstance(keys, int):
            return f"a pattern is made for one length, and this one's is dynamic ({length} to {keys} tokens)"
        if length != keys:
            return f"a pattern says who attends to whom among the same tokens, not from {length} to {keys}"
        if (reason := self._pattern.why_not(length)) is not None:
            return f"the pattern does not fit: {reason}"
        return None

    def _mask(self, length: int, device: torch.device) -> tuple[str, str]:
        if (length, device) not in self._masks:
            mask = self._pattern.mask(length)
            share = f"{100 * float(mask.double().mean()):.3g} %"
            name = set_attribute(self._graph, "attention_pattern", mask.to(device))
            self._masks[length, device] = (name, share)
        return self._masks[length, device]


def _fake(node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    value = val(node)
    assert isinstance(value, torch.Tensor)
    return value
