"""Signatures as JSON and back, without pickle: Signature -> {"inputs": [...], "out_spec": ..., ...} -> Signature

Containers are named, and found again by name: built-in ones, named tuples and registered classes by module and name,
types registered with a `serialized_type_name` (transformers' ModelOutputs, for one) by that. A file cannot make
accelkit import what the program does not use already: modules are imported only from packages that are imported, or
are in KNOWN_PACKAGES.

    >>> import torch
    >>> from accelkit.capture import capture
    >>> signature = capture(torch.nn.Linear(3, 2), (torch.randn(1, 3),), {}).signature
    >>> signature_from_json(signature_to_json(signature)).inputs == signature.inputs
    True
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import sys
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch.utils import _pytree as pytree

from accelkit.errors import ArtifactError
from accelkit.signature import Binder, Constant, Signature, TensorSpec
from accelkit.tensors_io import dtype_name, dtype_named

KNOWN_PACKAGES = ("torch", "transformers", "diffusers", "timm")
_BUILT_IN: dict[str, type] = {
    "tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict, "defaultdict": defaultdict, "deque": deque,
}  # fmt: skip
_FACTORIES: dict[str, Any] = {f.__name__: f for f in (list, dict, set, tuple, int, float, str)} | {"None": None}


class Unstorable:
    """Stands for a default of forward's parameter that no file can hold; equal to nothing, so a call never matches it.

    >>> Unstorable("<function gelu>") == Unstorable("<function gelu>")
    False
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<not stored: {self.text}>"


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """The signature as JSON values.

    Raises:
        ArtifactError: a constant input or a container's type cannot be stored; the message names it.
    """
    parameters = [[name, kind, _default_to_json(default)] for name, kind, default in signature.binder.parameters]
    return {
        "owner": signature.binder.owner,
        "parameters": parameters,
        "in_spec": _tree_to_json(signature.in_spec, "an input"),
        "inputs": [_leaf_to_json(leaf) for leaf in signature.inputs],
        "out_spec": _tree_to_json(signature.out_spec, "the output"),
        "outputs": [o if isinstance(o, int) else _leaf_to_json(o) for o in signature.outputs],
        "results": [_leaf_to_json(spec) for spec in signature.results],
        "ranges": {symbol: list(bounds) for symbol, bounds in signature.ranges.items()},
        "dims": dict(signature.dims),
    }


def signature_from_json(stored: Any) -> Signature:
    """The signature that `signature_to_json` gave.

    Raises:
        ArtifactError: it is damaged, or holds a type that is not known here; the message says what to import.
    """
    try:
        parameters = [(_text(n), _text(kind), _default_from_json(default)) for n, kind, default in stored["parameters"]]
        inputs = tuple(_leaf_from_json(leaf) for leaf in stored["inputs"])
        outputs = tuple(o if type(o) is int else _constant_from_json(o) for o in stored["outputs"])
        results = tuple(_spec_from_json(spec) for spec in stored["results"])
        in_spec, out_spec = _tree_from_json(stored["in_spec"]), _tree_from_json(stored["out_spec"])
        if in_spec.num_leaves != len(inputs) or out_spec.num_leaves != len(outputs):
            raise ValueError("leaves and trees differ in number")
        if any(isinstance(o, int) and not 0 <= o < len(results) for o in outputs):
            raise ValueError("an output is out of range")
        ranges = {
            _text(s): (_size(low), None if high is None else _size(high)) for s, (low, high) in stored["ranges"].items()
        }
        dims = {_text(symbol): _text(name) for symbol, name in stored["dims"].items()}
        binder = Binder(parameters, _text(stored["owner"]))
    except ArtifactError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ArtifactError(f"the stored signature is damaged: {type(error).__name__}: {error}") from error
    return Signature(binder, in_spec, inputs, out_spec, outputs, results, ranges, dims)


# --- leaves


def _leaf_to_json(leaf: TensorSpec | Constant) -> dict[str, Any]:
    if isinstance(leaf, TensorSpec):
        return {"name": leaf.name, "dtype": dtype_name(leaf.dtype), "shape": list(leaf.shape), "device": leaf.device}
    try:
        return {"name": leaf.name, "constant": value_to_json(leaf.value)}
    except TypeError as error:
        raise ArtifactError(
            f"{leaf.name} is {str(leaf.value)[:100]!r}: {error}. Only None, bool, int, float, str, dtypes and "
            "devices, and lists of them can be stored: pass it as a tensor, or set it on the model"
        ) from None


