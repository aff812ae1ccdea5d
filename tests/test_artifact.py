"""The .accel file: whole or refused, without pickle, with the same program, signature and weights on the other side."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accelkit import artifact, program_io
from accelkit.artifact import program_from_bytes, program_to_bytes, read, tensors_from_bytes, tensors_to_bytes, write
from accelkit.capture import Program, capture
from accelkit.dims import Dim
from accelkit.errors import ArtifactError
from accelkit.signature import Constant
from accelkit.signature_json import signature_from_json, signature_to_json, value_from_json, value_to_json
from accelkit.tensors_io import DTYPES


class Tied(nn.Module):
    """Tied weights, a buffer that is not saved, a constant, a strided weight, a name that is no identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.conv = nn.Conv1d(8, 4, 3).to(torch.float32)
        self.conv.weight = nn.Parameter(torch.randn(3, 8, 4).permute(2, 1, 0))
        self.register_buffer("steps", torch.arange(8), persistent=False)
        self.more = nn.ParameterDict({"a-b c": torch.randn(8)})

    def forward(self, x: torch.Tensor, flag: bool = True, *, scale: Any = None) -> dict[str, Any]:
        y = self.second(self.first(x)) + self.steps + torch.tensor([1.0] * 8) + self.more["a-b c"]
        return {"out": self.conv(y.transpose(1, 2)), "rest": [y.shape[0], None, "text", 2.5], "flag": flag}


def tied_program() -> Program:
    return capture(Tied().eval(), (torch.randn(3, 5, 8),), {}, {"x": {0: Dim("batch", max=64)}})


