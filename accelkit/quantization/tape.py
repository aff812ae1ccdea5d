"""How constants of a graph were computed from a model's weights, so that they can be computed again while those are trained.

    passes run:      qkv = cat(query.weight, key.weight, value.weight)      recorded
    each step:       qkv = cat(...) of the present weights, with gradients  replayed

Passes fold weights into new constants (merged Q, K and V, batch norms, int8 values) as numbers. A tape below autograd notes the
ATen operators that they call on weights; which pass it was, and what it was after, need not be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class _Value:
    """Stands for a tensor that is recomputed."""

    number: int


@dataclass(frozen=True)
class _Step:
    operator: Any
    args: Any
    kwargs: Any
    results: tuple[int | None, ...]


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records, while entered, what is computed from `roots`, tensors by name."""

    def __init__(self, roots: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.roots = list(roots)
        self.steps: list[_Step] = []
        self.numbers_read: list[
            tuple[float, torch.Tensor]
        ] = []  # float(tensor), which a pass may have put into the graph
        self._numbers: dict[Any, int] = {}
        self._storages: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # memory that is freed may come again with another meaning
        self._count = 0
        for tensor in roots.values():
            number = self._new(tensor)
            self._storages.setdefault(tensor.untyped_storage()._cdata, number)

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Which recorded value a tensor holds; None: it does not depend on the roots."""
        key = _key(tensor)
        return None if key is None else self._numbers.get(key)

    def sources(self, number: int) -> set[int]:
        """The values that one was computed from, itself included."""
        made = {n: step for step in self.steps for n in step.results if n is not None}
        seen, stack = set[int](), [number]
        while stack:
            if (one := stack.pop()) not in seen:
                seen.add(one)
                stack += _numbers_in(made[one]) if one in made else []
        return seen

    def replay(self, wanted: Iterable[int], values: dict[int, Any]) -> None:
        """Compute the wanted values into `values`, which has those of the roots (by position) and of earlier replays."""
        wanted = set(wanted) - values.keys()
        needed: list[_Step] = []
        for step in reversed(self.steps):
            if wanted.intersection(n for n in step.results if n is not None):
                needed.append(step)
                wanted.difference_update(n for n in step.results if n is not None)
                wanted.update(n for n in _numbers_in(step) if n not in values)
        for step in reversed(needed):
            args, kwargs = pytree.tree_map(
                lambda leaf: values[leaf.number] if isinstance(leaf, _Value) else leaf, (step.args, step.kwargs)
            )
            results = pytree.tree_leaves(step.operator(*_own_copies(step.operator, args), **kwargs))
            values.update({n: r for n, r in zip(step.results, results, strict=True) if n is not None})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        numbers = {
            id(leaf): self.number_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }  # fmt: skip
        results = func(*args, **kwargs)
        if not any(number is not None for number in numbers.values()):
            return results
        if func is aten._local_scalar_dense.default:
            self.numbers_read.append((results, args[0]))
            return results
        leaves = pytree.tree_leaves(results)
        writes = func._schema.is_mutable
        if all(not isinstance(r, torch.Tensor) or (self.number_of(r) is not None and not writes) for r in leaves):
            return results  # a view of the whole: the same value

        def noted(leaf: Any) -> Any:
            number = numbers.get(id(leaf)) if isinstance(leaf, torch.Tensor) else None
            return leaf if number is None else _Value(number)

        if func is aten.as_strided.default and len(args) < 4:
            args = (*args, args[0].storage_offset())
        if (
            func is aten.as_strided.default
            and (root := self._storages.get(args[0].untyped_storage()._cdata)) is not None
        ):
            args = (_Value(root), *args[1:])  # of the whole weight: a view's gradients end where the view does
        noted_args, noted_kwargs = pytree.tree_map(noted, (args, kwargs))
        made = tuple(self._new(r) if isinstance(r, torch.Tensor) else None for r in leaves)
        self.steps.append(_Step(func, noted_args, noted_kwargs, made))
        return results

    def _new(self, tensor: torch.Tensor) -> int:
        number, self._count = self._count, self._count + 1
        if (key := _key(tensor)) is not None:
            self._numbers[key] = number
            self._alive.append(tensor)
        return number

    def forget_tensors(self) -> None:
        """Let go of what was only kept to be recognised: nothing more can be recorded or asked for."""
        self.numbers_read.clear()
        self._numbers.clear()
        self._alive.clear()

    def keep_only(self, wanted: Iterable[int]) -> None:
        """Drop the steps that none of the values needs."""
        needed = set[int]().union(*(self.sources(number) for number in wanted))
        self.steps = [step for step in self.steps if needed.intersection(n for n in step.results if n is not None)]


def _key(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _numbers_in(step: _Step) -> list[int]:
    return [leaf.number for leaf in pytree.tree_leaves((step.args, step.kwargs)) if isinstance(leaf, _Value)]


def _own_copies(operator: Any, args: Any) -> Any:
    """The arguments, those that the operator writes to copied."""
    schema = operator._schema.arguments
    return [
        value.clone() if argument.alias_info is not None and argument.alias_info.is_write else value
        for value, argument in zip(args, schema, strict=False)
    ]