def _leaf_from_json(stored: Any) -> TensorSpec | Constant:
    return _constant_from_json(stored) if "constant" in stored else _spec_from_json(stored)


def _constant_from_json(stored: Any) -> Constant:
    return Constant(_text(stored["name"]), value_from_json(stored["constant"]))


def _spec_from_json(stored: Any) -> TensorSpec:
    shape = tuple(s if isinstance(s, str) else _size(s) for s in stored["shape"])
    return TensorSpec(_text(stored["name"]), dtype_named(stored["dtype"]), shape, _text(stored["device"]))


def _default_to_json(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return {"empty": True}
    try:
        return value_to_json(default)
    except TypeError:
        return {"unstorable": default.text if isinstance(default, Unstorable) else f"a {type(default).__name__}"}


def _default_from_json(stored: Any) -> Any:
    if isinstance(stored, dict) and "empty" in stored:
        return inspect.Parameter.empty
    if isinstance(stored, dict) and "unstorable" in stored:
        return Unstorable(_text(stored["unstorable"]))
    return value_from_json(stored)


# --- values


def value_to_json(value: Any) -> Any:
    """A plain value as JSON: itself, or an object with one key that says its type.

    >>> value_to_json((1, float("inf"), torch.float16))
    {'tuple': [1, {'float': 'inf'}, {'dtype': 'float16'}]}

    Raises:
        TypeError: a value of another kind.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind is complex:
        return {"complex": [value_to_json(value.real), value_to_json(value.imag)]}
    if kind in (tuple, list, torch.Size):
        return {kind.__name__: [value_to_json(v) for v in value]}
    if kind is dict:
        return {"dict": [[value_to_json(k), value_to_json(v)] for k, v in value.items()]}
    if kind is slice:
        return {"slice": [value_to_json(v) for v in (value.start, value.stop, value.step)]}
    if kind is torch.dtype:
        return {"dtype": dtype_name(value)}
    if kind is torch.device:
        return {"device": str(value)}
    if kind in (torch.layout, torch.memory_format):
        return {kind.__name__: str(value).removeprefix("torch.")}
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be stored")


def value_from_json(stored: Any) -> Any:
    """The value that `value_to_json` gave.

    Raises:
        ValueError: no such kind of value.
    """
    if not isinstance(stored, (dict, list)):
        return stored
    if not isinstance(stored, dict) or len(stored) != 1:
        raise ValueError(f"{str(stored)[:100]} is no stored value")
    ((kind, inner),) = stored.items()
    if kind == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if kind == "complex":
        return complex(*map(value_from_json, inner))
    if kind in ("tuple", "list", "Size"):
        return {"tuple": tuple, "list": list, "Size": torch.Size}[kind](value_from_json(v) for v in inner)
    if kind == "dict":
        return {value_from_json(k): value_from_json(v) for k, v in inner}
    if kind == "slice":
        return slice(*map(value_from_json, inner))
    if kind == "dtype":
        return dtype_named(inner)
    if kind == "device":
        return _device(inner)
    named = getattr(torch, inner, None) if kind in ("layout", "memory_format") and isinstance(inner, str) else None
    if type(named) not in (torch.layout, torch.memory_format):
        raise ValueError(f"{str(stored)[:100]} is no stored value")
    return named


def _device(name: Any) -> torch.device:
    try:
        return torch.device(_text(name))
    except RuntimeError as error:
        raise ArtifactError(
            f"this file uses device {name!r}, which PyTorch {torch.__version__} does not know"
        ) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return int(value)


# --- containers


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return list(
        spec.children() if hasattr(spec, "children") else spec.children_specs
    )  # PyTorch 2.9 has the attribute alone


def _tree_to_json(spec: pytree.TreeSpec, where: str) -> Any:
    """None for a leaf, else {"type": kind, ..., "children": [...]}."""
    if spec.is_leaf():
        return None
    try:
        node = _node_to_json(spec)
    except (TypeError, NotImplementedError) as error:
        raise ArtifactError(
            f"{where} holds a {_class_name(spec.type)}, which cannot be stored: {error}. Register it with a "
            "serialized_type_name (torch.export.register_dataclass, torch.utils._pytree.register_pytree_node), "
            "or use a dict or tuple"
        ) from error
    return {**node, "children": [_tree_to_json(child, where) for child in _children(spec)]}


def _node_to_json(spec: pytree.TreeSpec) -> dict[str, Any]:
    kind, context = spec.type, spec.context
    if kind in (tuple, list):
        return {"type": kind.__name__}
    if kind in (dict, OrderedDict, deque):
        return {"type": kind.__name__, "context": value_to_json(context)}
    if kind is defaultdict:
        factory = "None" if context[0] is None else context[0].__name__
        if _FACTORIES.get(factory, kind) is not context[0]:
            raise TypeError(f"its default factory {factory} cannot be stored")
        return {"type": "defaultdict", "factory": factory, "context": value_to_json(context[1])}
    if isinstance(context, type) and hasattr(
        context, "_fields"
    ):  # a named tuple, whatever `kind` PyTorch files it under
        return {"type": "namedtuple", "class": _class_name(context), "fields": list(context._fields)}
    try:
        dumped = pytree.treespec_dumps(pytree.TreeSpec(kind, context, []))
    except NotImplementedError:  # registered without a serialized_type_name: by its own name, if its context is plain
        return {"type": "class", "class": _class_name(kind), "context": value_to_json(context)}
    return {"type": "registered", "spec": json.loads(dumped)}


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _tree_from_json(stored: Any) -> pytree.TreeSpec:
    if stored is None:
        return pytree.tree_structure(0)
    children = [_tree_from_json(child) for child in stored["children"]]
    kind = stored["type"]
    if kind in ("tuple", "list"):
        return pytree.TreeSpec(_BUILT_IN[kind], None, children)
    if kind in ("dict", "OrderedDict", "deque", "defaultdict"):
        context = value_from_json(stored["context"])
        if kind != "deque" and (not isinstance(context, list) or len(context) != len(children)):
            raise ValueError(f"a {kind} has {len(children)} values for the keys {context}")
        if kind == "defaultdict":
            context = [_FACTORIES[stored["factory"]], context]
        return pytree.TreeSpec(_BUILT_IN[kind], context, children)
    if kind == "namedtuple":
        return _named_tuple(stored, children)
    if kind == "class":
        found = _class_named(_text(stored["class"]))
        if found not in pytree.SUPPORTED_NODES:
            raise ArtifactError(
                f"{stored['class']} is not registered with torch.utils._pytree here, as it was when it was stored"
            )
        return pytree.TreeSpec(found, value_from_json(stored["context"]), children)
    if kind == "registered":
        own = _registered(stored["spec"])
        return pytree.TreeSpec(own.type, own.context, children)
    raise ValueError(f"{kind!r} is no kind of container")


def _named_tuple(stored: Any, children: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    found = _class_named(_text(stored["class"]))
    if not issubclass(found, tuple) or list(getattr(found, "_fields", ())) != stored["fields"]:
        raise ArtifactError(
            f"{stored['class']} is no longer the named tuple with the fields {stored['fields']} that was stored"
        )
    spec = pytree.tree_structure(found(*range(len(stored["fields"]))))
    if spec.num_children != len(children):
        raise ValueError(f"{stored['class']} has {len(children)} values")
    return pytree.TreeSpec(spec.type, spec.context, children)


def _registered(spec: Any) -> pytree.TreeSpec:
    name, text = _text(spec[1]["type"]), json.dumps(spec)
    if name.startswith(("builtins.", "collections.")) or spec[1]["children_spec"]:
        raise ValueError(f"{name} is no registered container")
    # PyTorch imports the modules of enums that it finds in a context: only where we would, too.
    enums = re.findall(r'\\*"fqn\\*": \\*"([\w.]+):', text)
    if len(enums) != text.count("__enum__") or not all(map(_may_import, enums)):
        raise _unknown(name)
    prefix = name
    while True:
        try:
            return pytree.treespec_loads(text)
        except NotImplementedError:
            prefix = prefix.rpartition(".")[0]
            if not prefix or not _may_import(prefix):
                raise _unknown(name) from None
            _import(prefix)


def _class_named(name: str) -> type:
    module, _, qualified = name.partition(":")
    if not _may_import(module):
        raise _unknown(name)
    found: Any = _import(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise _unknown(name)
    return found


def _may_import(module: str) -> bool:
    return module.partition(".")[0] in (*KNOWN_PACKAGES, *sys.modules)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None  # the caller says which type it could not find


def _unknown(name: str) -> ArtifactError:
    module = name.partition(":")[0] if ":" in name else name.rpartition(".")[0] or name
    return ArtifactError(
        f"this file uses the type {name.replace(':', '.')}, which is not known here: import {module} before "
        "accelkit.load"
    )