def results(exported: torch.export.ExportedProgram, *inputs: Any, **named: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(exported.module()(*inputs, **named))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.fixture(scope="module")
def content() -> tuple[dict[str, Any], dict[str, bytes]]:
    """A manifest and members as CompiledModel.save makes them."""
    torch.manual_seed(3)
    program = tied_program()
    manifest = {"versions": {"accelkit": "0.1.0"}, "target": "eager", "signature": signature_to_json(program.signature)}
    samples = tensors_to_bytes({"x": torch.randn(2, 5, 8)})
    return manifest, {
        "program": program_to_bytes(program.exported),
        "engines/0/m": os.urandom(300),
        "samples/in": samples,
    }


@pytest.fixture
def path(tmp_path: Path, content: Any) -> Path:
    write(tmp_path / "model.accel", *content)
    return tmp_path / "model.accel"


# --- the file


def test_members_and_manifest_come_back(path: Path, content: Any) -> None:
    manifest, members = content
    loaded = read(path)
    assert {k: v for k, v in loaded.manifest.items() if k not in ("format_version", "members")} == manifest
    assert loaded.members == tuple(members)
    for name, data in members.items():
        assert loaded.member(name) == data == bytes(loaded.view(name)) == loaded.open(name).read()
        assert loaded.size(name) == len(data)
    loaded.verify()
    with pytest.raises(ArtifactError, match="has no member 'nothing'; it has program, engines/0/m"):
        loaded.member("nothing")


def test_it_is_an_ordinary_zip_with_aligned_members(path: Path, content: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("engines/0/m") == content[1]["engines/0/m"]
    assert all(offset % 64 == 0 for offset in read(path)._offsets.values())


def test_the_same_content_gives_the_same_file(path: Path, content: Any) -> None:
    before = path.read_bytes()
    write(path, *content)
    assert path.read_bytes() == before


def test_members_may_be_files_and_functions(tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20)
    (tmp_path / "source").write_bytes(data)

    def produce(stream: typing.BinaryIO) -> None:
        stream.write(data[:5])
        stream.write(memoryview(data)[5:])

    write(tmp_path / "f.accel", {}, {"file": tmp_path / "source", "function": produce, "none": b""})
    loaded = read(tmp_path / "f.accel")
    assert loaded.member("file") == loaded.member("function") == data
    assert loaded.member("none") == b"" == bytes(loaded.view("none"))


# --- writing fails: nothing is lost


class Stop(Exception):
    pass


def _stop(stream: Any) -> None:
    stream.write(b"half")
    raise Stop("stopped")


def _fill_disk(stream: Any) -> None:
    stream.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("manifest", "members", "error", "message"),
    [
        ({}, {"a": _stop}, Stop, "stopped"),
        (
            {},
            {"a": _fill_disk},
            ArtifactError,
            r"cannot write .*No space left on device\. The file that was there is unch",
        ),
        ({"x": object()}, {"a": b""}, ArtifactError, "the manifest is no JSON"),
        ({}, {"../a": b""}, ArtifactError, "cannot be the name of a member"),
        ({}, {"manifest.json": b""}, ArtifactError, "cannot be the name of a member"),
        ({}, {"a": Path("/nonexistent/file")}, ArtifactError, "No such file"),
    ],
)
def test_a_failed_write_keeps_the_old_file(path: Path, manifest: Any, members: Any, error: type, message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        write(path, manifest, members)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*nowhere.*No such file or directory"):
        write(tmp_path / "nowhere" / "m.accel", {}, {})


def test_a_link_keeps_its_place(path: Path) -> None:
    link = path.with_name("link.accel")
    link.symlink_to(path)
    write(link, {"new": True}, {})
    assert link.is_symlink()
    assert read(path).manifest["new"] is True


# --- reading refuses what is not whole


def use_all(path: Path) -> None:
    loaded = read(path)
    loaded.verify()
    signature_from_json(loaded.manifest["signature"])
    program_from_bytes(loaded.view("program"))


@pytest.mark.parametrize("tenth", range(10))
def test_truncated_files_are_refused(path: Path, tenth: int) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * tenth // 10])
    with pytest.raises(ArtifactError, match=r"model\.accel") as caught:
        read(path)
    assert "save" in str(caught.value)  # what to do


def test_a_flipped_bit_anywhere_is_refused(path: Path, content: Any) -> None:
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(11)
    data_starts = sorted(read(path)._offsets.values())
    near = {p for start in (*data_starts, len(whole)) for p in range(max(0, start - 200), min(len(whole), start + 20))}
    positions = near | set(torch.randint(0, len(whole), (400,), generator=generator).tolist())
    for position in sorted(positions):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"model\.accel"):
            read(path).verify()


def test_damage_is_found_before_a_member_is_used(path: Path) -> None:
    offset = read(path)._offsets["engines/0/m"]
    damaged = bytearray(path.read_bytes())
    damaged[offset + 7] ^= 4
    path.write_bytes(damaged)
    loaded = read(path)
    for use in (loaded.member, loaded.view, loaded.open):
        with pytest.raises(ArtifactError, match="its member engines/0/m does not match its hash"):
            use("engines/0/m")
    loaded.member("program")


def test_bytes_before_or_after_are_refused(path: Path) -> None:
    whole = path.read_bytes()
    for changed in (b"x" + whole, whole + b"x", whole + whole, b"PK\3\4" + whole):
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            read(path)


def test_what_is_no_accel_file_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello" * 100)
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.pkl", b"x")
    for name in ("text", "empty", "zip"):
        with pytest.raises(ArtifactError, match=r"no \.accel file.*written by CompiledModel\.save"):
            read(tmp_path / name)
    for name in ("missing", "."):
        with pytest.raises(ArtifactError, match="cannot read"):
            read(tmp_path / name)


def forge(path: Path, members: list[tuple[str, bytes]], manifest: Any, **options: Any) -> None:
    """A file whose layout hash is right, but whose content accelkit would not write."""
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, archive.compression)
        archive.writestr(artifact.MANIFEST, manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
        archive.comment = b"accelkit sha256:" + b"0" * 64
    with open(path, "rb+") as file:
        ranges = []
        for info in zipfile.ZipFile(path).infolist():
            if info.filename != artifact.MANIFEST:
                ranges.append(artifact._data_range(file, info, 2**40, path))
        digest = artifact._structure(file, ranges)
        file.seek(-64, os.SEEK_END)
        file.write(digest.encode())


def facts(data: bytes, size: int | None = None) -> dict[str, Any]:
    import hashlib

    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data) if size is None else size}


ONE = {"format_version": 1, "members": {"a": facts(b"data")}}


