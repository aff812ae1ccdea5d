"""Tensors as bytes and back, without pickle: `{name: tensor}` -> one blob -> `{name: tensor}`.

    b"ACKTENS1" | header's length, 8 bytes | header, JSON | padding | memory 0 | padding | memory 1 | ...

The header lists memories (each a range of the blob) and tensors (each a dtype, shape and strides over one memory), so
that tied tensors and views are stored once and stay tied, and strides survive. Every dtype that PyTorch stores in
whole bytes works, bfloat16, float8 and complex128 included. Numbers are little-endian; memories start at multiples of
64 bytes.

    >>> import torch
    >>> weight = torch.randn(2, 3)
    >>> loaded = tensors_from_bytes(tensors_to_bytes({"weight": weight, "tied": weight.t()}))
    >>> loaded["weight"].data_ptr() == loaded["tied"].data_ptr(), loaded["tied"].stride()
    (True, (1, 3))
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch

from accelkit.errors import ArtifactError

MAGIC = b"ACKTENS1"
ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register
CHUNK_BYTES = 16 * 2**20  # copied from a device at a time
_PREFIX = struct.Struct("<8sQ")

# Without the quantised ones, and int1 to uint7, which PyTorch can neither copy nor compute with.
DTYPES: dict[str, torch.dtype] = {
    name: value
    for name, value in sorted(vars(torch).items())
    if isinstance(value, torch.dtype) and str(value) == f"torch.{name}" and not re.match(r"q|bits|u?int[1-7]$", name)
}


def dtype_named(name: object) -> torch.dtype:
    """The dtype for "float32", "bfloat16", ...

    Raises:
        ArtifactError: this PyTorch has none of that name.
    """
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ArtifactError(f"this file uses dtype {name!r}, which PyTorch {torch.__version__} does not have")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- writing


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """All of `tensors` as one blob. For large ones use `write_tensors`, which copies nothing.

    Raises:
        ArtifactError: a tensor has no plain memory (meta, sparse, quantised, a tensor subclass).
    """
    stream = io.BytesIO()
    write_tensors(stream, tensors)
    return stream.getvalue()


def write_tensors(stream: BinaryIO, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what `tensors_to_bytes` returns, a chunk at a time."""
    if sys.byteorder != "little":
        raise ArtifactError("tensors are stored little-endian, and this machine is big-endian")
    plain = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    memories: dict[Any, list[int]] = {}  # key -> [first byte, end byte] that any of its tensors uses
    keys: dict[str, Any] = {}
    for name, tensor in plain.items():
        key, low, high = _extent(name, tensor)
        span = memories.setdefault(key, [low, high])
        span[0], span[1] = min(span[0], low), max(span[1], high)
        keys[name] = key
    owners = {key: plain[name] for name, key in keys.items()}
    numbers = {key: number for number, key in enumerate(memories)}
    offset, described = 0, []
    for key, (low, high) in memories.items():
        described.append({"offset": offset, "size": high - low, "device": str(owners[key].device)})
        offset = _aligned(offset + high - low)
    header = {
        "memories": described,
        "tensors": [_described(tensors[n], t, n, numbers[keys[n]], memories[keys[n]][0]) for n, t in plain.items()],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (_aligned(_PREFIX.size + len(text)) - _PREFIX.size - len(text))
    stream.write(_PREFIX.pack(MAGIC, len(text)))
    stream.write(text)
    for number, (key, (low, high)) in enumerate(memories.items()):
        for chunk in _memory_chunks(owners[key], low, high):
            stream.write(chunk)
        if number + 1 < len(memories):
            stream.write(b"\0" * (_aligned(high - low) - (high - low)))


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise ArtifactError(f"{name} is a {type(tensor).__name__}, not a tensor: it cannot be stored")
    if isinstance(tensor, (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)):
        raise ArtifactError(f"{name} has no values yet (a lazy module): run the model once before storing it")
    data = tensor.detach()
    if type(tensor.data) is not torch.Tensor:
        raise ArtifactError(
            f"{name} is a {type(tensor.data).__name__}; only plain tensors can be stored: convert it first"
        )
    if data.layout is not torch.strided or data.is_quantized or data.is_nested:
        raise ArtifactError(f"{name} is {data.layout}, {data.dtype}; only dense plain tensors can be stored")
    if data.device.type == "meta":
        raise ArtifactError(f"{name} is on the meta device: it has no values to store")
    if dtype_name(data.dtype) not in DTYPES:
        raise ArtifactError(f"{name} has dtype {data.dtype}, which cannot be stored")
    return data.resolve_conj().resolve_neg()


def _extent(name: str, tensor: torch.Tensor) -> tuple[Any, int, int]:
    # The memory that a tensor lives in, and the bytes of it that it spans; the start is rounded down so that every
    # dtype's offset stays a whole number of elements.
    if tensor.numel() == 0:
        return ("empty", name), 0, 0
    low = tensor.storage_offset()
    high = low + 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    key = (str(tensor.device), tensor.untyped_storage().data_ptr())
    return key, low * tensor.element_size() // 16 * 16, int(high) * tensor.element_size()


def _described(original: torch.Tensor, tensor: torch.Tensor, name: str, memory: int, low: int) -> dict[str, Any]:
    offset = (tensor.storage_offset() * tensor.element_size() - low) // tensor.element_size() if tensor.numel() else 0
    return {
        "name": name,
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "memory": memory,
        "offset": offset,
        "parameter": isinstance(original, torch.nn.Parameter),
        "requires_grad": original.requires_grad and original.is_leaf,
    }


def _memory_chunks(owner: torch.Tensor, low: int, high: int) -> Iterator[memoryview]:
    if high == low:
        return
    memory = torch.empty(0, dtype=torch.uint8, device=owner.device)
    memory.set_(owner.untyped_storage(), low, (high - low,), (1,))
    for start in range(0, high - low, CHUNK_BYTES):
        yield memory[start : start + CHUNK_BYTES].cpu().numpy().data


# --- reading


def tensors_from_bytes(
    data: bytes | bytearray | memoryview, *, to_saved_devices: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of a blob that `tensors_to_bytes` gave.

    Args:
        data: the blob. Tensors share its memory where it is writable (a bytearray, `Artifact.view`'s private
            mapping), and keep it alive; read-only memory (bytes) is copied once, because a tensor can always be
            written to.
        to_saved_devices: put each tensor where it was when it was stored; else all are on the CPU.

    Raises:
        ArtifactError: the blob is damaged, or a device is missing here.
    """
    try:
        return _read(memoryview(data).cast("B"), to_saved_devices)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, struct.error, RecursionError) as error:
        raise ArtifactError(f"stored tensors are damaged: {type(error).__name__}: {error}") from error


def _read(data: memoryview, to_saved_devices: bool) -> dict[str, torch.Tensor]:
    magic, length = _PREFIX.unpack_from(data)
    _require(magic == MAGIC, "stored tensors do not start with their mark")
    start = _PREFIX.size + length
    _require(length <= len(data) - _PREFIX.size and start % ALIGNMENT_BYTES == 0, "the header is longer than the data")
    header = json.loads(bytes(data[_PREFIX.size : start]))
    memories: list[torch.Tensor] = []
    expected = 0
    for entry in header["memories"]:
        offset, size = _whole(entry["offset"]), _whole(entry["size"])
        _require(offset == expected and start + offset + size <= len(data), f"memory {len(memories)} is out of bounds")
        memories.append(_memory(data, start + offset, size, entry["device"] if to_saved_devices else "cpu"))
        end, expected = offset + size, _aligned(offset + size)
    _require(start + (end if memories else 0) == len(data), "there are bytes after the last tensor")
    tensors: dict[str, torch.Tensor] = {}
    for entry in header["tensors"]:
        name = entry["name"]
        _require(isinstance(name, str) and name not in tensors, f"tensor name {name!r} is repeated or no name")
        tensors[name] = _tensor(entry, memories)
    return tensors


def _memory(data: memoryview, offset: int, size: int, device: Any) -> torch.Tensor:
    _require(isinstance(device, str), "a device has no name")
    if size == 0:
        memory = torch.empty(0, dtype=torch.uint8)
    elif data.readonly:
        memory = torch.empty(size, dtype=torch.uint8)
        memory.numpy().data[:] = data[offset : offset + size]
    else:
        memory = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)
        if memory.data_ptr() % 16:  # the blob itself is not aligned: vector loads of some processors would fault
            memory = memory.clone()
    if device == "cpu":
        return memory
    try:
        return memory.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ArtifactError(f"this was saved on {device}, which this machine cannot use: {error}") from error


def _tensor(entry: dict[str, Any], memories: list[torch.Tensor]) -> torch.Tensor:
    dtype, name = dtype_named(entry["dtype"]), entry["name"]
    shape, stride = [_whole(s) for s in entry["shape"]], [_whole(s) for s in entry["stride"]]
    number, offset = _whole(entry["memory"]), _whole(entry["offset"])
    _require(len(shape) == len(stride) <= 64 and number < len(memories), f"tensor {name} is malformed")
    memory, elements = memories[number], math.prod(shape)
    _require(elements * dtype.itemsize < 2**63, f"tensor {name} has impossible shape {shape}")
    if elements == 0:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=memory.device)
    else:
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        _require((last + 1) * dtype.itemsize <= memory.numel(), f"tensor {name} reaches past its memory")
        whole = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        tensor = whole.as_strided(shape, stride, offset)
    if entry["parameter"] is True:
        return torch.nn.Parameter(tensor, requires_grad=entry["requires_grad"] is True)
    return tensor.requires_grad_(entry["requires_grad"] is True)


def _whole(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 2**63, f"{value!r} is no size")
    return int(value)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ArtifactError(f"stored tensors are damaged: {what}")
