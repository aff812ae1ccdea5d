"""Fold what is computed from constants, and drop what nothing reads, by onnx-graphsurgeon: Add(2, 3) -> 5.

Only results up to `limit_bytes` are folded, so that a small constant is not blown up into the model. Weights that the
model does not hold are hidden meanwhile: nothing that depends on them is folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelkit.errors import PassError
from accelkit.onnx_weights import hide_weights, restore_weights
from accelkit.pass_api import OnnxPass, PassResult

if TYPE_CHECKING:
    import onnx

_RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
_NUMPY_LACKS = {
    16: "bfloat16",
    17: "float8",
    18: "float8",
    19: "float8",
    20: "float8",
    21: "int4",
    22: "int4",
    23: "float4",
}


@dataclass(frozen=True)
class OnnxGraphSurgeon(OnnxPass):
    """onnx-graphsurgeon's clean-up and constant folding.

    Attributes:
        limit_bytes: largest folded constant.
    """

    limit_bytes: int = 1024

    def run(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
        surgeon = _package()
        result = PassResult()
        if types := sorted({_NUMPY_LACKS[t] for t in _constant_types(model) if t in _NUMPY_LACKS}):
            result.refused("model", f"has {', '.join(types)} constants, which onnx-graphsurgeon does not read")
            return model, result
        hidden = hide_weights(model)
        try:
            cleaned = self._cleaned(surgeon, model, result)
        finally:
            restore_weights(model, hidden)
        if cleaned is None:
            return model, result
        restore_weights(cleaned, hidden)
        return cleaned, result

    def _cleaned(self, surgeon: Any, model: onnx.ModelProto, result: PassResult) -> onnx.ModelProto | None:
        from onnx_graphsurgeon.logger import G_LOGGER

        with G_LOGGER.suppress(G_LOGGER.CRITICAL):
            graph = surgeon.import_onnx(model)
            graph.fold_constants(
                size_threshold=self.limit_bytes, should_exclude_node=lambda node: node.op in _RANDOM, error_ok=False
            )
            cleaned: onnx.ModelProto = surgeon.export_onnx(graph.cleanup().toposort())
        cleaned.metadata_props.extend(model.metadata_props)
        kept = {output for node in cleaned.graph.node for output in node.output}
        for node in model.graph.node:
            if not kept.intersection(node.output):
                result.rewrote(f"{'folded' if _is_folded(node, cleaned) else 'removed'} {node.name or node.output[0]}")
        return cleaned if result.changed else None


def _package() -> Any:
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise PassError('pass onnx_graph_surgeon needs onnx-graphsurgeon: pip install "accelkit[cpu]"') from error
    return onnx_graphsurgeon


def _is_folded(node: onnx.NodeProto, cleaned: onnx.ModelProto) -> bool:
    return any(i.name in node.output for i in cleaned.graph.initializer)


def _constant_types(model: onnx.ModelProto) -> set[int]:
    tensors = [i for i in model.graph.initializer if i.data_location != i.EXTERNAL]
    tensors += [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return {t.data_type for t in tensors}