@pytest.mark.parametrize(
    ("members", "manifest", "message"),
    [
        ([("a", b"data"), ("a", b"data")], ONE, "two members with the name 'a'"),
        ([("a", b"data"), ("../b", b"data")], ONE, r"name '\.\./b', which accelkit never writes"),
        ([("a", b"data"), ("/b", b"data")], ONE, "which accelkit never writes"),
        ([("a", b"data"), ("b/", b"")], ONE, "which accelkit never writes"),
        ([("a", b"data"), ("b", b"data")], ONE, r"a member 'b' that its manifest\.json does not list"),
        ([], ONE, "its member 'a' is missing"),
        ([("a", b"dat")], ONE, "its member a has 3 bytes, not the 4"),
        ([("a", b"data")], {"format_version": 1}, "lists no members"),
        ([("a", b"data")], {"members": {}}, "no format_version"),
        ([("a", b"data")], [], "no format_version"),
        ([("a", b"data")], {"format_version": 1, "members": {"a": 5}}, "is damaged"),
        ([("a", b"data")], b"{", "is damaged"),
        ([("a", b"data")], b"\xff\xfe", "is damaged"),
        ([("a", b"data")], b"[" * 100_000, "is damaged"),
        (
            [("a", b"data")],
            {"format_version": 2, "versions": {"accelkit": "3.1"}},
            r"has format 2, written by accelkit 3\.1; this accelkit reads up to format 1: pip install --upgrade acc",
        ),
    ],
)
def test_forged_files_are_refused(tmp_path: Path, members: Any, manifest: Any, message: str) -> None:
    with pytest.warns(UserWarning, match="Duplicate") if len({n for n, _ in members}) < len(members) else _no_warning():
        forge(tmp_path / "m.accel", members, manifest)
    with pytest.raises(ArtifactError, match=message):
        read(tmp_path / "m.accel")


