"""accelkit.attention(q, k, v, ...) -> accelkit.attention(q, k, v, ..., kind)

Which kernel computes each attention: "cudnn", "flash", "efficient" (PyTorch's), "xformers", "triton" (accelkit's own),
"math" (matmul, softmax, matmul), or "auto", which leaves the choice to accelkit: measured per shape where tuned, by
rules otherwise. Not in the default pipeline, whose attentions are "auto": kernels beat plain attention by 12 times and lose to
one another by 1.4, and which one wins depends on the shape.

Each kernel's constraints (dtype, head width, mask, grouped heads, device) are checked first; an attention that a kernel
cannot take is refused with the reason and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from accelkit import ops
from accelkit.errors import unknown_name
from accelkit.graph import bound_arguments, val
from accelkit.ops import attention_kinds
from accelkit.pass_api import GraphPass, PassResult

ATTENTION = ops.attention.OPERATOR.overload


@dataclass(frozen=True)
class SwapAttention(GraphPass):
    """Choose the kernel that computes attention.

    Attributes:
        kind: auto, triton, cudnn, flash, efficient, xformers or math.

    Raises:
        InputError: an unknown kind.
    """

    kind: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in ops.attention.KINDS:
            raise unknown_name("attention kind", self.kind, ops.attention.KINDS)

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in graph.graph.nodes:
            if node.target is not ATTENTION:
                continue
            bound = bound_arguments(node) or {}
            if bound["kind"] == self.kind:
                continue
            if (reason := self._refusal(bound)) is not None:
                result.refused(node, reason)
                continue
            node.args = (*(value for name, value in bound.items() if name != "kind"), self.kind)
            node.kwargs = {}
            result.rewrote(f"{node.name}: {bound['kind']} -> {self.kind}")
        return result

    def _refusal(self, bound: dict[str, object]) -> str | None:
        if self.kind == "auto":
            return None
        query, key, value = (_fake(bound[name]) for name in ("query", "key", "value"))
        mask = None if bound["mask"] is None else _fake(bound["mask"])
        reason = attention_kinds.refusal_of(self.kind, query, key, value, mask, bool(bound["causal"]))
        if reason is None and self.kind != "math" and query.device.type != "cuda":
            return f"{self.kind} attention runs on an NVIDIA GPU, and the model is on the {query.device}"
        return reason


def _fake(node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    value = val(node)
    assert isinstance(value, torch.Tensor)
    return value
