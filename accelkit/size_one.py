"""Whether a captured program holds where a dynamic dimension is 1.

    for each dimension that may be 1: model(example cut to 1) == program(the same), else its range starts at 2

torch.export traces a dynamic dimension at 2 or more and takes `size == 1` for false: a model that asks (`if x.shape[0] == 1`, a
`squeeze()`, a broadcast) would silently be another one at batch 1. So both are run there and compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from accelkit import graph as graphs
from accelkit.accuracy import relative_error
from accelkit.capture import Program
from accelkit.options import sizes_of
from accelkit.twin import clone_inputs, preserved
from accelkit.yardstick import example_call


def without_wrong_ones(program: Program, model: nn.Module) -> tuple[Program, list[str]]:
    """The program, its ranges from 2 on where it differs from `model` at size 1, and a sentence for each of these."""
    signature = program.signature
    names = {name: symbol for symbol, name in signature.dims.items() if signature.ranges[symbol][0] == 1}
    ranges, notes = dict(signature.ranges), []
    wrong = [name for name in names if not _agrees_at(program, model, {name: 1})]
    if not wrong and len(names) > 1 and not _agrees_at(program, model, dict.fromkeys(names, 1)):
        wrong = list(names)
    for name in wrong:
        low, high = ranges[names[name]]
        ranges[names[name]] = (low + 1, high)
        notes.append(
            f"at {name}=1 the model computes something else than was captured: such calls run on the original model"
        )
    return dataclasses.replace(program, signature=dataclasses.replace(signature, ranges=ranges)), notes


def _agrees_at(program: Program, model: nn.Module, sizes: dict[str, int]) -> bool:
    inputs = sizes_of(program, sizes)
    args, kwargs = clone_inputs(example_call(dataclasses.replace(program, inputs=inputs)))
    random = any(graphs.is_random(node) for node in program.graph.graph.nodes)
    with preserved(program.graph, model), torch.no_grad():
        try:
            expected = model(*args, **kwargs)
        except Exception:  # noqa: BLE001 - the model does not take this size: calls go to it and get its own exception
            return False
    with preserved(program.graph, model), torch.no_grad():
        try:
            results = program.graph(*clone_inputs(inputs))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
    output = program.signature.unflatten(results)
    leaves, spec = pytree.tree_flatten(output)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    return spec == wanted_spec and all(_same(a, b, random) for a, b in zip(leaves, wanted, strict=True))


def _same(result: Any, expected: Any, random: bool) -> bool:
    if not isinstance(result, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return bool(result == expected)
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    return random or relative_error(result, expected) <= _tolerance(expected.dtype)


def _tolerance(dtype: torch.dtype) -> float:
    # the same kernels on both sides, but for fused attention: far above rounding, far below another computation
    return float(torch.finfo(dtype).eps) ** 0.5 if dtype.is_floating_point or dtype.is_complex else 0.0


__all__: Sequence[str] = ["without_wrong_ones"]
