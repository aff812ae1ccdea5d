"""Which precision the layers of a built engine really run in, and for how long: read back, never repeated from what was asked.

    inspector's layers + IProfiler's times (+ the kernels that ran, for fused regions) --> Proof --> report, judging.py

A layer's evidence, strongest first: the kernel's name (`..._f16f16_f16f32_f32_...`), the dtype of its weights, the dtypes of
its floating-point tensors where they are all the same. A fused region of Myelin (`{ForeignNode[...]}`, TensorRT 8's way with
transformers) shows its borders only, which prove nothing about its inside: it counts as not told, unless all matrix-product
kernels of the whole run (torch.profiler's list) are of one precision; then the region's are too. Not told is said, not guessed.
Layers that only move data, and those on integers, count for nothing: `movement`.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelkit.backends.tensorrt.kernel_names import arithmetic, sums_in

PRODUCT, REGION, OTHER, MOVEMENT = "product", "region", "other", "movement"
UNKNOWN = "unknown precision"
_MOVES = (
    "reformat", "noop", "no-op", "constant", "shuffle", "slice", "gather", "concat", "copy", "identity", "shape", "signal", "wait",
    "memset", "cast", "move", "devicetoshapehost", "shapehosttodevice", "fill", "nonzero", "trainstation", "padding",
)  # fmt: skip
_PRODUCTS = (
    "gemm",
    "matrixmultiply",
    "matrix_multiply",
    "convolution",
    "caskconv",
    "deconvolution",
    "fullyconnected",
    "mha",
    "fc",
)
_FORMATS = (
    ("bf16", re.compile(r"\bbf16\b|bfloat16", re.I)), ("fp16", re.compile(r"\bfp16\b|\bhalf\b", re.I)),
    ("fp8", re.compile(r"\bfp8\b", re.I)), ("int8", re.compile(r"\bint8\b", re.I)),
    ("fp32", re.compile(r"\bfp32\b|\bfloat(?:32)?\b", re.I)),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A layer of the built engine.

    Attributes:
        name: TensorRT's: the ONNX nodes in it.
        kind: `product` (matrix product, convolution, attention), `region` (fused, its inside not shown), `other`, `movement`.
        precision: of its arithmetic; None where nothing tells.
        ms: time of one run on the example; None where it was not measured.
    """

    name: str
    kind: str
    precision: str | None
    ms: float | None = None


@dataclass(frozen=True)
class Proof:
    """What was read back.

    Attributes:
        layers: in the engine's order.
        kernels: precision -> ms, of the matrix-product kernels that one run launched (`unknown precision` where their names do
            not tell); empty where kernels were not listed.
        notes: what could not be obtained, and why.
        sums: of the fp16 kernels among those, precision -> ms by what they sum in, as far as their names tell.
    """

    layers: tuple[Layer, ...] = ()
    kernels: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()
    sums: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proof:
        return cls(
            tuple(Layer(**layer) for layer in data["layers"]), data["kernels"], tuple(data["notes"]), data.get("sums")
        )

    def counted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind != MOVEMENT]

    def precisions(self) -> dict[str, int]:
        """Precision -> number of layers in it, `unknown precision` among them; movement does not count."""
        return dict(Counter(layer.precision or UNKNOWN for layer in self.counted()).most_common())

    def sentences(self) -> list[str]:
        """For the report."""
        said = [text] if (text := self._shares()) else []
        if self.kernels:
            total = sum(self.kernels.values())
            shares = ", ".join(f"{name} {percent(ms, total)}" for name, ms in largest_first(self.kernels))
            said.append(f"matrix-product kernels that ran, by their names: {shares} of {total:.3g} ms")
        if self.sums:
            shares = ", ".join(f"{name} {ms:.3g} ms" for name, ms in largest_first(self.sums))
            said.append(f"fp16 products are summed in: {shares}")
        regions = [layer for layer in self.layers if layer.kind == REGION]
        if regions:
            told = sum(layer.precision is not None for layer in regions)
            how = (
                "told by the kernels that ran"
                if told
                else "which show their borders only, so their precision is not told"
            )
            said.append(f"{len(regions)} fused region{'s' * (len(regions) > 1)} of TensorRT's, {how}")
        return [*said, *self.notes]

    def _shares(self) -> str:
        layers = self.counted()
        if not layers:
            return ""
        timed = [layer for layer in layers if layer.ms is not None]
        total = sum(layer.ms or 0.0 for layer in timed)
        parts = []
        for precision, count in self.precisions().items():
            ms = sum(layer.ms or 0.0 for layer in timed if (layer.precision or UNKNOWN) == precision)
            time = f", {percent(ms, total)} of the time" if total else ""
            parts.append(f"{precision}: {percent(count, len(layers))} of {len(layers)} layers{time}")
        moved = sum(layer.ms or 0.0 for layer in self.layers if layer.kind == MOVEMENT)
        return "; ".join(parts) + (f" ({total:.3g} ms, and {moved:.3g} ms of moving data)" if total else "")


