"""Whether a built engine runs in the precision that was asked for.

Proof, what was asked, what stays in float32 on purpose --> sentences for the report, or a LoweringError
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from accelkit.backends.tensorrt.proof import (
    PRODUCT,
    REGION,
    UNKNOWN,
    Layer,
    Proof,
    largest_first,
    onnx_nodes,
    percent,
    short,
)
from accelkit.errors import LoweringError

TOLERATED_SHARE = 0.05
"""Of the products' time, in a wider precision than asked: TensorRT 8.6 takes a float32 kernel for a tiny product where that is
faster. Such layers are listed; a narrower precision than asked is always an error."""
_WIDTH = {"int8": 1, "fp8": 1, "bf16": 2, "fp16": 2, "tf32": 3, "fp32": 4, "fp64": 8}
_WIDE = ("fp32", "tf32")


class WiderPrecisionError(LoweringError):
    """Matrix products run in a wider precision than asked for, and none in a narrower one."""


def require_precision(
    proof: Proof, asked: str, keep_fp32: Iterable[str] = (), wide: Collection[str] = ()
) -> tuple[str, ...]:
    """Refuse an engine whose matrix products run in another precision than asked.

    Layers that hold one of the ONNX nodes in `keep_fp32` may run in fp32. With `tf32` asked, fp32 is fine.

    Args:
        wide: ONNX nodes of the products that are summed in float32 for accuracy (accumulation.py): these run in fp32 or tf32,
            or in a kernel that sums in fp32. Fused regions do not tell which of their kernels are theirs.

    Returns:
        sentences for the report, about products in a wider precision.

    Raises:
        WiderPrecisionError, LoweringError: it names the layers and their precisions.
    """
    kept, chosen = set(keep_fp32), set(wide)
    products = [layer for layer in proof.layers if layer.kind in (PRODUCT, REGION) and layer.precision is not None]
    allowed = {asked, "fp32"} if asked == "tf32" else {asked}

    def on_purpose(layer: Layer) -> bool:
        nodes = set(onnx_nodes(layer.name))
        if layer.precision in _WIDE and chosen and (layer.kind == REGION or chosen & nodes):
            return True
        return layer.precision == "fp32" and bool(kept & nodes)

    wrong = [layer for layer in products if layer.precision not in allowed and not on_purpose(layer)]
    if not wrong and chosen:
        kernels = {p: ms for p, ms in (proof.kernels or {}).items() if p not in _WIDE}
        return (
            _wide_products(proof, asked, chosen),
            *_require_kernels(replace(proof, kernels=kernels), asked, allowed, True),
        )
    if not wrong:
        return _require_kernels(proof, asked, allowed, bool(kept))
    worse = [layer for layer in wrong if _WIDTH[str(layer.precision)] <= _WIDTH[asked]]
    share = _share(wrong, products)
    listed = ", ".join(f"{short(layer.name)} in {layer.precision}" for layer in (worse or wrong)[:5])
    more = f" and {len(worse or wrong) - 5} more" if len(worse or wrong) > 5 else ""
    if worse or share > TOLERATED_SHARE:
        raise (LoweringError if worse else WiderPrecisionError)(
            f"{asked} was asked for, and TensorRT built {len(worse or wrong)} of {len(products)} matrix-product layers in another "
            f"precision ({listed}{more}; {share:.0%} of the products' time): ask for precision={(worse or wrong)[0].precision!r} "
            "if that will do, or build with another optimization_level"
        )
    return (f"{len(wrong)} matrix products run in a wider precision, being faster so ({share:.1%}): {listed}{more}",)


def _wide_products(proof: Proof, asked: str, chosen: set[str]) -> str:
    """What was asked of the products in `chosen`, and what of it the engine shows."""
    said = f"{asked}, with {len(chosen)} product{'s' * (len(chosen) > 1)} summed in float32 for accuracy"
    shown = {p: ms for p, ms in (proof.kernels or {}).items() if p in _WIDE}
    if (sums := (proof.sums or {}).get("fp32")) is not None:
        shown[f"{asked} summed in fp32"] = sums
    if shown:
        listed = ", ".join(f"{what} {ms:.3g} ms" for what, ms in largest_first(shown))
        return f"{said}: the kernels that ran show {listed}"
    layers = [layer for layer in proof.layers if layer.precision in _WIDE and chosen & set(onnx_nodes(layer.name))]
    if layers:
        return f"{said}: {len(layers)} layers with them run in {', '.join(sorted({str(y.precision) for y in layers}))}"
    return f"{said}: no kernel's or layer's name shows it"


def _require_kernels(proof: Proof, asked: str, allowed: set[str], kept: bool) -> tuple[str, ...]:
    """The same for the kernels inside fused regions, which belong to no layer that is shown."""
    kernels = dict(proof.kernels or {})
    total, wrong = sum(kernels.values()), {p: ms for p, ms in kernels.items() if p not in {*allowed, UNKNOWN}}
    if not wrong:
        return ()
    listed = ", ".join(f"{precision} {percent(ms, total)}" for precision, ms in largest_first(wrong))
    worse = any(_WIDTH[precision] <= _WIDTH[asked] for precision in wrong)
    if worse or (sum(wrong.values()) > TOLERATED_SHARE * total and not kept):
        raise (LoweringError if worse else WiderPrecisionError)(
            f"{asked} was asked for, and matrix-product kernels inside TensorRT's fused regions run in another precision "
            f"({listed} of {total:.3g} ms): ask for precision={largest_first(wrong)[0][0]!r} if that will do, or build with "
            "another optimization_level"
        )
    why = "where the graph says so" if kept else "being faster so"
    return (f"some matrix products inside fused regions run in a wider precision, {why}: {listed} of {total:.3g} ms",)


def _share(some: Sequence[Layer], all_layers: Sequence[Layer]) -> float:
    total = sum(layer.ms or 0.0 for layer in all_layers)
    if total:
        return sum(layer.ms or 0.0 for layer in some) / total
    return len(some) / len(all_layers)
