"""linear(x, weight, bias) -> linear(dequantize(quantize(x)), dequantize(int8 weight), bias): what 8-bit integers would give

The graph afterwards computes in float32 what kernels with 8-bit integer products compute: run by PyTorch it is the
emulation that every kernel is held to, and the Q/DQ nodes are what engines fuse into such kernels. Which tensors are rounded
is the scheme's (accelkit.quantization.schemes), within which limits the calibrator's, from what the calibration inputs show.

1. Inputs and weights of linear layers (and, where the scheme says so, convolutions).
2. aftergemm: the product before its bias.            linear(x, w, b) -> dequantize(quantize(linear(x, w))) + b
3. Attention: queries, keys, values, probabilities; the scores too where the scheme says so. The operator is written out.
4. The residual, in models that normalise last.

Runs behind the fusions: layers are then what engines get. Layers that stay in float32 are listed, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from accelkit import ops
from accelkit.errors import InputError
from accelkit.ops.decompose import inlined
from accelkit.pass_api import GraphPass, PassResult
from accelkit.precision import Int8, as_precision
from accelkit.quantization import Histogram, Scheme
from accelkit.quantization.collect import Source
from accelkit.quantization.emulation import LAYER
from accelkit.quantization.observe import probabilities, raw_scores
from accelkit.quantization.schemes import ATTENTION
from accelkit.quantization.sites import Site, family_of, find_sites, input_name
from accelkit_passes._quantise import Editor, Grid, grid_of, grid_of_all, quantized


@dataclass(frozen=True)
class CalibrateInt8(GraphPass):
    """Quantise and dequantise.

    Attributes:
        precision: an Int8 value; "int8" is its defaults.
        only: names of the layers to quantise, no patterns; None: all that the scheme does.

    Raises:
        InputError: no calibration where the scheme needs one, or one that does not fit.
    """

    precision: str | Int8 = "int8"
    only: tuple[str, ...] | None = None

    calibrates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        value = as_precision(self.precision)
        if not isinstance(value, Int8):
            raise InputError(f"calibrate_int8 takes an Int8 value, not {value!r}")
        object.__setattr__(self, "precision", value)

    def run(self, graph: fx.GraphModule) -> PassResult:
        result, precision = PassResult(), self.precision
        assert isinstance(precision, Int8)
        source = Source.taken_from(graph)
        if any(node.target is quantized.quantize_per_tensor.default for node in graph.graph.nodes):
            result.refused("graph", "it is quantised already")
            return result
        if precision.takes_calibration and source is None:
            raise InputError(f"{precision} needs calibration data: optimize(..., calibration=batches)")
        _Quantiser(graph, precision, result, source, self.only).run()
        return result


class _Quantiser:
    def __init__(
        self,
        graph: fx.GraphModule,
        precision: Int8,
        result: PassResult,
        source: Source | None,
        only: tuple[str, ...] | None,
    ) -> None:
        self.graph, self.precision, self.result, self.source, self.only = graph, precision, result, source, only
        self.scheme: Scheme = precision.table
        self.family = family_of(graph) if precision.family == "auto" else precision.family
        self.on = self.scheme.on(self.family)
        self.editor = Editor(graph)
        self.histograms: Mapping[str, Histogram] = {}

    def run(self) -> None:
        sites = self._taken(find_sites(self.graph))
        if self.source is not None and self.precision.takes_calibration:
            if self.precision.smooth is not None:
                smoothed = self.source.smooth(self.graph, sites, self.precision.smooth)
                for norm, _ in smoothed.factors.items():
                    self.result.rewrote(f"{norm} (smoothed)")
                for name, reason in smoothed.refusals:
                    self.result.refused(name, reason)
            if not self.scheme.dynamic:
                self.histograms = self.source.histograms(self.graph, sites, self.on)
        steps = {
            "linear": self.linear,
            "convolution": self.convolution,
            "attention": self.attention,
            "residual": self.residual,
        }
        for site in sites:
            steps[site.kind](site).meta[LAYER] = site.name
            self.result.rewrote(site.name)

    # --- which

    def _taken(self, sites: list[Site]) -> list[Site]:
        taken, used = [], set[str]()
        for site in sites:
            kept = next((pattern for pattern in self.precision.keep if site.matches(pattern)), None)
            if not self._concerned(site):
                used.update(p for p in self.precision.keep if site.matches(p))
            elif kept is not None:
                used.update(p for p in self.precision.keep if site.matches(p))
                self.result.refused(site.name, f"kept in float32 by {kept!r}")
            elif reason := site.refusal or self._left_out(site):
                self.result.refused(site.name, reason)
            elif self.only is not None and site.name not in self.only:
                self.result.refused(site.name, "not among `only`")
            else:
                taken.append(site)
        for pattern in self.precision.keep:
            if pattern not in used:
                self.result.refused(pattern, "keep names no layer, node, operator or module that could be quantised")
        return taken

    def _concerned(self, site: Site) -> bool:
        """Whether the scheme has a quantiser for this kind of place."""
        if site.kind == "attention":
            return bool(self.on & ATTENTION)
        if site.kind == "residual":
            return "residual_input" in self.on
        return True

    def _left_out(self, site: Site) -> str:
        if site.kind == "convolution" and not self.scheme.convolutions:
            return f"{self.scheme.name} quantises no convolutions"
        if site.final and "final_input" not in self.on:
            return f"{self.scheme.name} leaves what is behind the last residual sum in float32"
        return ""

    # --- how

    def linear(self, site: Site) -> fx.Node:
        node = self._round_operands(site)
        return self._round_product(site) if "aftergemm" in self.on else node

    def convolution(self, site: Site) -> fx.Node:
        return self._round_operands(site)

    def residual(self, site: Site) -> fx.Node:
        value = site.bound["residual"]
        grid = grid_of(f"{site.name}.residual_input", self.histograms, self.precision)
        _set_argument(site.node, "residual", self.editor.rounded(value, grid, site.node))
        return site.node

    def _round_operands(self, site: Site) -> fx.Node:
        name, node = input_name(site), site.node
        grid = None if self.scheme.dynamic else grid_of(f"{site.name}.input", self.histograms, self.precision)
        x = self.editor.rounded(site.bound[name], grid, node)
        weight = self.editor.rounded_weight(site.bound["weight"], self.scheme.per_channel, node)
        _set_argument(node, name, x)
        _set_argument(node, "weight", weight)
        return node

    def _round_product(self, site: Site) -> fx.Node:
        """linear_activation(x, w, b, activation, residual) -> activation(Q/DQ(linear(x, w)) + b) + residual"""
        node, bound = site.node, site.bound
        grid = grid_of(f"{site.name}.aftergemm", self.histograms, self.precision)
        activation = ops.linear_activation.ACTIVATIONS[bound.get("activation", "none")]

        def after(x: torch.Tensor, w: torch.Tensor, bias: Any, residual: Any) -> torch.Tensor:
            y = _rounded(torch.nn.functional.linear(x, w), grid)
            y = activation(y if bias is None else y + bias)
            return y if residual is None else y + residual

        given = (bound[input_name(site)], bound["weight"], bound["bias"], bound.get("residual"))
        return inlined(self.graph, node, after, given)

    def attention(self, site: Site) -> fx.Node:
        """accelkit.attention written out, its products' operands rounded."""
        names = {n: f"{site.name}.{n}" for n in ("matmul_q_input", "matmul_k_input", "matmul_v_input")}
        if self.scheme.fuse_qkv:
            shared = grid_of_all(tuple(names.values()), self.histograms, self.precision)
            grids = dict.fromkeys(names, shared)
        else:
            grids = {n: grid_of(full, self.histograms, self.precision) for n, full in names.items()}
        seen = grid_of(f"{site.name}.matmul_a_input", self.histograms, self.precision)
        scores_grid = (
            grid_of(f"{site.name}.softmax_input", self.histograms, self.precision)
            if "softmax_input" in self.on
            else None
        )
        arguments = {k: site.bound[k] for k in ("causal", "scale")}

        def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
            query, key, value = (_rounded(t, g) for t, g in zip((query, key, value), grids.values(), strict=True))
            scores = raw_scores(query, key)
            if scores_grid is not None:
                scores = _rounded(scores, scores_grid)
            attended = _rounded(probabilities(scores, query, arguments | {"mask": mask}), seen)
            return torch.matmul(attended, value.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).contiguous()

        return inlined(self.graph, site.node, written_out, [site.bound[n] for n in ("query", "key", "value", "mask")])


def _rounded(value: torch.Tensor, grid: Grid) -> torch.Tensor:
    q = quantized.quantize_per_tensor.default(value, *grid.arguments)
    return quantized.dequantize_per_tensor.default(q, *grid.arguments)  # type: ignore[no-any-return]


def _set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, argument in enumerate(schema) if argument.name == name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