# --- reading


def layers_of(information: str, arithmetic_32: str = "fp32") -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers in the inspector's JSON (`get_engine_information`), and notes on what it does not tell.

    Args:
        information: the text; of an engine built without detailed verbosity it has names only.
        arithmetic_32: what a product on float32 tensors is where its kernel has no telling name: `fp32`; "" where the builder
            was free to use tf32.
    """
    try:
        data = json.loads(information, strict=False)  # 8.6 leaves control characters in names
    except ValueError as error:
        return (), (f"TensorRT's list of layers cannot be read ({error}), so precisions are not told",)
    found = data.get("Layers", data.get("layers", [])) if isinstance(data, dict) else data
    if not isinstance(found, list):
        return (), ("TensorRT's list of layers has a form that is not known, so precisions are not told",)
    layers = tuple(_layer(entry, arithmetic_32) for entry in found)
    notes: tuple[str, ...] = ()
    if found and all(isinstance(entry, str) for entry in found):
        notes = ("the engine tells the names of its layers only, so precisions are not told",)
    return layers, notes


def _layer(entry: Any, arithmetic_32: str) -> Layer:
    if not isinstance(entry, dict):
        return Layer(str(entry), _kind_by_name(str(entry)), None)
    name = str(entry.get("Name", ""))
    tactic = str(entry.get("TacticName", ""))
    borders = [_formats(entry.get(side)) for side in ("Inputs", "Outputs")]
    floats = set().union(*borders)
    kind = _kind(entry, name, tactic)
    if kind != MOVEMENT and not floats and (entry.get("Inputs") or entry.get("Outputs")):
        kind = MOVEMENT if kind == OTHER and _typed(entry) else kind  # on integers and booleans alone
    if kind in (MOVEMENT, REGION):
        return Layer(name, kind, None)
    by_name = arithmetic(tactic)
    if by_name.precision is not None:
        return Layer(name, PRODUCT, by_name.precision)
    if kind == PRODUCT:
        weights = entry.get("Weights")
        stored = _formats([{"Format/Datatype": weights.get("Type", "")}]) if isinstance(weights, dict) else set()
        evidence = borders[0] | stored
        return Layer(name, kind, _only(evidence, arithmetic_32))
    return Layer(name, kind, _only(floats, "fp32"))


def _only(evidence: set[str], arithmetic_32: str) -> str | None:
    if len(evidence) != 1:
        return None
    (one,) = evidence
    return (arithmetic_32 or None) if one == "fp32" else one


def _kind(entry: Mapping[str, Any], name: str, tactic: str) -> str:
    types = [str(entry.get(key, "")).lower().replace(" ", "") for key in ("LayerType", "ParameterType")]
    if "myelin" in types[0] or name.startswith("{ForeignNode["):
        return REGION
    if any(word in one for one in types for word in _PRODUCTS) or arithmetic(tactic).product:
        return PRODUCT
    if any(one.startswith(word) or one.endswith(word) for one in types if one for word in _MOVES):
        return MOVEMENT
    return _kind_by_name(name)


def _kind_by_name(name: str) -> str:
    if name.startswith("{ForeignNode["):
        return REGION
    if name.startswith(("Reformatting CopyNode", "[trainStation", "__mye")) or name.endswith("[DevicetoShapeHostCopy]"):
        return MOVEMENT
    return PRODUCT if "mha" in name.lower() else OTHER


def _formats(tensors: Any) -> set[str]:
    """Floating-point precisions of tensors, by the words `Row major linear FP16 format` (8.x) or `Half` (10 and later)."""
    found = set()
    for tensor in tensors if isinstance(tensors, list) else ():
        text = _format(tensor)
        found |= {precision for precision, pattern in _FORMATS if pattern.search(text)}
    return found


def _format(tensor: Any) -> str:
    return str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))) if isinstance(tensor, dict) else ""


def _typed(entry: Mapping[str, Any]) -> bool:
    sides = [t for side in ("Inputs", "Outputs") for t in entry.get(side) or ()]
    return bool(sides) and all(_format(tensor) not in ("", "N/A") for tensor in sides)


def onnx_nodes(name: str) -> list[str]:
    """The ONNX nodes that a layer's name lists: `a + PWN(b, c)` has a, b and c."""
    return [
        part
        for part in re.split(r"\s*\+\s*|PWN\(|\s*,\s*|\)+|\(+|\[ONNX Layer: |\]|\{ForeignNode\[|\.\.\.|\}", name)
        if part
    ]


