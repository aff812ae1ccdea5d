"""Rounds tensors of a graph to 8 bits: the nodes that calibrate_int8 puts in.

    x       ->  dequantize_per_tensor(quantize_per_tensor(x, scale, zero point))
    weight  ->  dequantize_per_channel(int8 constant, scales)

`quantized_decomposed` operators: PyTorch runs them as they are (the emulation), Inductor and the ONNX exporter know them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401 - defines torch.ops.quantized_decomposed
from torch import fx

from accelkit import graph as graphs
from accelkit.errors import InputError
from accelkit.precision import Int8
from accelkit.quantization import Histogram

LEVELS = 127
quantized = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Grid:
    """Where an activation is rounded to: `scale * (q - zero_point)` for q from `least` to `most`."""

    scale: float
    zero_point: int
    unsigned: bool

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """What quantize_per_tensor and dequantize_per_tensor take behind the tensor."""
        least, most, dtype = (0, 255, torch.uint8) if self.unsigned else (-128, 127, torch.int8)
        return self.scale, self.zero_point, least, most, dtype


def grid_of(name: str, histograms: Mapping[str, Histogram], precision: Int8) -> Grid:
    """The grid of one tensor, by its calibrated range.

    Raises:
        InputError: it was not observed, or only zeros were seen.
    """
    return grid_of_all((name,), histograms, precision)


def grid_of_all(names: tuple[str, ...], histograms: Mapping[str, Histogram], precision: Int8) -> Grid:
    """One grid for several tensors, the widest of theirs."""
    unsigned, symmetric = is_unsigned(precision), is_symmetric(precision)
    low = high = 0.0
    for name in names:
        if name not in histograms:
            raise InputError(
                f"the calibration has nothing of {name}: it was collected for another scheme; collect it with "
                "Calibration.collect, which serves all of them"
            )
        if histograms[name].largest == 0:
            raise InputError(
                f"{name} was zero in every calibration batch, so that it has no range. Give batches that use the layer, or "
                f"keep it in float32: keep=({name.rpartition('.')[0]!r},)"
            )
        if symmetric:
            threshold = precision.calibrator.threshold(histograms[name])
            low, high = min(low, -threshold), max(high, threshold)
        else:
            limits = precision.calibrator.limits(histograms[name])
            low, high = min(low, limits[0]), max(high, limits[1])
    if symmetric:
        return Grid(_float32(high / LEVELS), 128 if unsigned else 0, unsigned)
    scale = _float32((high - low) / 255)
    return Grid(scale, min(255, max(0, round(-low / scale))), True)


def is_unsigned(precision: Int8) -> bool:
    """Whether activations are uint8: what CPU engines' kernels multiply with int8 weights."""
    return precision.activations == "u8" or (precision.activations is None and not precision.table.symmetric)


def is_symmetric(precision: Int8) -> bool:
    """Signed activations have no zero point: GPU kernels and TensorRT want them so."""
    return precision.table.symmetric or precision.activations == "s8"


def _float32(scale: float) -> float:
    """The float32 nearest to a scale: what engines hold."""
    return float(torch.tensor(max(scale, 1e-30), dtype=torch.float32))


class Editor:
    """Inserts the nodes; tensors that several layers read are rounded once."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self._rounded: dict[tuple[fx.Node, Grid | None], fx.Node] = {}

    def rounded(self, value: fx.Node, grid: Grid | None, before: fx.Node) -> fx.Node:
        """`value` rounded to the grid; None: to one taken at run time from the tensor's own range."""
        key = (value, grid)
        if key not in self._rounded:
            with self.graph.graph.inserting_before(before):
                if grid is None:
                    self._rounded[key] = self._at_run_time(value)
                else:
                    q = self.call(quantized.quantize_per_tensor.default, value, *grid.arguments)
                    self._rounded[key] = self.call(quantized.dequantize_per_tensor.default, q, *grid.arguments)
        return self._rounded[key]

    def _at_run_time(self, value: fx.Node) -> fx.Node:
        # float32's epsilon is what quantize_dynamic of ONNX Runtime and PyTorch's own observers take as the least scale
        chosen = self.call(quantized.choose_qparams.tensor, value, 0, 255, torch.finfo(torch.float32).eps, torch.uint8)
        scale, zero = (self.graph.graph.call_function(operator.getitem, (chosen, i)) for i in (0, 1))
        q = self.call(quantized.quantize_per_tensor.tensor, value, scale, zero, 0, 255, torch.uint8)
        return self.call(quantized.dequantize_per_tensor.tensor, q, scale, zero, 0, 255, torch.uint8)

    def rounded_weight(self, weight: fx.Node, per_channel: bool, before: fx.Node) -> fx.Node:
        """The constant as int8, and what it stands for."""
        tensor = graphs.attribute(self.graph, str(weight.target)).detach()
        q, scales = quantised_weight(tensor, per_channel)
        with self.graph.graph.inserting_before(before):
            values = self._constant(f"{weight.target}_int8", q)
            if not per_channel:
                grid = (float(scales), 0, -128, 127, torch.int8)
                return self.call(quantized.dequantize_per_tensor.default, values, *grid)
            scale = self._constant(f"{weight.target}_scale", scales)
            return self.call(
                quantized.dequantize_per_channel.default, values, scale, None, 0, -128, 127, torch.int8
            )  # fmt: skip

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.graph.call_function(target, args)

    def _constant(self, hint: str, tensor: torch.Tensor) -> fx.Node:
        return self.graph.graph.get_attr(graphs.set_attribute(self.graph, hint, tensor))


def quantised_weight(weight: torch.Tensor, per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values, float32 scales) of a weight [outputs, ...]: symmetric, amax / 127, for each output or for all.

    An output whose weights are all zero has scale 1.
    """
    rows = weight.float().reshape(weight.shape[0], -1)
    largest = rows.abs().amax(1) if per_channel else rows.abs().amax()
    scales = torch.where(largest > 0, largest / LEVELS, 1.0)
    shape = (-1, *[1] * (weight.dim() - 1)) if per_channel else ()
    q = torch.round(weight.float() / scales.reshape(shape)).clamp_(-LEVELS, LEVELS).to(torch.int8)
    return q.contiguous(), scales.contiguous()
