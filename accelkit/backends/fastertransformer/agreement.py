"""Whether another form of a graph is as exact as the form that the passes left.

    |form - truth| / |truth|  <=  2 * |plain - truth| / |truth| + floor              truth: the plain form in float64

The bound is the one that `optimize` ends with (accelkit.accuracy, after Dao et al., 2022), with the plain form in the place of
plain PyTorch: a fused kernel rounds less often than the operators that it stands for. Both sides have the same rounded
weights here. At the end their rounding counts too, for both the same, so a form that keeps this bound keeps that one as
well. Where the plain form has no float64 run (no memory, an operator without one), the form may differ from it by 8 epsilon, which
is what `optimize` then allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx

from accelkit.accuracy import OutputError, check_outputs, reference_outputs
from accelkit.precision import Precision


class Agreement:
    """Compares forms with a plain graph, on the example inputs; what the plain graph gives is computed once, when asked.

    Args:
        plain: the graph as the passes left it.
        arithmetic: the settings that forms run with (tf32).
    """

    def __init__(
        self,
        plain: fx.GraphModule,
        inputs: Sequence[Tensor],
        precision: Precision,
        arithmetic: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._plain, self._inputs, self._precision, self._arithmetic = plain, inputs, precision, arithmetic
        self._results: Sequence[Any] | None = None
        self._truth: Sequence[Any] | None = None

    def fault(self, form: fx.GraphModule) -> str | None:
        """How wrong a form is, in words, or None where it is right.

        Raises:
            torch.OutOfMemoryError: there is no memory to run it, or the plain graph.
        """
        if self._results is None:
            self._results = self._run(self._plain)
            self._truth = self._float64()
        results = self._run(form)
        names = [f"output {i}" for i in range(len(results))]
        truth, plain = (self._results, None) if self._truth is None else (self._truth, self._results)
        found = check_outputs(results, truth, plain, names, self._precision, None)
        worst = max((one for one in found if not one.ok), key=_excess, default=None)
        if worst is None:
            return None
        if worst.yardstick is None:
            return f"{worst.name} differs from it by {worst.error:.1e}, allowed {worst.allowed:.1e}"
        return (
            f"{worst.name} has an error of {worst.error:.1e} against float64, the form of the passes "
            f"{worst.yardstick:.1e} (allowed {worst.allowed:.1e})"
        )

    def _run(self, graph: fx.GraphModule) -> Sequence[Any]:
        with torch.no_grad(), self._arithmetic():
            return tuple(graph(*self._inputs))

    def _float64(self) -> Sequence[Any] | None:
        try:
            return reference_outputs(self._plain, self._inputs)
        except (RuntimeError, NotImplementedError, TypeError):  # out of memory is a RuntimeError
            return None


def _excess(one: OutputError) -> float:
    return one.error / one.allowed if one.allowed else float("inf")
