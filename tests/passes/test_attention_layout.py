"""Chains of views, read as layouts and written as the fewest views."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pass_checks import graph_of, guards, quick
from torch import Tensor, fx

from accelkit.testing import run
from accelkit_passes._attention_editor import Editor
from accelkit_passes._attention_views import is_copy, steps

aten = torch.ops.aten


def shortened(graph: fx.GraphModule) -> tuple[fx.Node, list[str]]:
    """The graph with its last view made of what was computed last; the views that it takes."""
    editor = Editor(graph)
    (last,) = graph.graph.output_node().all_input_nodes
    layout = editor.layout(last)
    new = editor.emit(layout, graph.graph.output_node())
    last.replace_all_uses_with(new)
    graph.graph.lint()
    graph.recompile()
    return layout.root, [step.target.__name__.partition(".")[0] for step in steps(layout)]


def packed(x: Tensor) -> Tensor:
    """nn.MultiheadAttention's way to the keys."""
    x = x.unflatten(-1, (3, 8)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return x[1].view(5, 2 * 4, 2).transpose(0, 1).reshape(2, 4, 5, 2)


CHAINS = {
    "there and back": (lambda x: x.transpose(0, 1).permute(1, 0, 2).reshape(5, 2, 24), []),
    "reshapes": (lambda x: x.view(10, 24).view(10, 4, 6).view(5, 2, 2, 2, 6), ["reshape"]),
    "packed": (packed, ["reshape", "select", "permute"]),
    "chunk": (lambda x: x.chunk(3, -1)[2].view(5, 2, 4, 2), ["reshape", "select"]),
    "unequal split": (lambda x: x.split([16, 8], -1)[0].view(5, 2, 4, 4), ["reshape"]),  # of the piece
    "unbind": (lambda x: x.view(5, 2, 3, 8).unbind(2)[-1], ["reshape", "select"]),
    "narrow": (lambda x: x[:, :, 8:16], ["reshape", "select"]),
    "expand and back": (lambda x: x[:, :, None].expand(5, 2, 3, 24).reshape(10, 3, 24), ["reshape", "expand"]),
    "repeat": (lambda x: x.repeat_interleave(2, 1), ["reshape", "expand", "reshape"]),
    "a step": (lambda x: x[:, :, ::2].transpose(0, 1), ["permute"]),  # of the slice
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chain(chain: str) -> None:
    function, expected = CHAINS[chain]
    x = torch.randn(5, 2, 24)
    graph = graph_of(lambda self, x: function(x + 1), x)
    before = run(graph, x)[0]
    _, found = shortened(graph)
    assert torch.equal(run(graph, x)[0], before)
    assert found == expected


def test_symbolic_sizes_are_split_where_it_is_proved() -> None:
    x = torch.randn(3, 5, 24)
    graph = graph_of(
        lambda self, x: (x + 1).reshape(-1, 24).reshape(x.shape[0], 5, 4, 6).transpose(1, 2).reshape(-1, 5, 6), x, batch=True
    )  # fmt: skip
    guards_before = guards(graph)
    root, found = shortened(graph)
    assert (root.target, found) == (aten.add.Tensor, ["reshape", "permute", "reshape"])
    assert guards(graph) == guards_before
    x = torch.randn(7, 5, 24)
    assert torch.equal(run(graph, x)[0], (x + 1).reshape(7, 5, 4, 6).transpose(1, 2).reshape(-1, 5, 6))


def test_memory_that_is_written_to_is_not_looked_through() -> None:
    def write(self: object, x: Tensor) -> Tensor:
        copy = x.transpose(0, 1).contiguous()
        x.add_(1)
        return copy.transpose(0, 1)

    graph = graph_of(write, torch.randn(3, 4))
    views = [n for n in graph.graph.nodes if n.target is aten.transpose.int]
    assert len(views) == 2
    assert Editor(graph).layout(views[1]).root is views[1].args[0]


def random_view(x: Tensor, choice: random.Random) -> Tensor:
    kind = choice.choice(["permute", "reshape", "select", "unsqueeze", "squeeze", "expand", "narrow", "contiguous"])
    if kind == "permute":
        return x.permute(*choice.sample(range(x.dim()), x.dim()))
    if kind == "reshape":
        primes = [p for p in (2, 2, 3, 5) if x.numel() % p == 0]
        size, sizes = x.numel(), []
        for p in choice.sample(primes, len(primes)):
            if size % p == 0 and choice.random() < 0.7:
                sizes.append(p)
                size //= p
        return x.reshape(*sizes, size)
    if kind == "select" and x.dim() > 2:
        dim = choice.randrange(x.dim())
        return x.select(dim, choice.randrange(x.shape[dim]))
    if kind == "unsqueeze":
        return x.unsqueeze(choice.randrange(x.dim() + 1))
    if kind == "squeeze":
        return x.squeeze(choice.randrange(x.dim()))
    if kind == "expand" and 1 in x.shape:
        return x.expand(*(choice.choice([1, 2]) if s == 1 else s for s in x.shape))
    if kind == "narrow":
        dim = choice.randrange(x.dim())
        length = choice.randint(1, x.shape[dim])
        return x.narrow(dim, choice.randint(0, x.shape[dim] - length), length)
    return x.contiguous()


@quick
@given(seed=st.integers(0, 2**31), length=st.integers(1, 8))
def test_any_chain_gives_the_same_elements(seed: int, length: int) -> None:
    def chain(self: object, x: Tensor) -> Tensor:
        choice, y = random.Random(seed), x + 1
        for _ in range(length):
            y = random_view(y, choice)
        return y * 1 if y.numel() < 2 else y

    x = torch.randn(4, 6, 5)
    graph = graph_of(chain, x)
    before = run(graph, x)[0]
    views = sum(node.op == "call_function" for node in graph.graph.nodes)
    _, found = shortened(graph)
    assert len(found) <= views
    assert torch.equal(run(graph, x)[0], before)


def test_what_is_a_copy() -> None:
    graph = graph_of(lambda self, x: (x + 1).view(4, 3, 2).transpose(0, 1).reshape(3, 8), torch.randn(4, 6))
    editor = Editor(graph)
    copy, view = (n for n in graph.graph.nodes if n.target in (aten.reshape.default, aten.transpose.int))
    assert math.prod(copy.meta["val"].shape) == 24
    assert [is_copy(editor.layout(n)) for n in (copy, view)] == [False, True]
