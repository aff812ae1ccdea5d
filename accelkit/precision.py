"""Precisions: what the arithmetic inside a compiled model runs in: `fp32`, `tf32`, `bf16`, `fp16`, `Int8(...)`, `Fp8(...)`.

Inputs and outputs of a compiled model keep the model's own dtypes, whatever runs inside.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from accelkit.errors import InputError, unknown_name
from accelkit.quantization.calibrators import LEVELS, Calibrator, Percentile, as_calibrator
from accelkit.quantization.schemes import FAMILIES, Scheme, scheme_named


@dataclass(frozen=True, repr=False)
class Precision:
    """One precision: its name, the dtype that floating-point tensors have inside, and what it means in words.

    Attributes:
        name: what `optimize(precision=...)` takes.
        dtype: dtype of floating-point values inside the graph.
        description: one sentence for tables and reports.
    """

    name: str
    dtype: torch.dtype
    description: str
    known: ClassVar[dict[str, Precision]] = {}

    @property
    def epsilon(self) -> float:
        """Spacing of this precision's numbers at 1.0 (tf32 keeps float32's range with 10 bits of mantissa)."""
        return 2.0**-10 if self.name == "tf32" else float(torch.finfo(self.dtype).eps)

    @property
    def overflows(self) -> bool:
        """Whether what float32 holds may lie beyond its range: float16's ends at 65504, bfloat16's where float32's does."""
        return float(torch.finfo(self.dtype).max) < 1e-3 * float(torch.finfo(torch.float32).max)

    @property
    def takes_calibration(self) -> str:
        """What it uses `calibration=` for, in words; empty where for nothing."""
        return "what overflows float16" if self.overflows else ""

    def to_json(self) -> Any:
        """What `as_precision` makes the same value of."""
        return self.name

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name.upper() if self.name in Precision.known else f"Precision({self.name!r}, {self.dtype})"


def _define(name: str, dtype: torch.dtype, description: str) -> Precision:
    Precision.known[name] = precision = Precision(name, dtype, description)
    return precision


FP32 = _define("fp32", torch.float32, "float32 throughout: the model as it is")
TF32 = _define("tf32", torch.float32, "float32 with tensor cores' 10-bit products (NVIDIA GPUs since Ampere)")
BF16 = _define("bf16", torch.bfloat16, "bfloat16: float32's range, 8 bits of precision")
FP16 = _define("fp16", torch.float16, "float16: 11 bits of precision, largest value 65504")


_CALIBRATOR = Percentile()  # FasterTransformer's guide calibrates with 99.99


