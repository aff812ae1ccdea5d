"""Fingerprints: the same in every process, different whenever something that matters differs."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from accelkit import fingerprint, tensor_hash
from accelkit.backend_api import Backend, Engine
from accelkit.capture import capture
from accelkit.dims import Dim
from accelkit.fingerprint import engine_key, graph_fingerprint, tensors_fingerprint, weights_fingerprint
from accelkit.pass_api import OnnxPass
from accelkit.precision import BF16, FP32

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self, width: int = 300) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("table", torch.randint(0, 1000, (2000,), generator=generator))
        self.register_buffer("scale", torch.rand((), generator=generator))
        self.weight = nn.Parameter(torch.randn(width, 8, generator=generator))
        self.tied = nn.Parameter(torch.randn(width, 8, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight) + nn.functional.linear(x, self.tied)
        return nn.functional.gelu(y, approximate="tanh") * self.scale + self.table[: y.shape[1]] + 0.5


def graph_of(model: nn.Module, *inputs: torch.Tensor, dynamic_shapes: Any = None) -> fx.GraphModule:
    inputs = inputs or (torch.ones(4, 8),)
    return capture(model.eval(), inputs, {}, dynamic_shapes).graph


def both(graph: fx.GraphModule) -> tuple[str, str]:
    return graph_fingerprint(graph, False), graph_fingerprint(graph, True)


def test_two_captures_of_one_model_agree_and_names_of_nodes_do_not_count() -> None:
    one, other = graph_of(Model()), graph_of(Model())
    for number, node in enumerate(other.graph.nodes):
        node.name = f"renamed_{number}"
    assert both(one) == both(other)
    assert weights_fingerprint(one) == weights_fingerprint(other)


# Each changes one thing of a captured graph in place.


def _node(graph: fx.GraphModule, target: Any) -> fx.Node:
    return next(n for n in graph.graph.nodes if n.target is target)


def _float_argument(graph: fx.GraphModule) -> None:
    node = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)[-1]
    node.args = (node.args[0], 0.5000000000000001)


def _int_for_float(graph: fx.GraphModule) -> None:
    node = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)[-1]
    node.args = (node.args[0], 1)


def _string_argument(graph: fx.GraphModule) -> None:
    _node(graph, aten.gelu.default).kwargs = {"approximate": "none"}


def _operator(graph: fx.GraphModule) -> None:
    _node(graph, aten.mul.Tensor).target = aten.div.Tensor


def _argument_order(graph: fx.GraphModule) -> None:
    node = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    node.args = (node.args[1], node.args[0])


def _output_twice(graph: fx.GraphModule) -> None:
    output = graph.graph.output_node()
    output.args = ((*output.args[0], output.args[0][0]),)


def _small_float(graph: fx.GraphModule) -> None:
    graph.scale = graph.scale + 2.0**-20


def _one_integer(graph: fx.GraphModule) -> None:
    graph.table = graph.table.clone()
    graph.table[1999] += 1


def _attribute_dtype(graph: fx.GraphModule) -> None:
    graph.table = graph.table.int()


def _attribute_shape(graph: fx.GraphModule) -> None:
    graph.table = torch.cat([graph.table, graph.table[:1]])


def _tying(graph: fx.GraphModule) -> None:
    graph.tied = graph.weight


def _strides(graph: fx.GraphModule) -> None:
    graph.weight = nn.Parameter(graph.weight.detach().t().contiguous().t())


def _fake_dtype(graph: fx.GraphModule) -> None:
    node = _node(graph, aten.mul.Tensor)
    node.meta["val"] = node.meta["val"].double()


def _fake_strides(graph: fx.GraphModule) -> None:
    node = _node(graph, aten.mul.Tensor)
    node.meta["val"] = node.meta["val"].t().contiguous().t()


CHANGES = [
    _float_argument, _int_for_float, _string_argument, _operator, _argument_order, _output_twice, _small_float,
    _one_integer, _attribute_dtype, _attribute_shape, _tying, _strides, _fake_dtype, _fake_strides,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_changes_it(change: Callable[[fx.GraphModule], None]) -> None:
    graph = graph_of(Model())
    before = both(graph)
    assert both(graph) == before
    change(graph)
    after = both(graph)
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_all_changes_differ_from_each_other() -> None:
    seen = set()
    for change in CHANGES:
        graph = graph_of(Model())
        change(graph)
        seen.add(graph_fingerprint(graph, False))
    assert len(seen) == len(CHANGES)


def test_large_weights_count_only_where_the_engine_holds_them() -> None:
    graph = graph_of(Model())
    before, weights = both(graph), weights_fingerprint(graph)
    with torch.no_grad():
        graph.weight[17, 3] += 1
    after = both(graph)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert weights_fingerprint(graph) != weights


def test_equivalent_spellings_agree() -> None:
    graph = graph_of(Model())
    before = both(graph)
    node = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)[-1]
    node.args, node.kwargs = (node.args[0], node.args[1]), {"alpha": 1}  # the default, spelled out
    assert both(graph) == before


def test_symbols_count_by_place_and_range_not_by_name() -> None:
    def dynamic(high: int, name: str) -> str:
        return graph_fingerprint(graph_of(Model(), dynamic_shapes={"x": {0: Dim(name, max=high)}}), False)

    assert dynamic(64, "batch") == dynamic(64, "rows")
    assert len({dynamic(64, "batch"), dynamic(32, "batch"), graph_fingerprint(graph_of(Model()), False)}) == 3


def test_two_symbols_are_not_one() -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * 2, y * 2

    inputs = (torch.ones(4, 3), torch.ones(4, 3))
    tied = Dim("n", max=9)
    same = graph_of(Add(), *inputs, dynamic_shapes={"x": {0: tied}, "y": {0: tied}})
    apart = graph_of(Add(), *inputs, dynamic_shapes={"x": {0: tied}, "y": {0: Dim("m", max=9)}})
    assert graph_fingerprint(same, False) != graph_fingerprint(apart, False)


def test_branches_of_control_flow_count() -> None:
    class Branch(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x * self.factor, lambda x: x - 1, (x,))

    first, again, other = (graph_fingerprint(graph_of(Branch(f)), False) for f in (2.0, 2.0, 3.0))
    assert first == again != other


def test_what_cannot_be_named_never_matches() -> None:
    graph = graph_of(Model())
    _node(graph, aten.gelu.default).target = lambda x, approximate: x
    assert graph_fingerprint(graph, False) != graph_fingerprint(graph, False)


SCRIPT = """
import torch
from tests.test_fingerprint import *
graph = graph_of(Model(), dynamic_shapes={"x": {0: Dim("batch", max=64)}})
key = engine_key(graph, Fake(options=("b", "a")), FP32, [Pass()], [torch.ones(4, 8)])
print(*both(graph), weights_fingerprint(graph), key)
"""


def test_it_is_the_same_in_other_processes() -> None:
    root = Path(__file__).parent.parent

    def run(seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True).stdout

    one, other = run("1"), run("2")
    assert one == other
    assert [len(part) for part in one.split()] == [64] * 4


# --- values


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64]
    ),
    shape=st.lists(st.integers(0, 5), max_size=4),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_values_count_and_strides_do_not(dtype: torch.dtype, shape: list[int], layout: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.rand(shape, generator=generator) * 200 - 100).to(dtype)
    if layout == "transposed" and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    if layout == "strided" and tensor.dim():
        tensor = tensor[::2]
    if layout == "expanded":
        tensor = tensor.expand(3, *tensor.shape)
    (first,), (copied,) = tensor_hash.contents([tensor]), tensor_hash.contents([tensor.contiguous().clone()])
    assert first == copied
    if tensor.numel():
        changed = tensor.contiguous().clone()
        raw = changed.as_strided((changed.numel(),), (1,)).view(torch.uint8)
        raw[torch.randint(0, len(raw), (), generator=generator)] ^= 1
        assert tensor_hash.contents([changed]) != [first]


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(37, 11, 5)
    views = [
        tensor,
        tensor.transpose(0, 2).contiguous().transpose(0, 2),
        tensor.to(memory_format=torch.contiguous_format),
    ]
    monkeypatch.setattr(tensor_hash, "LEAF_BYTES", 64)
    assert len(set(tensor_hash.contents(views))) == 1
    assert len(set(tensor_hash.contents([tensor, tensor + 1, tensor.reshape(-1)[:-1]]))) == 3


def test_within_a_build_each_tensor_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, reads = graph_of(Model()), []
    start = tensor_hash._start
    monkeypatch.setattr(tensor_hash, "_start", lambda tensor, pool: (reads.append(tensor), start(tensor, pool))[1])
    expected = (weights_fingerprint(graph), *both(graph))
    once = len({t.data_ptr() for t in reads})
    reads.clear()
    with tensor_hash.each_tensor_read_once():
        assert (weights_fingerprint(graph), *both(graph)) == expected
        assert len(reads) == once
        tensors = [torch.full((300,), float(n)) for n in range(3)]
        assert (
            len({tensor_hash.contents([torch.full((300,), float(n))])[0] for n in range(50)}) == 50
        )  # memory is reused
        assert len(set(tensor_hash.contents(tensors))) == 3
    with torch.no_grad():
        graph.weight += 1
    assert weights_fingerprint(graph) != expected[0]


@pytest.mark.gpu
def test_values_on_a_gpu_are_read_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for tensor in (torch.randn(1000, 7), torch.randn(64, 33).bfloat16().t(), torch.arange(5)[::2], torch.tensor(3.0)):
        monkeypatch.setattr(tensor_hash, "LEAF_BYTES", 256)
        assert tensor_hash.contents([tensor.cuda()]) == tensor_hash.contents([tensor])


def test_conjugates_are_read_as_what_they_are() -> None:
    tensor = torch.randn(5, dtype=torch.complex64)
    assert tensor_hash.contents([tensor.conj()]) == tensor_hash.contents([tensor.conj().resolve_conj()])
    assert tensor_hash.contents([tensor.conj()]) != tensor_hash.contents([tensor])


def test_lists_of_tensors() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    base = tensors_fingerprint([x, y])
    assert base == tensors_fingerprint((x.clone(), y.t().contiguous().t()))
    others = [[y, x], [x], [x, y, y], [x, y.double()], [x, y.reshape(4, 3)], [x, y + 1], []]
    assert len({base, *map(tensors_fingerprint, others)}) == 1 + len(others)


# --- engines


@dataclass(frozen=True)
class Fake(Backend):
    options: tuple[str, ...] = ()
    threads: int = 1
    thing: Any = None
    name: ClassVar[str] = "fake"
    runtime: ClassVar[str] = "1.0"

    def versions(self) -> dict[str, str]:
        return {"runtime": self.runtime, "torch": torch.__version__}

    def compile(self, graph: fx.GraphModule, inputs: Any, context: Any) -> Engine:
        raise NotImplementedError


class FakeWithoutWeights(Fake):
    embeds_weights: ClassVar[bool] = False


@dataclass(frozen=True)
class Pass(OnnxPass):
    level: int = 1

    def run(self, model: Any, result: Any) -> Any:
        return model


def test_engine_key_depends_on_everything_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = graph_of(Model()), torch.ones(4, 8)

    def key(backend: Backend = Fake(), precision: Any = FP32, passes: Any = (), inputs: Any = (x,)) -> str:
        return engine_key(graph, backend, precision, passes, inputs)

    base = key()
    keys = {
        "base": base,
        "option": key(Fake(threads=2)),
        "options in another order": key(Fake(options=("a", "b"))),
        "options in one order": key(Fake(options=("b", "a"))),
        "another backend": key(FakeWithoutWeights()),
        "precision": key(precision=BF16),
        "a pass": key(passes=(Pass(),)),
        "a pass's option": key(passes=(Pass(level=2),)),
        "input shape": key(inputs=(torch.ones(5, 8),)),
        "input dtype": key(inputs=(x.double(),)),
        "input strides": key(inputs=(torch.ones(8, 4).t(),)),
        "one more input": key(inputs=(x, x)),
        "another graph": engine_key(graph_of(Model(301)), Fake(), FP32, (), (x,)),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        keys["threads"] = key()
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr(Fake, "runtime", "1.1")
        keys["runtime version"] = key()
    with monkeypatch.context() as patch:
        patch.setattr("accelkit.__version__", "99.0")
        keys["accelkit version"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_own_code", lambda: "changed")
        keys["accelkit code"] = key()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_machine", lambda: "another")
        keys["machine"] = key()
    assert len(set(keys.values())) == len(keys), keys
    assert key() == base


@pytest.fixture
def fp32_settings() -> Iterator[None]:
    owners = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [owner.fp32_precision for owner in owners]
    yield
    for owner, value in zip(owners, before, strict=True):
        owner.fp32_precision = value


def test_settings_that_change_nothing_here_are_not_in_the_key(fp32_settings: None) -> None:
    graph, x = graph_of(Model()), torch.ones(4, 8)
    base = engine_key(graph, Fake(), FP32, (), (x,))
    torch.set_float32_matmul_precision("highest")  # what a process starts with, under another name
    assert engine_key(graph, Fake(), FP32, (), (x,)) == base
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # of another device
    assert engine_key(graph, Fake(), FP32, (), (x,)) == base
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert engine_key(graph, Fake(), FP32, (), (x,)) != base


def test_weights_reach_the_key_only_where_engines_embed_them() -> None:
    x = torch.ones(4, 8)
    for backend, same in ((Fake(), False), (FakeWithoutWeights(), True)):
        graph = graph_of(Model())
        other = copy.deepcopy(graph)
        with torch.no_grad():
            other.weight += 1
        keys = [engine_key(g, backend, FP32, (), (x,)) for g in (graph, other)]
        assert (keys[0] == keys[1]) is same


@dataclass(frozen=True)
class Refittable(Fake):
    """A backend that lets an option decide."""

    refittable: bool = False

    @property
    def embeds_weights(self) -> bool:
        return not self.refittable

    @property
    def embeds_below_bytes(self) -> int:
        return 0


def test_a_backend_may_embed_by_its_options() -> None:
    x, graph = torch.ones(4, 8), graph_of(Model())
    large, small = copy.deepcopy(graph), copy.deepcopy(graph)
    with torch.no_grad():
        large.weight += 1
        small.scale += 1

    def keys(backend: Backend) -> list[str]:
        return [engine_key(g, backend, FP32, (), (x,)) for g in (graph, large, small)]

    assert len(set(keys(Refittable()))) == 3
    assert len(set(keys(Refittable(refittable=True)))) == 1
    assert len(set(keys(FakeWithoutWeights()))) == 2  # a small one is a constant to it


def test_an_option_shown_by_its_address_never_matches() -> None:
    graph, x, backend = graph_of(Model()), torch.ones(4, 8), Fake(thing=object())
    assert engine_key(graph, backend, FP32, (), (x,)) != engine_key(graph, backend, FP32, (), (x,))
    named = dataclasses.replace(backend, thing="a name")
    assert engine_key(graph, named, FP32, (), (x,)) == engine_key(graph, named, FP32, (), (x,))


def test_large_weights_are_hashed_at_gigabytes_per_second() -> None:
    # 440 MB must take well below half a second on two idle cores; three times as much is let pass on busy machines.
    import time

    graph = graph_of(nn.Linear(2048, 2048 * 4, bias=False), torch.ones(1, 2048))
    size_bytes = 2048 * 2048 * 4 * 4
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        weights_fingerprint(graph)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) / size_bytes * 440e6 < 1.5
