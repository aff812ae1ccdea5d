"""Run onnxoptimizer's rewrites over the ONNX model: Identity(x) -> x, Transpose(Transpose(x)) -> Transpose(x), ...

The exporter leaves shape arithmetic, identities and duplicates behind that hide patterns from a runtime's own
fusions. The default list holds only rewrites that depend on the graph's structure and on small constants; large
weights are hidden from onnxoptimizer meanwhile (with their values absent, its `eliminate_duplicate_initializer` takes
all of one shape for equal), so adding others to the list is safe too, but they do not see weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelkit.errors import PassError
from accelkit.onnx_weights import hide_weights, restore_weights
from accelkit.pass_api import OnnxPass, PassResult

if TYPE_CHECKING:
    import onnx

DEFAULT = (
    "eliminate_identity", "eliminate_nop_cast", "eliminate_nop_dropout", "eliminate_nop_flatten", "eliminate_nop_pad",
    "eliminate_nop_transpose", "eliminate_nop_concat", "eliminate_nop_split", "eliminate_consecutive_idempotent_ops",
    "eliminate_if_with_const_cond", "fuse_consecutive_transposes", "fuse_consecutive_squeezes",
    "fuse_consecutive_unsqueezes", "fuse_transpose_into_gemm", "fuse_add_bias_into_conv",
    "eliminate_common_subexpression", "eliminate_deadend", "eliminate_unused_initializer",
)  # fmt: skip
_ROUNDS = 10


@dataclass(frozen=True)
class OnnxOptimizer(OnnxPass):
    """onnxoptimizer's passes, in order, until none changes anything.

    Attributes:
        passes: names as onnxoptimizer.get_available_passes() gives them.
    """

    passes: tuple[str, ...] = DEFAULT

    def run(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
        optimizer = _package()
        known = optimizer.get_available_passes()
        if unknown := [p for p in self.passes if p not in known]:
            raise PassError(f"onnxoptimizer has no pass {unknown}; it has {', '.join(sorted(known))}")
        result = PassResult()
        if model.functions:
            result.refused("model", f"has {len(model.functions)} local functions, which onnxoptimizer drops")
            return model, result
        hidden = hide_weights(model)
        try:
            model = self._until_stable(optimizer, model, result)
        finally:
            restore_weights(model, hidden)
        return model, result

    def _until_stable(self, optimizer: Any, model: onnx.ModelProto, result: PassResult) -> onnx.ModelProto:
        try:
            current = optimizer.optimize(model, ["nop"])
        except RuntimeError as error:  # an operator or type that its own graph form does not know
            result.refused("model", f"onnxoptimizer cannot read it: {str(error).splitlines()[0]}")
            return model
        for _ in range(_ROUNDS):
            before = _form(current)
            if _form(optimizer.optimize(current, list(self.passes))) == before:
                break
            for name in self.passes:  # one by one, for the ledger
                optimized = optimizer.optimize(current, [name])
                after = _form(optimized)
                if after != before:
                    result.rewrote(f"{name}: {_difference(current, optimized)}")
                    current, before = optimized, after
        return current if result.changed else model


def _package() -> Any:
    try:
        import onnxoptimizer
    except ImportError as error:
        raise PassError('pass onnx_optimizer needs onnxoptimizer: pip install "accelkit[cpu]"') from error
    return onnxoptimizer


def _form(model: onnx.ModelProto) -> tuple[bytes, ...]:
    """What the model computes; type annotations (value_info) do not count."""
    return tuple(n.SerializeToString(deterministic=True) for n in [*model.graph.node, *model.graph.initializer])


def _difference(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    names_after = {output for n in after.graph.node for output in n.output}
    gone = [n.name or n.output[0] for n in before.graph.node if not names_after.intersection(n.output)]
    if gone:
        return f"removed {', '.join(gone[:5])}{f' and {len(gone) - 5} more' if len(gone) > 5 else ''}"
    constants = len(before.graph.initializer) - len(after.graph.initializer)
    return f"removed {constants} unused constants" if constants > 0 else "rewired"
