"""swap_attention: the kernel that was asked for, or why not. No kernel runs here: tests/ops tests them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import graph_of, guards, quick, reasons
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from accelkit.errors import InputError
from accelkit.ops import attention_kinds
from accelkit.testing import apply, graph_text, run
from accelkit_passes.swap_attention import SwapAttention

SHAPE = (2, 8, 4, 16)
KERNELS = ("triton", "cudnn", "flash", "efficient", "xformers")


attention = torch.ops.accelkit.attention


def captured(
    dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = SHAPE, mask: bool = False, batch: bool = False
) -> fx.GraphModule:
    tensors = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    if mask:
        tensors.append(torch.ones(1, 1, 1, shape[1], dtype=torch.bool))
    if mask:
        return graph_of(lambda self, q, k, v, m: attention(q, k, v, m), *tensors, batch=batch)
    return graph_of(lambda self, q, k, v: attention(q, k, v), *tensors, batch=batch)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and its packages, as far as the questions go."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention_kinds, "without_xformers", lambda: None)
    monkeypatch.setattr(attention_kinds, "without_triton", lambda: None)


def to_gpu(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with its fake tensors on a GPU."""
    with FakeTensorMode():
        for node in graph.graph.nodes:
            if isinstance(value := node.meta.get("val"), torch.Tensor):
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return graph


def test_graph_before_and_after() -> None:
    graph = captured()
    assert apply(SwapAttention("math"), graph).rewrites == ("attention: auto -> math",)
    assert graph_text(graph).splitlines()[3:] == [
        "%0: f16[2, 8, 4, 16] = accelkit.attention(%q, %k, %v, None, False, None, math)",
        "return (%0)",
    ]
    assert apply(SwapAttention("auto"), graph).rewrites == ("attention: math -> auto",)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("kind", KERNELS)
def test_each_kernel_takes_what_it_can(kind: str) -> None:
    graph = to_gpu(captured())
    result = SwapAttention(kind).run(graph)
    assert result.rewrites == [f"attention: auto -> {kind}"]
    (node,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert node.args[-1] == kind


REFUSED = [
    ("cudnn", {"dtype": torch.float32}, "cudnn attention takes bfloat16, float16, not float32"),
    ("cudnn", {"mask": True}, "cudnn attention is used without a mask"),
    ("cudnn", {"shape": (2, 8, 4, 136)}, "up to 128, not 136"),
    ("flash", {"dtype": torch.float32}, "flash attention takes bfloat16, float16, not float32"),
    ("flash", {"mask": True}, "flash attention takes no mask"),
    ("flash", {"shape": (2, 8, 4, 264)}, "up to 256, not 264"),
    ("efficient", {"shape": (2, 8, 4, 12)}, "multiples of 8 in this dtype, not 12"),
    ("xformers", {"shape": (2, 8, 4, 12)}, "multiples of 8, not 12"),
    ("triton", {"dtype": torch.float64}, "triton attention takes"),
    *((kind, {}, f"{kind} attention runs on an NVIDIA GPU, and the model is on the cpu") for kind in KERNELS),
]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("kind", "what", "reason"), REFUSED)
def test_left_alone(kind: str, what: dict[str, object], reason: str) -> None:
    graph = captured(**what)  # type: ignore[arg-type]
    before = graph_text(graph)
    (found,) = reasons(SwapAttention(kind), graph)
    assert reason in found
    assert graph_text(graph) == before


def test_without_xformers_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kinds, "without_xformers", lambda: "xFormers does not load its library (libcudart)")
    assert reasons(SwapAttention("xformers"), captured()) == ["xFormers does not load its library (libcudart)"]


def test_an_unknown_kind() -> None:
    with pytest.raises(InputError, match="unknown attention kind 'flahs'; did you mean 'flash'"):
        SwapAttention("flahs")


def test_second_run_finds_nothing_and_sizes_stay_dynamic() -> None:
    graph = captured(batch=True)
    guards_before = guards(graph)
    assert apply(SwapAttention("math"), graph).rewrites
    assert apply(SwapAttention("math"), graph).rewrites == ()
    assert guards(graph) == guards_before
    assert apply(SwapAttention("flash"), graph).rewrites == ()


@quick
@given(sizes=st.tuples(*[st.integers(1, 9)] * 4), mask=st.booleans(), seed=st.integers(0, 2**31))
def test_numbers(sizes: tuple[int, ...], mask: bool, seed: int) -> None:
    """On a CPU every kind means the same, bit for bit."""
    torch.manual_seed(seed)
    graph = captured(torch.float32, sizes, mask)
    inputs = [torch.randn(sizes) for _ in range(3)] + [torch.ones(1, 1, 1, sizes[1], dtype=torch.bool)] * mask
    before = run(graph, *inputs)[0]
    for kind in ("math", "auto"):
        assert apply(SwapAttention(kind), graph).rewrites
        assert torch.equal(run(graph, *inputs)[0], before)
