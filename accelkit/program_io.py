"""A torch.export program as bytes and back, without pickle.

    ExportedProgram --program_to_bytes--> b"ACKPROG1" | length | graph, JSON | padding | tensors (see
    accelkit.tensors_io)

torch.export.save and .load go through pickle (example inputs always, tensor subclasses and custom objects too:
torch/export/ pt2_archive/_package.py and torch/_export/serde/serialize.py, PyTorch 2.9 to 2.15), so only their JSON
for graphs is used here, and tensors are handed over as tensors. Containers are left out as well: the stored program
takes the leaves of the call's arguments, one by one, and returns the leaves of its output; `accelkit.signature_json`
holds the containers. Example inputs, guards and stack traces (file names of the author's machine) are dropped. The
JSON is checked before PyTorch sees it, because PyTorch evaluates its size expressions as Python, and pastes its names
into generated Python.

    >>> import torch
    >>> exported = torch.export.export(torch.nn.Linear(3, 2), (torch.randn(1, 3),))
    >>> loaded, x = program_from_bytes(program_to_bytes(exported)), torch.randn(1, 3)
    >>> torch.equal(loaded.module()(x)[0], exported.module()(x))
    True
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import json
import re
import struct
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch.utils import _pytree as pytree

from accelkit.errors import ArtifactError
from accelkit.tensors_io import ALIGNMENT_BYTES, tensors_from_bytes, write_tensors

MAGIC = b"ACKPROG1"
_PREFIX = struct.Struct("<8sQ")
_LOADING = threading.Lock()  # PyTorch's deserialiser keeps its state in a global


# --- writing


def program_to_bytes(exported: torch.export.ExportedProgram) -> bytes:
    """The program with its weights. For large ones use `write_program`, which does not copy the weights.

    Raises:
        ArtifactError: the program holds something that cannot be stored (custom objects, tensor subclasses, ...).
    """
    stream = io.BytesIO()
    write_program(stream, exported)
    return stream.getvalue()


def write_program(stream: BinaryIO, exported: torch.export.ExportedProgram) -> None:
    """Write what `program_to_bytes` returns, a chunk at a time."""
    for name, value in exported.constants.items():
        if not isinstance(value, torch.Tensor):
            raise ArtifactError(f"the model holds {name}, a {type(value).__name__}: only tensors can be stored")
    graph = _graph_json(exported)
    _check(graph, "")
    text = json.dumps(graph, separators=(",", ":")).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % ALIGNMENT_BYTES)
    stream.write(_PREFIX.pack(MAGIC, len(text)))
    stream.write(text)
    state = {f"state.{name}": value for name, value in exported.state_dict.items()}
    write_tensors(stream, state | {f"constant.{name}": value for name, value in exported.constants.items()})


def _graph_json(exported: torch.export.ExportedProgram) -> dict[str, Any]:
    from torch._export.serde import serialize

    flat = copy.copy(exported)
    flat._module_call_graph = [_flat_call(exported)]
    flat._example_inputs = None
    flat._guards_code = []
    # PyTorch 2.9 cannot leave the tensors out of its pickled part, which is dropped below in any case.
    known = inspect.signature(serialize.serialize).parameters
    parts = ("serialize_state_dict", "serialize_constants", "serialize_example_inputs")
    without: dict[str, Any] = {part: False for part in parts if part in known}
    try:
        stored = serialize.serialize(flat, **without)
        graph = json.loads(stored.exported_program)
    except Exception as error:  # whatever the unstorable part happens to trip over
        raise ArtifactError(f"PyTorch cannot serialise this program: {type(error).__name__}: {error}") from error
    assert isinstance(graph, dict)
    _strip(graph)
    _blank_constant_outputs(graph["graph_module"])
    return graph


def _flat_call(exported: torch.export.ExportedProgram) -> Any:
    # The same call with tuples of leaves: no container's type has to be known when it is loaded.
    (entry, *_) = exported.module_call_graph
    signature = copy.copy(entry.signature)
    assert signature is not None
    signature.in_spec = pytree.tree_structure(((0,) * signature.in_spec.num_leaves, {}))
    signature.out_spec = pytree.tree_structure((0,) * signature.out_spec.num_leaves)
    signature.forward_arg_names = None
    return type(entry)(fqn=entry.fqn, signature=signature)


def _strip(value: Any) -> None:
    if isinstance(value, dict):
        if "target" in value and isinstance(value.get("metadata"), dict):
            value["metadata"] = {k: v for k, v in value["metadata"].items() if k == "nn_module_stack"}
        for inner in value.values():
            _strip(inner)
    elif isinstance(value, list):
        for inner in value:
            _strip(inner)


def _blank_constant_outputs(module: dict[str, Any]) -> None:
    # PyTorch writes constants that a model returns, but reads only some kinds back. `Signature.outputs` has them all.
    computed = ("as_tensor", "as_sym_int", "as_sym_float", "as_sym_bool")
    for outputs in (
        module["graph"]["outputs"],
        [s.get("user_output", {}) for s in module["signature"]["output_specs"]],
    ):
        for place in outputs:
            argument = place.get("arg", place)
            if argument and not any(kind in argument for kind in computed):
                argument.clear()
                argument["as_none"] = True


# --- reading


def program_from_bytes(data: bytes | bytearray | memoryview) -> torch.export.ExportedProgram:
    """The program, with its weights where they were (CPU weights share `data`'s memory if it is writable).

    `.module()` of it takes the flat leaves of the arguments and returns the tuple of the output's leaves.

    Raises:
        ArtifactError: the data is damaged, was written by a PyTorch that this one does not understand, uses operators
            that are not registered here, or lives on a device that is not here.
    """
    view = memoryview(data).cast("B")
    if len(view) < _PREFIX.size or _PREFIX.unpack_from(view)[0] != MAGIC:
        raise ArtifactError("the stored program is damaged: it does not start with its mark")
    end = _PREFIX.size + _PREFIX.unpack_from(view)[1]
    if end > len(view):
        raise ArtifactError("the stored program is damaged: it ends early")
    try:
        graph = json.loads(bytes(view[_PREFIX.size : end]))
        _check(graph, "")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the stored program is damaged: {error}") from error
    tensors = tensors_from_bytes(view[end:], to_saved_devices=True)
    return _program(graph, _with_prefix(tensors, "state."), _with_prefix(tensors, "constant."))


def _with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _program(graph: Any, state: Any, constants: Any) -> torch.export.ExportedProgram:
    from torch._export.serde import schema, serialize

    import accelkit.ops  # noqa: F401  a saved model may call fused operators itself

    by = graph.get("torch_version", "an unknown version") if isinstance(graph, dict) else "an unknown version"
    if missing := sorted(set(_missing_operators(graph))):
        raise ArtifactError(
            f"this program, written by PyTorch {by}, uses {', '.join(missing)}, which PyTorch {torch.__version__} does "
            "not have here: import the package that registers it before accelkit.load, or use that version of PyTorch"
        )
    try:
        with _LOADING:
            described = serialize._dict_to_dataclass(schema.ExportedProgram, graph)  # type: ignore[no-untyped-call]
            return serialize.ExportedProgramDeserializer().deserialize(described, state, constants, None)
    except Exception as error:  # whatever the part that it does not understand happens to trip over
        first = next(iter(str(error).splitlines()), "")[:300]
        raise ArtifactError(
            f"PyTorch {torch.__version__} cannot read this program, written by PyTorch {by}: {type(error).__name__}: "
            f"{first}. Load it with that version"
        ) from error


def _missing_operators(value: Any) -> Iterator[str]:
    """Names of the operators in a graph that are not registered here."""
    if isinstance(value, dict):
        target = value.get("target")
        if isinstance(target, str) and target.startswith("torch.ops.") and _operator_named(target) is None:
            yield target.removeprefix("torch.ops.")
        for inner in value.values():
            yield from _missing_operators(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _missing_operators(inner)


def _operator_named(target: str) -> Any:
    found: Any = torch.ops
    for part in target.split(".")[2:]:
        found = getattr(found, part, None)
    return found


# --- what a stored graph may say

_WORD = re.compile(r"[A-Za-z0-9_.:+\-]*")
_STATE_NAME = re.compile(r"[^\x00-\x1f\"'\\\x7f\u2028\u2029]*")
_TARGET = re.compile(
    r"torch\.ops(\.(?!__)\w+){2,3}|torch\.ops\.aten\.__i?(and|or|xor|lshift|rshift)__\.\w+"
    r"|(_operator|math)\.(?!__)\w+|torch\._?sym_\w+"
)
_NAMES_OF_STATE = {"parameter_name", "buffer_name", "tensor_constant_name"}
_FREE_TEXT = {
    "as_string",
    "as_strings",
    "metadata",
}  # PyTorch takes these as data: they reach code through repr, if at all
_SIZE_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.keyword, ast.Name, ast.Load,
    ast.Constant, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def _check(value: Any, key: str) -> None:
    """Refuse a graph with a text in it that could become code; `key` is the nearest one above `value`."""
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            _check_text(inner_key, "name")
            if inner_key not in _FREE_TEXT:
                _check(inner, inner_key)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, key)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_text(text: str, key: str) -> None:
    if key == "expr_str":
        ok = _is_size_expression(text)
    elif key == "guards_code":
        ok = False
    elif key in ("in_spec", "out_spec"):
        ok = _has_plain_containers(text)
    elif key in ("target", "as_operator"):
        ok = _TARGET.fullmatch(text) is not None or (key == "target" and text.isidentifier())
    elif key in _NAMES_OF_STATE:
        ok = _STATE_NAME.fullmatch(text) is not None
    else:
        ok = _WORD.fullmatch(text) is not None
    if not ok:
        raise ArtifactError(f"the program has {key or 'a text'} {text[:200]!r}, which accelkit does not store or load")


def _is_size_expression(text: str) -> bool:
    """Whether `text` only builds sizes: `Max(1, 2*Symbol('s0', integer=True))`. No attribute, no subscript, no other
    call."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SIZE_NODES):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _WORD.fullmatch(node.value):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and _builds_size(node.func.id)):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return False
    return True


def _builds_size(name: str) -> bool:
    import sympy
    from torch.utils._sympy import functions

    function = getattr(functions, name, None) or getattr(sympy, name, None)
    return isinstance(function, type) and issubclass(function, sympy.Basic)


def _has_plain_containers(text: str) -> bool:
    def plain(spec: Any) -> bool:
        return spec["type"] in (None, "builtins.tuple", "builtins.dict") and all(map(plain, spec["children_spec"]))

    try:
        return plain(json.loads(text)[1])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return False