@dataclass(frozen=True, repr=False)
class Int8(Precision):
    """Products of 8-bit integers where the scheme says so, float32 elsewhere.

    Attributes:
        scheme: which tensors are quantised, and how finely: a name of accelkit.quantization.SCHEMES.
        calibrator: how limits are chosen from what was seen: a value (`Percentile(99.99)`) or a name.
        smooth: SmoothQuant's alpha, from 0 to 1; None: not done.
        keep: what stays in float32: fnmatch patterns over layers' names (`encoder.layer.11.*`), node names, operators.
        activations: "s8" (signed, symmetric) or "u8" (unsigned, with a zero point); None: what the target's kernels want.
        family: "vit" or "bert", where the scheme tells them apart; "auto": by where the norms stand.
    """

    name: str = field(init=False, default="int8")
    dtype: torch.dtype = field(init=False, default=torch.float32)
    description: str = field(init=False, default="8-bit integer products where a scheme says so, float32 elsewhere")
    scheme: str = "qdq"
    calibrator: Calibrator = _CALIBRATOR
    smooth: float | None = None
    keep: tuple[str, ...] = ()
    activations: str | None = None
    family: str = "auto"

    def __post_init__(self) -> None:
        scheme_named(self.scheme)
        object.__setattr__(self, "calibrator", as_calibrator(self.calibrator))
        keep: Any = self.keep
        object.__setattr__(self, "keep", (keep,) if isinstance(keep, str) else tuple(keep))
        if self.smooth is not None and not (isinstance(self.smooth, (int, float)) and 0 <= self.smooth <= 1):
            raise InputError(
                f"Int8(smooth={self.smooth!r}): SmoothQuant's alpha is from 0 to 1, such as 0.5; None: not done"
            )
        for option, value, known in (
            ("activations", self.activations, (None, "s8", "u8")),
            ("family", self.family, ("auto", *FAMILIES)),
        ):
            if value not in known:
                raise InputError(f"Int8({option}={value!r}): known are {', '.join(map(str, known))}")
        if not all(isinstance(pattern, str) for pattern in self.keep):
            raise InputError(f"Int8(keep={self.keep!r}): keep is a tuple of patterns such as 'encoder.layer.11.*'")

    @property
    def table(self) -> Scheme:
        """The scheme's row."""
        return scheme_named(self.scheme)

    @property
    def epsilon(self) -> float:
        """Root mean square of the error of rounding to 8 bits, as a share of the largest magnitude: a step / sqrt(12)."""
        return 1.0 / (LEVELS * 12**0.5)

    @property
    def takes_calibration(self) -> str:
        return "" if self.table.dynamic and self.smooth is None else "the ranges of activations"

    def to_json(self) -> Any:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"name": self.name, **options, "calibrator": self.calibrator.to_json(), "keep": list(self.keep)}

    def __str__(self) -> str:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        changed = [f"{name}={value!r}" for name, value in options.items() if value != getattr(INT8, name)]
        return f"int8({', '.join(changed)})" if changed else "int8"

    def __repr__(self) -> str:
        return "Int8" + (str(self).removeprefix("int8") or "()")


@dataclass(frozen=True, repr=False)
class Fp8(Precision):
    """Products of 8-bit floating-point numbers (e4m3), float32 elsewhere. Attributes as Int8's."""

    name: str = field(init=False, default="fp8")
    dtype: torch.dtype = field(init=False, default=torch.float32)
    description: str = field(init=False, default="8-bit floating-point products (e4m3), on GPUs that have them")
    calibrator: Calibrator = _CALIBRATOR
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibrator", as_calibrator(self.calibrator))

    @property
    def takes_calibration(self) -> str:
        return "the ranges of activations"

    def to_json(self) -> Any:
        return {"name": self.name, "calibrator": self.calibrator.to_json(), "keep": list(self.keep)}

    def __repr__(self) -> str:
        return f"Fp8(calibrator={self.calibrator!r}, keep={self.keep!r})"


INT8 = Precision.known["int8"] = Int8()
FP8 = Precision.known["fp8"] = Fp8()


def needs_calibration(precision: Precision) -> bool:
    """Whether nothing can be built without calibration data; fp16 does without."""
    return bool(precision.takes_calibration) and isinstance(precision, (Int8, Fp8))


def as_precision(value: Any) -> Precision:
    """The Precision for a name, for what `to_json` gave, or the value itself.

    Raises:
        InputError: no such precision; the message lists the known ones.
    """
    if isinstance(value, Precision):
        return value
    if isinstance(value, dict):  # what to_json gave
        kinds: dict[str, Any] = {"int8": Int8, "fp8": Fp8}
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "name"}
        if value.get("name") not in kinds:
            raise unknown_name("precision", value.get("name"), list(Precision.known))
        return kinds[value["name"]](**options)  # type: ignore[no-any-return]
    if isinstance(value, type) and issubclass(value, Precision):
        raise InputError(f"precision must be a name or a Precision value; did you mean {value.__name__}()?")
    if not isinstance(value, str):
        raise InputError(f"precision must be a name or a Precision value, not {type(value).__name__}")
    if value not in Precision.known:
        raise unknown_name("precision", value, list(Precision.known))
    return Precision.known[value]