def short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:60]}...{name[-17:]}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def largest_first(amounts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(amounts.items(), key=lambda item: -item[1])


# --- combining


def with_times(layers: Sequence[Layer], times: Mapping[str, Sequence[float]]) -> tuple[Layer, ...]:
    """The layers with the shortest time that the profiler reported for each name, in ms."""
    return tuple(replace(layer, ms=min(times[layer.name])) if times.get(layer.name) else layer for layer in layers)


def with_kernels(layers: Sequence[Layer], kernels: Mapping[str, float]) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """The layers, their regions told where all product kernels are of one precision; and the products' ms by precision.

    Args:
        kernels: name -> ms of every kernel that one run launched.
    """
    found: dict[str, float] = defaultdict(float)
    for name, ms in kernels.items():
        product, precision = arithmetic(name)
        if product:
            found[precision or UNKNOWN] += ms
    if len(found) != 1 or UNKNOWN in found:
        return tuple(layers), dict(found)
    (one,) = found
    return tuple(replace(layer, precision=one) if layer.kind == REGION else layer for layer in layers), dict(found)


def sums_of(kernels: Mapping[str, float]) -> dict[str, float]:
    """Precision -> ms of the fp16 products that are summed in it."""
    found: dict[str, float] = defaultdict(float)
    for name, ms in kernels.items():
        if arithmetic(name).precision == "fp16" and (sums := sums_in(name)) is not None:
            found[sums] += ms
    return dict(found)


def prove(
    information: str,
    kernels: Callable[[], Mapping[str, float]],
    times: Callable[[], Mapping[str, Sequence[float]]],
    precision: str,
) -> Proof:
    """Everything together.

    Args:
        information: the inspector's JSON.
        kernels: gives kernel's name -> ms for one run; called only where fused regions leave something open, and first: the
            profiler's own work would be among them. May raise RuntimeError: then that is noted.
        times: gives layer's name -> ms of each profiled run.
        precision: what the builder was asked for.
    """
    layers, notes = layers_of(information, "" if precision == "tf32" else "fp32")
    products: dict[str, float] | None = None
    sums: dict[str, float] | None = None
    if any(layer.kind == REGION for layer in layers):
        try:
            ran = kernels()
            layers, products = with_kernels(layers, ran)
            sums = sums_of(ran)
        except RuntimeError as error:
            notes = (*notes, f"the kernels inside fused regions could not be listed: {error}")
    if measured := times():
        layers = with_times(layers, measured)
    else:
        notes = (*notes, "TensorRT's profiler reported no times")
    return Proof(layers, products, notes, sums)
