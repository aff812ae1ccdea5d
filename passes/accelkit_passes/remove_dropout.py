"""Dropout that is off goes.

    dropout(x, p, train=False)  ->  x          likewise p=0, and feature_dropout, alpha_dropout, native_dropout
    dropout(x, p, train=True)   ->  itself: a captured dropout that is on (Monte Carlo dropout) is the model's own;
                                    RemoveDropout(even_active=True) removes it all the same
    scaled_dot_product_attention(q, k, v, dropout_p=p)  ->  kept, or dropout_p=0.0 with even_active=True

Why: the graph is captured in eval mode, so that nearly every dropout does nothing but stand between the operators that
fusions look for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from accelkit.graph import bound_arguments
from accelkit.pass_api import GraphPass, PassResult, Refused
from accelkit_passes._proofs import sharing_problem

aten = torch.ops.aten
_DROPOUTS = frozenset({
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
    aten.native_dropout.default,
})  # fmt: skip


@dataclass(frozen=True)
class RemoveDropout(GraphPass):
    """Remove dropout that is off.

    Attributes:
        even_active: remove dropout that is on too: the results then stop being random, so the model is another one.
    """

    even_active: bool = False

    def run(self, graph: fx.GraphModule) -> PassResult:
        result = PassResult()
        for node in list(graph.graph.nodes):
            arguments = bound_arguments(node) if node.op == "call_function" else None
            if arguments is None or not (node.target in _DROPOUTS or "dropout_p" in arguments):
                continue
            try:
                rewritten = self._attention(node) if "dropout_p" in arguments else self._dropout(graph, node)
            except Refused as refusal:
                result.refused(node, str(refusal))
                continue
            if rewritten:
                result.rewrote(node)
        return result

    def _require_off(self, p: float, on: bool) -> None:
        if on and not self.even_active:
            raise Refused(
                f"it is on (p={p}) in the captured model; RemoveDropout(even_active=True) removes it all the same"
            )

    def _attention(self, node: fx.Node) -> bool:
        assert isinstance(node.target, torch._ops.OpOverload)
        p = (bound_arguments(node) or {})["dropout_p"]
        if p == 0:
            return False
        self._require_off(p, on=True)
        position = [argument.name for argument in node.target._schema.arguments].index("dropout_p")
        if position < len(node.args):
            node.update_arg(position, 0.0)
        else:
            node.update_kwarg("dropout_p", 0.0)
        return True

    def _dropout(self, graph: fx.GraphModule, node: fx.Node) -> bool:
        source, p, train = (bound_arguments(node) or {}).values()
        on = train is not False and p != 0  # native_dropout's train=None means on
        self._require_off(p, on)
        results = [node]
        if node.target is aten.native_dropout.default:
            results = list(node.users)  # torch.export takes all results apart, also those that nobody reads
            if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in results):
                raise Refused("its mask is used")
        # off, dropout returns its input itself; native_dropout, and any dropout that is on, returns a copy
        if (on or node.target is aten.native_dropout.default) and (problem := sharing_problem(graph, node, source)):
            raise Refused(problem)
        for one in results:
            one.replace_all_uses_with(source)
            graph.graph.erase_node(one)
        if node not in results:
            graph.graph.erase_node(node)
        return True