def _no_warning() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_forged_but_right_files_are_read(tmp_path: Path) -> None:
    forge(tmp_path / "m.accel", [("a", b"data")], ONE)
    assert read(tmp_path / "m.accel").member("a") == b"data"


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    data = b"\0" * 10_000_000
    forge(tmp_path / "m.accel", [("a", data)], {"members": {"a": facts(data)}}, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "m.accel").stat().st_size < 100_000
    with pytest.raises(ArtifactError, match="its member a is compressed, which accelkit never does"):
        read(tmp_path / "m.accel")
    forge(tmp_path / "m.accel", [("a", b"data")], ONE)
    whole = bytearray((tmp_path / "m.accel").read_bytes())
    place = whole.index(b"PK\1\2")
    struct.pack_into("<II", whole, place + 20, 2**31, 2**31)  # says that it is 2 GiB
    (tmp_path / "m.accel").write_bytes(whole)
    with pytest.raises(ArtifactError, match="past the end of the file"):
        read(tmp_path / "m.accel")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_noise_never_crashes_the_reader(tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("noise") / "m.accel"
    write(path, {"k": [1, 2]}, {"a": b"data", "b": b"more"})
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    changed = bytes(whole) != path.read_bytes()
    path.write_bytes(whole)
    if changed:
        with pytest.raises(ArtifactError):
            read(path).verify()


# --- tensors


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(0, 5), max_size=4),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded", "offset"]),
    writable=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_tensors_of_every_kind_come_back(dtype: str, shape: list[int], layout: str, writable: bool, seed: int) -> None:
    kind = DTYPES[dtype]
    count = torch.Size(shape).numel() * kind.itemsize
    raw = torch.randint(
        0, 2 if dtype == "bool" else 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    tensor = raw.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)
    if layout == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    if layout == "strided" and tensor.dim():
        tensor = tensor[::2]
    if layout == "expanded":
        tensor = tensor.expand(3, *tensor.shape)
    if layout == "offset" and tensor.dim():
        tensor = tensor[1:]
    data = tensors_to_bytes({"name of it": tensor, "again": tensor})
    loaded = tensors_from_bytes(bytearray(data) if writable else data)
    assert list(loaded) == ["name of it", "again"]
    result = loaded["name of it"]
    assert (result.dtype, result.shape, result.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(as_bytes(result), as_bytes(tensor))
    if tensor.numel():
        assert loaded["again"].data_ptr() == result.data_ptr()
        assert result.data_ptr() % 16 == 0 or layout == "offset"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bit for bit: NaNs too, and dtypes that cannot be compared."""
    return torch.tensor(
        list(b"".join(bytes(row.view(-1).view(torch.uint8).numpy()) for row in _rows(tensor))), dtype=torch.uint8
    )


def _rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.dim() == 0:
        return [tensor.reshape(1).clone()] if tensor.element_size() else []
    return [row for part in tensor for row in _rows(part)]


def test_sharing_parameters_and_gradients_come_back() -> None:
    base = torch.randn(6, 4)
    tensors = {
        "base": nn.Parameter(base),
        "frozen": nn.Parameter(base[2:4, ::2], requires_grad=False),
        "transposed": base.t(),
        "copy": base.clone(),
        "bits": base.view(torch.int32)[1:],
    }
    data = tensors_to_bytes(tensors)
    assert len(data) < 2 * base.nbytes + 1500  # the memory that four of them share is stored once
    loaded = tensors_from_bytes(data)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert (type(loaded[name]), loaded[name].requires_grad) == (type(tensor), tensor.requires_grad)
    loaded["base"].data[3, 2] = 77.0
    assert loaded["frozen"][1, 1] == loaded["transposed"][2, 3] == 77.0
    assert loaded["bits"][2, 2] == torch.tensor(77.0).view(torch.int32)
    assert loaded["copy"][3, 2] != 77.0


def test_only_the_used_part_of_a_large_memory_is_stored() -> None:
    assert len(tensors_to_bytes({"row": torch.randn(10_000, 100)[5000]})) < 2000


def test_memory_is_shared_where_it_may_be_written(path: Path) -> None:
    loaded = read(path)
    view = loaded.view("samples/in")
    before = path.read_bytes()
    first, second = tensors_from_bytes(view)["x"], tensors_from_bytes(view)["x"]
    assert first.data_ptr() == second.data_ptr()
    assert first.data_ptr() % 64 == 0
    first.add_(1)  # our copy alone
    assert path.read_bytes() == before
    del view, loaded
    assert torch.equal(first, second)  # the mapping lives on


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.randn(3, device="meta"), "meta device"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8), "qint8"),
        (lambda: nn.LazyLinear(3).weight, "run the model once"),
        (lambda: "text", "is a str, not a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_without_plain_memory_are_refused(tensor: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"the one.*{message}"):
        tensors_to_bytes({"the one": tensor()})


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack_from("<Q", data, 8)[0]
    return json.loads(data[16 : 16 + length]), data[16 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(16 + len(text)) % 64)
    return b"ACKTENS1" + struct.pack("<Q", len(text)) + text + rest


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("reaches past its memory", lambda h: h["tensors"][0].update(shape=[2**40])),
    ("reaches past its memory", lambda h: h["tensors"][0].update(offset=5)),
    ("reaches past its memory", lambda h: h["tensors"][0].update(stride=[2**50])),
    ("reaches past its memory", lambda h: h["tensors"][0].update(dtype="complex128")),
    ("impossible shape", lambda h: h["tensors"][0].update(shape=[2**62, 2**62], stride=[0, 0])),
    ("is no size", lambda h: h["tensors"][0].update(stride=[-1])),
    ("is no size", lambda h: h["tensors"][0].update(shape=[True])),
    ("is no size", lambda h: h["tensors"][0].update(shape=[4.0])),
    ("malformed", lambda h: h["tensors"][0].update(memory=1)),
    ("malformed", lambda h: h["tensors"][0].update(shape=[2, 2])),
    ("which PyTorch .* does not have", lambda h: h["tensors"][0].update(dtype="save")),
    ("which PyTorch .* does not have", lambda h: h["tensors"][0].update(dtype=7)),
    ("repeated", lambda h: h["tensors"].append(h["tensors"][0])),
    ("out of bounds", lambda h: h["memories"][0].update(size=2**50)),
    ("out of bounds", lambda h: h["memories"][0].update(offset=64)),
    ("after the last tensor", lambda h: h["memories"][0].update(size=8)),
    ("damaged", lambda h: h.pop("tensors")),
    ("damaged", lambda h: h["tensors"][0].pop("shape")),
]


@pytest.mark.parametrize(("message", "change"), HOSTILE)
def test_hostile_tensor_headers_are_refused(message: str, change: Callable[[dict[str, Any]], object]) -> None:
    header, rest = header_of(tensors_to_bytes({"t": torch.randn(4)}))
    assert torch.equal(*(tensors_from_bytes(d)["t"] for d in (with_header(header, rest), with_header(header, rest))))
    change(header)
    with pytest.raises(ArtifactError, match=message):
        tensors_from_bytes(with_header(header, rest))


@pytest.mark.parametrize(
    "data", [b"", b"ACKTENS1", b"x" * 100, b"ACKTENS1" + b"\xff" * 80, b"ACKTENS1" + struct.pack("<Q", 48) + b"[" * 48]
)
def test_no_tensors_at_all_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        tensors_from_bytes(data)


# --- programs


def test_a_program_computes_the_same() -> None:
    program = tied_program()
    loaded = program_from_bytes(program_to_bytes(program.exported))
    for batch in (1, 3, 17):
        x = torch.randn(batch, 5, 8)
        (expected,), (result,) = results(program.exported, x=x), results(loaded, x)
        assert torch.equal(result, expected)
    assert {str(k): (int(v.lower), int(v.upper)) for k, v in loaded.range_constraints.items()} == {
        str(k): (int(v.lower), int(v.upper)) for k, v in program.exported.range_constraints.items()
    }
    assert loaded.state_dict["first.weight"].data_ptr() == loaded.state_dict["second.weight"].data_ptr()
    assert loaded.state_dict["conv.weight"].stride() == program.exported.state_dict["conv.weight"].stride()
    assert loaded.example_inputs is None
    with pytest.raises(RuntimeError):  # the range is still guarded
        loaded.module()(torch.randn(65, 5, 8))


@pytest.mark.gpu
def test_a_program_on_a_gpu_comes_back_there() -> None:
    model, x = Tied().eval().cuda(), torch.randn(3, 5, 8, device="cuda")
    model.forward = lambda x: model.second(model.first(x)) * 2  # type: ignore[method-assign]
    exported = torch.export.export(model, (x,))
    loaded = program_from_bytes(program_to_bytes(exported))
    assert {t.device.type for t in loaded.state_dict.values()} == {"cuda"}
    assert loaded.state_dict["first.weight"].data_ptr() == loaded.state_dict["second.weight"].data_ptr()
    assert torch.equal(results(loaded, x)[0], results(exported, x)[0])
    assert tensors_from_bytes(tensors_to_bytes({"x": x}))["x"].device.type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_named() -> None:
    header, rest = header_of(tensors_to_bytes({"t": torch.randn(4)}))
    header["memories"][0]["device"] = "cuda:0"
    data = with_header(header, rest)
    assert tensors_from_bytes(data)["t"].device.type == "cpu"
    with pytest.raises(ArtifactError, match="saved on cuda:0, which this machine cannot use"):
        tensors_from_bytes(data, to_saved_devices=True)


def test_saving_does_not_change_the_program() -> None:
    program = tied_program()
    x = torch.randn(2, 5, 8)
    before, entry = results(program.exported, x=x), program.exported.module_call_graph[0]
    program_to_bytes(program.exported)
    assert program.exported.module_call_graph[0] is entry
    assert program.exported.example_inputs is not None
    assert torch.equal(before[0], results(program.exported, x=x)[0])


def test_tied_weights_are_stored_once_and_no_path_of_this_machine_is() -> None:
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False))
    model[1].weight = model[0].weight
    data = program_to_bytes(capture(model, (torch.tensor([[1, 2]]),), {}).exported)
    assert 256_000 < len(data) < 270_000
    assert os.fsencode(str(Path(__file__).parent)) not in data


def test_control_flow_and_mutated_buffers_survive() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)) + self.seen

    exported = torch.export.export(Counting(), (torch.randn(3),))
    module = program_from_bytes(program_to_bytes(exported)).module()
    assert torch.equal(module(torch.ones(3))[0], torch.ones(3) * 2 + 1)
    assert torch.equal(module(-torch.ones(3))[0], -torch.ones(3) - 1 + 2)


@pytest.mark.parametrize("name", ["program", "engines/0/m", "samples/in"])
def test_no_member_holds_a_pickle(content: Any, name: str) -> None:
    data = content[1][name]
    assert not data.startswith(b"PK")
    assert b"data.pkl" not in data
    with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
        list(pickletools.genops(data))


def test_nothing_is_unpickled_on_the_way_in(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickling")

    monkeypatch.setattr(torch, "load", refuse)
    for module in (pickle, torch.serialization.pickle):  # type: ignore[attr-defined]
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(module, name, refuse, raising=False)
    use_all(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Symbol('s0', positive=True, integer=True)", b"__import__('os').system('touch x')"),
        (b"Symbol('s0', positive=True, integer=True)", b"(lambda: 1)()"),
        (b"Symbol('s0', positive=True, integer=True)", b"Symbol.__class__"),
        (b"Symbol('s0', positive=True, integer=True)", b"sympify('1')"),
        (b"torch.ops.aten.linear.default", b"torch.hub.load"),
        (b"torch.ops.aten.linear.default", b"torch.ops.load_library"),
        (b"torch.ops.aten.linear.default", b"torch.ops.aten.__class__.__init__"),
        (b"torch.ops.aten.linear.default", b"torch.load"),
        (b'"guards_code":[]', b'"guards_code":["1 == 1"]'),
        (b'"linear"', b'"linear = 1; import os #"'),
        (b'"p_first_weight"', b'"p_first_weight): pass\\n#"'),
        (b'"first.weight"', b'"first.we\\"ight"'),
        (b"builtins.tuple", b"my.own.type"),
    ],
)
def test_texts_that_could_become_code_are_refused(old: bytes, new: bytes) -> None:
    data = program_to_bytes(tied_program().exported)
    length = struct.unpack_from("<Q", data, 8)[0]
    text = _symbol_named_s0(data[16 : 16 + length])
    assert old in text, old
    changed = text.replace(old, new)
    changed += b" " * (-(16 + len(changed)) % 64)
    with pytest.raises(ArtifactError, match="which accelkit does not store or load"):
        program_from_bytes(b"ACKPROG1" + struct.pack("<Q", len(changed)) + changed + data[16 + length :])


def _symbol_named_s0(text: bytes) -> bytes:
    import re

    return re.sub(rb"\bs\d+\b", b"s0", text)


@pytest.mark.parametrize(
    ("expression", "ok"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Max(1, Mul(Integer(2), Symbol('s0', integer=True)))", True),
        ("FloorDiv(s0, 2) + 3*s1**2 - 1", True),
        ("(s0 >= 2) & (s1 < 9)", True),
        ("open('x')", False),
        ("Symbol('s0', **{})", False),
        ("Symbol('a b()')", False),
        ("s0.name", False),
        ("s0[0]", False),
        ("[s0 for s0 in (1,)]", False),
        ("__import__", False),
        ("1 if 2 else 3", False),
        ("", False),
        ("\0", False),
    ],
)
def test_size_expressions(expression: str, ok: bool) -> None:
    assert program_io._is_size_expression(expression) is ok


@pytest.mark.parametrize("cut", [0, 8, 15, 16, 1000])
def test_damaged_programs_are_refused(content: Any, cut: int) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        program_from_bytes(content[1]["program"][:cut])


def test_an_operator_that_is_not_here_is_named(content: Any) -> None:
    data = content[1]["program"].replace(b"torch.ops.aten.linear.default", b"torch.ops.none.linear.default")
    with pytest.raises(ArtifactError, match=r"uses none\.linear\.default, which.*import the package that registers it"):
        program_from_bytes(data)


# --- signatures


class Pair(typing.NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Named:
    x: Any
    y: Any = None


@dataclasses.dataclass
class Unnamed:
    x: Any
    y: Any = None


torch.export.register_dataclass(Named, serialized_type_name="test.Named")
torch.export.register_dataclass(Unnamed)


class Containers(nn.Module):
    def forward(
        self, x: Any, flag: bool = True, *rest: Any, pair: Any = None, f: Any = len, z: Any = (1, [2.0]), **more: Any
    ) -> Any:
        d = collections.defaultdict(list, {"q": x})
        o = collections.OrderedDict(b=x + 1, a=x + 2)
        return {
            "l": [x.shape[0], None, "s", Pair(x + 3, 2.5)], "n": Named(x - 1), "u": Unnamed(x - 2, x), "o": o, "d": d,
            "m": torch.max(x, 0), "p": pair.second,
        }  # fmt: skip


def test_containers_of_every_kind_come_back() -> None:
    x = torch.randn(3, 4)
    program = capture(Containers(), (x,), {"pair": Pair(torch.randn(2), float("inf")), "extra": [1, "2"]})
    signature, text = program.signature, json.dumps(signature_to_json(program.signature))
    loaded = signature_from_json(json.loads(text))
    assert (loaded.in_spec, loaded.out_spec) == (signature.in_spec, signature.out_spec)
    assert (loaded.inputs, loaded.outputs, loaded.results) == (signature.inputs, signature.outputs, signature.results)
    assert json.dumps(signature_to_json(loaded)) == text
    output = loaded.unflatten(program.graph(*program.inputs))
    assert isinstance(output["n"], Named)
    assert isinstance(output["u"], Unnamed)
    assert isinstance(output["l"][3], Pair)
    assert isinstance(output["m"], torch.return_types.max)
    assert output["d"]["new key"] == []
    assert torch.equal(output["o"]["a"], x + 2)
    leaves = loaded.leaves((), {"pair": Pair(torch.randn(2), float("inf")), "extra": [1, "2"], "x": x, "flag": True})
    assert torch.equal(loaded.tensors_of(leaves)[0], x)


def test_a_default_that_cannot_be_stored_never_equals() -> None:
    program = capture(Containers(), (torch.randn(3, 4),), {"pair": Pair(torch.randn(2), 1)})
    loaded = signature_from_json(signature_to_json(program.signature))
    default = {name: default for name, _, default in loaded.binder.parameters}["f"]
    assert default != default
    assert default not in (len, None)
    assert "builtin" in repr(default)
    assert {n: d for n, _, d in loaded.binder.parameters}["z"] == (1, [2.0])


def test_dynamic_ranges_and_names_come_back() -> None:
    signature = tied_program().signature
    loaded = signature_from_json(json.loads(json.dumps(signature_to_json(signature))))
    assert (loaded.ranges, loaded.dims) == (signature.ranges, signature.dims)
    assert loaded.covers([torch.randn(64, 5, 8)]) is None
    assert loaded.covers([torch.randn(65, 5, 8)]) == signature.covers([torch.randn(65, 5, 8)]) is not None


TRANSFORMERS = """
import sys, torch
from accelkit.artifact import program_from_bytes, read, tensors_from_bytes
from accelkit.signature_json import signature_from_json
assert "transformers" not in sys.modules
loaded = read(sys.argv[1])
signature = signature_from_json(loaded.manifest["signature"])
tensors = tensors_from_bytes(loaded.view("samples"))
program = program_from_bytes(loaded.view("program"))
with torch.no_grad():
    leaves = program.module()(tensors["ids"], tensors["mask"])
output = torch.utils._pytree.tree_unflatten(leaves, signature.out_spec)
error = (output.last_hidden_state - tensors["hidden"]).norm() / tensors["hidden"].norm()
assert error < 1e-6, error
print(type(output).__name__, *output.keys())
"""


def test_a_transformers_model_goes_to_a_new_process(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 100, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    batch = Dim("batch", max=16)
    program = capture(model, (), call, {"input_ids": {0: batch}, "attention_mask": {0: batch}})
    assert [spec.name for spec in program.signature.tensors] == ["input_ids", "attention_mask"]
    with torch.no_grad():
        hidden = model(**call).last_hidden_state
    samples = {"ids": ids, "mask": mask, "hidden": hidden}
    write(
        tmp_path / "bert.accel",
        {"signature": signature_to_json(program.signature)},
        {
            "program": lambda stream: artifact.write_program(stream, program.exported),
            "samples": lambda stream: artifact.write_tensors(stream, samples),
        },
    )
    weights = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "bert.accel").stat().st_size < weights + 400_000
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, str(tmp_path / "bert.accel")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BaseModelOutputWithPoolingAndCrossAttentions", "last_hidden_state", "pooler_output"]


def test_unknown_types_name_the_import() -> None:
    program = capture(Containers(), (torch.randn(3, 4),), {"pair": Pair(torch.randn(2), 1)})
    text = json.dumps(signature_to_json(program.signature))
    for old, new, message in (
        ("test.Named", "some_package.outputs.Named", "import some_package.outputs before accelkit.load"),
        (f"{__name__}:Pair", "some_package.outputs:Pair", "import some_package.outputs before accelkit.load"),
        (f"{__name__}:Pair", f"{__name__}:Gone", r"type .*test_artifact\.Gone, which is not known"),
        (f"{__name__}:Pair", f"{__name__}:Named", "no longer the named tuple"),
        (f"{__name__}:Unnamed", f"{__name__}:Pair", "is not registered"),
    ):
        assert old in text
        with pytest.raises(ArtifactError, match=message):
            signature_from_json(json.loads(text.replace(old, new)))
    assert "some_package" not in sys.modules


def registered(name: str, context: Any) -> dict[str, Any]:
    spec = {"type": name, "context": context, "children_spec": []}
    return {"type": "registered", "spec": [1, spec], "children": []}


def test_a_file_cannot_import_what_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    enum = json.dumps({"__enum__": True, "fqn": "evil_module:E", "name": "A"})
    factory = {"default_factory_module": "evil_module", "default_factory_name": "f", "dict_context": []}
    for spec in (
        {"type": "namedtuple", "class": "evil_module:T", "fields": [], "children": []},
        {"type": "class", "class": "evil_module:T", "context": None, "children": []},
        registered("evil_module.T", "null"),
        registered("test.Named", enum),
        registered("collections.defaultdict", factory),
    ):
        stored = signature_to_json(tied_program().signature) | {"out_spec": spec, "outputs": []}
        with pytest.raises(ArtifactError):
            signature_from_json(stored)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**80), 1.5, float("-inf"), -0.0, 2 - 3j, "text", (1, [2, {"k": (None,)}]), {1: "a", (1, 2): "b"},
     slice(1, None, 2), torch.float8_e4m3fn, torch.device("cuda:1"), torch.strided, torch.channels_last,
     torch.Size([1, 2])],
)  # fmt: skip
def test_values_come_back_with_their_types(value: Any) -> None:
    result = value_from_json(json.loads(json.dumps(value_to_json(value))))
    assert repr(result) == repr(value)
    assert type(result) is type(value)


def test_values_that_cannot_be_stored_name_the_input() -> None:
    signature = tied_program().signature
    odd = dataclasses.replace(signature, inputs=(*signature.inputs[:-1], Constant("options[0]", object())))
    with pytest.raises(ArtifactError, match=r"options\[0\] is .*a builtins\.object cannot be stored.*Only None, bool"):
        signature_to_json(odd)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"outputs": [0] * 50},
        {"results": []},
        {"parameters": [["x", "NO_KIND", {"empty": True}]]},
        {"parameters": [["x", "KEYWORD_ONLY", 1], ["y", "POSITIONAL_ONLY", 1]]},
        {"in_spec": {"type": "tuple"}},
        {"in_spec": {"type": "set", "children": []}},
        {"ranges": {"s0": [0, -1]}},
        {"dims": 5},
        {"owner": None},
    ],
)
def test_damaged_signatures_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        signature_from_json(signature_to_json(tied_program().signature) | change)
    with pytest.raises(ArtifactError, match="damaged"):
        signature_from_json({k: v for k, v in signature_to_json(tied_program().signature).items() if k not in change})
