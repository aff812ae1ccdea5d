"""What a fused operator is, and how it is made known to PyTorch.

    Operator("accelkit::name(Tensor x, ...) -> Tensor", meaning, fake, refusal, kernel)   ->   torch.ops.accelkit.name

The meaning runs wherever no kernel does: on a CPU, on dtypes and sizes that the kernel refuses, without Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

OPERATORS: dict[str, Operator] = {}
"""Every fused operator by its short name (`attention`)."""

_LIBRARY: Any = torch.library.Library("accelkit", "FRAGMENT")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Operator:
    """A fused operator.

    Attributes:
        schema: `name(Tensor x, ...) -> Tensor`, PyTorch's schema language.
        meaning: the operator in plain PyTorch. Results are contiguous and own their memory.
        fake: its results' shapes and dtypes on fake tensors; asks nothing of a symbolic size.
        refusal: why no GPU kernel takes these arguments, or None; pure, works on fake tensors too.
        kernel: the GPU kernel, imported when first called; called where `refusal` gives None.
        counted: of an operator with an argument `rows`, the arguments [..., width] whose rows it counts; a CPU computes
            no others.
    """

    schema: str
    meaning: Callable[..., Any]
    fake: Callable[..., Any]
    refusal: Callable[..., str | None]
    kernel: Callable[..., Any]
    counted: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What stands in graphs: `torch.ops.accelkit.<name>.default`."""
        return getattr(torch.ops.accelkit, self.name).default  # type: ignore[no-any-return]


def define(operator: Operator) -> Operator:
    """Make the operator known as `torch.ops.accelkit.<name>`."""
    _LIBRARY.define(operator.schema)
    _LIBRARY.impl(operator.name, operator.meaning, "CompositeExplicitAutograd")
    _LIBRARY.impl(operator.name, _on_gpu(operator), "CUDA")
    if operator.counted:
        _LIBRARY.impl(operator.name, _on_cpu(operator), "CPU")
    torch.library.register_fake(f"accelkit::{operator.name}", operator.fake, lib=_LIBRARY)
    OPERATORS[operator.name] = operator
    return operator


def operator_of(node: fx.Node) -> Operator | None:
    """The fused operator that a graph's node calls, or None."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "accelkit":
        return None
    return OPERATORS.get(target._schema.name.partition("::")[2])


def _on_gpu(operator: Operator) -> Callable[..., Any]:
    @functools.wraps(operator.meaning)
    def run(*args: Any, **kwargs: Any) -> Any:
        if operator.refusal(*args, **kwargs) is not None:
            return operator.meaning(*args, **kwargs)
        return operator.kernel(*args, **kwargs)

    return run


def _on_cpu(operator: Operator) -> Callable[..., Any]:
    names = [argument.name for argument in operator.overload._schema.arguments]

    @functools.wraps(operator.meaning)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        rows = given.pop("rows", None)
        if rows is None:
            return operator.meaning(**given)
        leading = given[operator.counted[0]].shape[:-1]
        count = min(int(rows), math.prod(leading))
        for name in operator.counted:
            if given.get(name) is not None:
                width = given[name].shape[-1]
                given[name] = given[name].expand(*leading, width).reshape(-1, width)[:count]

        def all_rows(found: torch.Tensor) -> torch.Tensor:
            whole = found.new_zeros(math.prod(leading), found.shape[-1])
            whole[:count] = found
            return whole.reshape(*leading, found.shape[-1])

        results = operator.meaning(**given)
        return tuple(map(all_rows, results)) if isinstance(results, tuple) else all_rows(results)

    return run


@functools.cache
def without_triton() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f'Triton is not installed ({error}); pip install "accelkit[gpu]"'
    return None


def differ(one: object, other: object) -> bool:
    """Whether two sizes are known to differ; nothing is asked of a symbolic one, which would add a guard."""
    return isinstance(one, int) and isinstance(other, int) and one != other
