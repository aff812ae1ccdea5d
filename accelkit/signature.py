"""How a model is called: nested arguments to flat tensors and back.

    args, kwargs --bind--> canonical --flatten--> tensors --graph--> tensors --unflatten--> the model's own output type

Arguments are bound to the parameters of the model's `forward`, so `fast(ids, mask)` and `fast(attention_mask=mask, input_ids=ids)`
are the same call; an argument that equals its default is the same as one not given. What is not a tensor (a flag, None, a
number) was baked into the graph when it was captured, and must have the same value in every call.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from accelkit.errors import InputError

_EMPTY = inspect.Parameter.empty


class Binder:
    """Brings a call's arguments into one canonical form, by the parameters of `forward`."""

    def __init__(self, parameters: Sequence[tuple[str, str, Any]], owner: str = "the model") -> None:
        """`parameters`: (name, kind's name, default or inspect.Parameter.empty), as in inspect.Signature."""
        self.parameters, self.owner = tuple(parameters), owner
        self._signature = inspect.Signature(
            [
                inspect.Parameter(n, getattr(inspect.Parameter, kind), default=default)
                for n, kind, default in self.parameters
            ]
        )
        self._defaults = {name: default for name, _, default in self.parameters if default is not _EMPTY}

    @classmethod
    def of(cls, model: torch.nn.Module) -> Binder:
        parameters = inspect.signature(model.forward).parameters.values()
        return cls([(p.name, p.kind.name, p.default) for p in parameters], type(model).__name__)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Canonical (args, kwargs): parameters that can be named are named; what equals its default is left out.

        Raises:
            InputError: an argument too many, unknown or missing.
        """
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"{self.owner}.forward{self._signature}: {error}") from None
        positional: list[Any] = []
        named: dict[str, Any] = {}
        has_varargs = any(kind == "VAR_POSITIONAL" and bound.arguments.get(name) for name, kind, _ in self.parameters)
        for name, kind, _ in self.parameters:
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            if kind == "VAR_POSITIONAL":
                positional.extend(value)
            elif kind == "VAR_KEYWORD":
                named.update(value)
            elif kind == "POSITIONAL_ONLY" or (kind == "POSITIONAL_OR_KEYWORD" and has_varargs):
                positional.append(value)
            elif not self._is_default(name, value):
                named[name] = value
        return tuple(positional), named

    def by_parameter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a canonical call by the parameters of `forward`: those of *args and **kwargs together."""
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def positional_name(self, index: int) -> str:
        """What the positional argument `index` of a canonical call is called: its parameter, or `args[2]` inside *args."""
        plain = [name for name, kind, _ in self.parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")]
        if index < len(plain):
            return plain[index]
        rest = next((name for name, kind, _ in self.parameters if kind == "VAR_POSITIONAL"), "args")
        return f"{rest}[{index - len(plain)}]"

    def _is_default(self, name: str, value: Any) -> bool:
        if name not in self._defaults or not isinstance(value, (bool, int, float, str, type(None))):
            return False
        default = self._defaults[name]
        return type(default) is type(value) and default == value


@dataclass(frozen=True)
class TensorSpec:
    """What one input or output tensor looks like: name, dtype, shape (a size, or a symbol's name or expression), device type."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    device: str

    def __str__(self) -> str:
        from accelkit.graph import SHORT

        return f"{self.name}: {SHORT.get(self.dtype, str(self.dtype))}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Constant:
    """A leaf that is no tensor: its value was baked into the graph."""

    name: str
    value: Any


@dataclass(frozen=True)
class Signature:
    """The captured call.

    Attributes:
        binder: brings a call's arguments into canonical form.
        in_spec: tree of the canonical (args, kwargs).
        inputs: one entry a leaf: TensorSpec (a graph input, in this order) or Constant.
        out_spec: tree of the output.
        outputs: one entry a leaf of the output: the graph output's index, or Constant.
        results: the graph's outputs.
        ranges: for each symbol, its smallest and largest size (None: unbounded).
        dims: for each symbol, the user's name of the dimension.
    """

    binder: Binder
    in_spec: pytree.TreeSpec
    inputs: tuple[TensorSpec | Constant, ...]
    out_spec: pytree.TreeSpec
    outputs: tuple[int | Constant, ...]
    results: tuple[TensorSpec, ...]
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    dims: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in order."""
        return tuple(i for i in self.inputs if isinstance(i, TensorSpec))

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The call's leaves in the order of `inputs`.

        Raises:
            InputError: the call's structure is another one than was captured.
        """
        canonical = self.binder.bind(args, kwargs)
        canonical = (
            canonical[0],
            {k: canonical[1][k] for k in self._keyword_order if k in canonical[1]} | canonical[1],
        )
        leaves, spec = pytree.tree_flatten(canonical)
        if spec != self.in_spec:
            raise InputError(self._structure_message(canonical))
        return leaves

    @property
    def _keyword_order(self) -> list[str]:
        return (
            list(self.in_spec.child(1).context)
            if hasattr(self.in_spec, "child")
            else list(self.in_spec.children_specs[1].context)
        )

    def _structure_message(self, canonical: Any) -> str:
        given = set(leaf_names(canonical, self.binder))
        wanted = {i.name for i in self.inputs}
        missing, extra = sorted(wanted - given), sorted(given - wanted)
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
        return (
            f"this call's arguments differ from the captured ones: "
            f"{'; '.join(parts) or 'other containers, or their keys in another order'}. "
            f"Captured: {', '.join(i.name for i in self.inputs)}"
        )

    def tensors_of(self, leaves: list[Any]) -> list[torch.Tensor]:
        """The graph's inputs among the leaves.

        Raises:
            InputError: a tensor where a constant was captured or the other way round, or a constant of another value.
        """
        tensors = []
        for spec, leaf in zip(self.inputs, leaves, strict=True):
            if isinstance(spec, TensorSpec):
                if not isinstance(leaf, torch.Tensor):
                    raise InputError(f"input {spec.name} must be a tensor, not {type(leaf).__name__}")
                tensors.append(leaf)
            elif isinstance(leaf, torch.Tensor) or type(leaf) is not type(spec.value) or leaf != spec.value:
                given = "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)
                raise InputError(
                    f"input {spec.name} was {spec.value!r} when the model was captured and is {given} now; values that are not "
                    "tensors are baked into the compiled model: call optimize() once for each"
                )
        return tensors

    def unflatten(self, results: Sequence[Any]) -> Any:
        """The model's own output from the graph's."""
        leaves = [o.value if isinstance(o, Constant) else results[o] for o in self.outputs]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def covers(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """None where these inputs fit the captured program, else why not."""
        sizes: dict[str, int] = {}
        expressions: list[tuple[str, int, str, int]] = []
        for spec, tensor in zip(self.tensors, tensors, strict=True):
            if tensor.dtype != spec.dtype:
                return f"{spec.name} is {tensor.dtype}, captured as {spec.dtype}"
            if tensor.device.type != spec.device:
                return f"{spec.name} is on {tensor.device}, captured on {spec.device}"
            if tensor.dim() != len(spec.shape):
                return f"{spec.name} has shape {list(tensor.shape)}, captured as {list(spec.shape)}"
            for index, (size, wanted) in enumerate(zip(tensor.shape, spec.shape, strict=True)):
                if isinstance(wanted, int):
                    if size != wanted:
                        return f"{spec.name} has shape {list(tensor.shape)}, captured as {self._shown(spec)}"
                elif wanted in self.ranges:
                    low, high = self.ranges[wanted]
                    if size < low or (high is not None and size > high):
                        return f"{spec.name} has size {size} in dimension {index}, covered: {self._range(wanted)}"
                    if sizes.setdefault(wanted, size) != size:
                        name = self.dims.get(wanted, wanted)
                        return f"{name} is both {sizes[wanted]} and {size} ({spec.name}, dimension {index})"
                else:
                    expressions.append((spec.name, index, wanted, size))
        for name, index, expression, size in expressions:
            if _evaluate(expression, sizes) != size:
                return f"{name} has size {size} in dimension {index}, which must be {expression} with {sizes}"
        return None

    def _shown(self, spec: TensorSpec) -> list[int | str]:
        return [self.dims.get(s, s) if isinstance(s, str) else s for s in spec.shape]

    def _range(self, symbol: str) -> str:
        low, high = self.ranges[symbol]
        return f"{self.dims.get(symbol, symbol)} from {low} to {'any size' if high is None else high}"

    def coverage(self) -> str:
        """The covered inputs in words, for messages."""
        inputs = ", ".join(f"{s.name} {self._shown(s)}" for s in self.tensors)
        return inputs + "".join(f"; {self._range(symbol)}" for symbol in self.ranges)


def _leaf_name(path: str, binder: Binder) -> str:
    """`[1]['pixel_values'][0]` of the canonical (args, kwargs) -> `pixel_values[0]`; `[0][2]` -> `args[2]` for *args."""
    rest = path[3:]
    if path.startswith("[0]"):
        index, _, tail = rest[1:].partition("]")
        return binder.positional_name(int(index)) + tail
    if rest.startswith("['"):
        name, _, tail = rest[2:].partition("']")
        return name + tail
    return rest


def leaf_names(canonical: Any, binder: Binder) -> list[str]:
    """Readable names of the leaves of canonical (args, kwargs)."""
    return [_leaf_name(pytree.keystr(path), binder) for path, _ in pytree.tree_flatten_with_path(canonical)[0]]


_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}


def _evaluate(expression: str, sizes: dict[str, int]) -> int | None:
    # Artifacts carry these expressions, so nothing but integer arithmetic on known symbols is ever evaluated.
    def value(node: ast.AST) -> int | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes.get(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = value(node.operand)
            return None if inner is None else -inner
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = value(node.left), value(node.right)
            return None if left is None or right is None else _ARITHMETIC[type(node.op)](left, right)
        return None

    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None
