"""remove_padding: the same numbers on the kept tokens wherever the padding lies, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from pass_checks import guards, quick, write_before
from torch import Tensor, fx, nn
from torch.nn import functional as F

import accelkit
import accelkit_passes
from accelkit.pass_runner import PassRecord
from accelkit.testing import apply, graph_text, run, trace
from accelkit_passes import default_passes
from accelkit_passes.remove_padding import RemovePadding
from accelkit_passes.swap_attention import SwapAttention

HEADS, WIDTH = 2, 16
BATCH, LENGTH = accelkit.Dim("batch", min=1, max=64), accelkit.Dim("length", min=1, max=32)
BEFORE = [p for p in default_passes() if not isinstance(p, accelkit.pass_api.OnnxPass)]


class Layer(nn.Module):
    """A post-norm transformer layer; `mask` is [batch, length], True for the tokens that are attended to."""

    def __init__(self, causal: bool = False, bias: Tensor | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.causal, self.bias = causal, bias

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if mask is not None:
            mask = mask[:, None, None, :]
        if self.bias is not None:
            mask = self.bias[: x.shape[1], : x.shape[1]].masked_fill(~mask, -1e9)
        if self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.out(y))
        return self.norms[1](x + self.down(F.gelu(self.up(x))))


class Model(nn.Module):
    """Two layers and what comes of them: `after(self, hidden, mask)`."""

    def __init__(self, after: Callable[..., Any] = lambda self, hidden, mask: hidden, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**layer) for _ in range(2))
        self.head, self.after = nn.Linear(WIDTH, 5), after
        self.positions = nn.Parameter(torch.randn(32, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        kept = mask.bool()
        for layer in self.layers:
            x = layer(x, kept)
        return self.after(self, x, kept)


def inputs(*rows: str) -> tuple[Tensor, Tensor]:
    """Tokens and a mask, of rows such as "xx..": `x` is kept."""
    mask = torch.tensor([[int(c == "x") for c in row] for row in rows])
    return torch.randn(*mask.shape, WIDTH), mask


PADDED = ("xxxxx", "x....", "..xx.", "x.x.x")


def graph_of(model: nn.Module, *tensors: Tensor, dynamic: bool = False, **options: Any) -> fx.GraphModule:
    """The graph that the pass gets from the passes before it."""
    if dynamic:
        options["dynamic_shapes"] = tuple({0: BATCH, 1: LENGTH} for _ in tensors)
    graph = trace(model.eval(), *tensors, **options)
    apply(BEFORE, graph)
    return graph


def removed(graph: fx.GraphModule) -> PassRecord:
    """Run the pass, which rewrites something, adds no guard, and finds nothing to do a second time."""
    before = guards(graph)
    record = apply(RemovePadding(), graph)
    assert len(record.rewrites) == 1, record.refusals
    text = graph_text(graph)
    assert apply(RemovePadding(), graph).rewrites == ()
    assert graph_text(graph) == text
    assert guards(graph) == before  # no size was asked about
    return record


def check(model: nn.Module, *tensors: Tensor, dynamic: bool = False, others: tuple[Tensor, ...] = ()) -> PassRecord:
    """The pass changes no output where it says that it is compared, for the inputs and others of other sizes."""
    graph = graph_of(model, *tensors, dynamic=dynamic)
    plain = graph_of(model, *tensors, dynamic=dynamic)
    record = removed(graph)
    for given in (tensors, others) if others else (tensors,):
        compare(run(plain, *given), run(graph, *given), record, given)
    return record


def compare(
    before: tuple[Tensor, ...], after: tuple[Tensor, ...], record: PassRecord, given: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The results after the pass, which are those before it wherever they are to be compared."""
    where = {one.output: one.kept(*given) for one in record.open}
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        kept = where.get(index, torch.ones((), dtype=torch.bool))
        bound = 16 * torch.finfo(old.dtype).eps
        torch.testing.assert_close(new[kept], old[kept], atol=bound, rtol=bound)
    return after


def test_golden() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x * 2).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(2)
            return torch.tanh(self.out(y))

    graph = graph_of(Small(), torch.randn(2, 3, 4), torch.rand(2, 3) < 0.5)
    removed(graph)
    assert graph_text(graph) == GOLDEN


GOLDEN = """\
%qkv.weight: f32[12, 4] = attribute
%qkv.bias: f32[12] = attribute
%out.weight: f32[4, 4] = attribute
%out.bias: f32[4] = attribute
%x: f32[2, 3, 4] = input
%mask: b1[2, 3] = input
%0: f32[2, 3, 4] = aten.mul.Tensor(%x, 2)
%1: (i32[6], i32[2, 3], i32[3], i32[1]) = accelkit.packed_layout(%mask)
%2: i32[6] = getitem(%1, 0)
%3: i32[2, 3] = getitem(%1, 1)
%4: i32[3] = getitem(%1, 2)
%5: i32[1] = getitem(%1, 3)
%6: f32[6, 4] = accelkit.pack_rows(%0, %2, %5)
%7: f32[6, 12] = accelkit.linear_activation(%6, %qkv.weight, %qkv.bias, none, None, %5)
%8: f32[6, 3, 2, 2] = aten.reshape(%7, [-1, 3, 2, 2])
%9: f32[6, 2, 2] = aten.select.int(%8, 1, 0)
%10: f32[6, 3, 2, 2] = aten.reshape(%7, [-1, 3, 2, 2])
%11: f32[6, 2, 2] = aten.select.int(%10, 1, 1)
%12: f32[6, 3, 2, 2] = aten.reshape(%7, [-1, 3, 2, 2])
%13: f32[6, 2, 2] = aten.select.int(%12, 1, 2)
%14: f32[6, 2, 2] = accelkit.variable_length_attention(%9, %11, %13, %4, 3, False, None)
%15: f32[6, 4] = aten.reshape(%14, [-1, 4])
%16: f32[6, 4] = accelkit.linear_activation(%15, %out.weight, %out.bias, none, None, %5)
%17: f32[2, 3, 4] = accelkit.unpack_rows(%16, %3)
%18: f32[2, 3, 4] = aten.tanh(%17)
return (%18)"""


@functools.cache
def dynamic_graphs() -> tuple[fx.GraphModule, fx.GraphModule, PassRecord]:
    """A model's graph of any batch and length: before the pass and after, and the pass's record."""
    torch.manual_seed(0)
    model, example = Model(), inputs(*PADDED)
    before, after = (graph_of(model, *example, dynamic=True) for _ in range(2))
    return before, after, removed(after)


@quick
@hypothesis.given(
    st.integers(1, 9).flatmap(lambda n: st.lists(st.text("x.", min_size=n, max_size=n), min_size=1, max_size=4))
)
@hypothesis.example(["xxxx", "xxxx"])
@hypothesis.example(["x...", "x..."])
@hypothesis.example(["...x", ".xxx"])
@hypothesis.example(["....", "...."])
def test_numbers_of_any_batch_length_and_padding(rows: list[str]) -> None:
    before, after, record = dynamic_graphs()
    given = inputs(*rows)
    result = compare(run(before, *given), run(after, *given), record, given)
    assert not result[0][given[1] == 0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    x, mask = inputs(*PADDED)
    check(Model().to(dtype), x.to(dtype), mask)


def test_causal() -> None:
    """A token attends to the kept ones before it, wherever the padding between them lies."""
    record = check(Model(causal=True), *inputs(*PADDED))
    assert record.open


def test_transformers_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    mask = inputs(*PADDED)[1]
    given = {"input_ids": torch.randint(0, 50, mask.shape), "attention_mask": mask}
    dims = {name: {0: BATCH, 1: LENGTH} for name in given}
    before, after = (trace(model, **given, dynamic_shapes=dims) for _ in range(2))
    for graph in (before, after):
        apply(BEFORE, graph)
    record = removed(after)
    assert "64 operators" not in record.rewrites[0]
    for rows in (PADDED, ("xxxxxxx",), ("..xx", "xxxx")):
        other = inputs(*rows)[1]
        tensors = (torch.randint(0, 50, other.shape), other)
        hidden, pooled = compare(run(before, *tensors), run(after, *tensors), record, tensors)
        assert not hidden[other == 0].any()
        first = record.open[1].kept(*tensors)
        assert torch.equal(first, other[:, 0].bool())  # BERT's pooler reads the first token
        assert pooled.shape == (len(rows), 64)


def masked_mean(self: Model, hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).expand(hidden.shape).float()
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


BETWEEN: dict[str, Callable[..., Tensor]] = {
    "positions": lambda self, x, mask: x + self.positions[: x.shape[1]],
    "one number for all": lambda self, x, mask: x * self.positions[:1, None] + self.positions[0] - self.head.bias.sum(),
    "a number for each sequence": lambda self, x, mask: x * mask.sum(1)[:, None, None].rsqrt(),
    "a number for each token": lambda self, x, mask: x + mask.float().cumsum(1)[..., None],
    "heads taken apart": lambda self, x, mask: torch.cat(x.unflatten(-1, (2, -1)).softmax(-1).split(1, 2), -1).squeeze(
        2
    ),
    "features turned": lambda self, x, mask: (
        x.unflatten(-1, (2, -1)).permute(0, 1, 3, 2).flatten(2).mean(-1, keepdim=True) + x
    ),
    "a layer on heads": lambda self, x, mask: F.linear(x.unflatten(-1, (1, -1)), self.positions[:WIDTH]).squeeze(2),
    "rms norms": lambda self, x, mask: F.rms_norm(x + F.rms_norm(x, (WIDTH,)), (WIDTH,), self.positions[0]),
}


class Between(Model):
    """Something between the layers."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = mask.bool()
        return self.layers[1](self.between(self, self.layers[0](x, kept), mask), kept)


@pytest.mark.parametrize("name", BETWEEN)
def test_between_the_layers(name: str) -> None:
    """What acts on each token alone does so on packed rows: nothing is unpacked before the end."""
    dynamic = name in ("positions", "a number for each sequence")
    others = inputs("xxxx", ".x..", "...x") if dynamic else ()
    model, example = Between(BETWEEN[name]), inputs("xxxxx", "xx...", "xxx..")
    check(model, *example, dynamic=dynamic, others=others)
    graph = graph_of(model, *example)
    removed(graph)
    assert graph_text(graph).count("unpack_rows") == 1


READERS: dict[str, tuple[Callable[..., Any], int]] = {
    "a head on each token": (lambda self, hidden, mask: self.head(hidden), 1),
    "positions added again": (lambda self, hidden, mask: hidden + self.positions[: hidden.shape[1]], 1),
    "the first token": (lambda self, hidden, mask: self.head(hidden[:, 0]).tanh(), 1),
    "the first two": (lambda self, hidden, mask: hidden[:, :2].tanh(), 1),
    "chosen tokens": (
        lambda self, hidden, mask: hidden[torch.arange(hidden.shape[0]), mask.long().sum(1).clamp(1) - 1].tanh(), 1
    ),
    "a mean of the kept": (masked_mean, 0),
    "filled with zeros": (lambda self, hidden, mask: hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1), 0),
    "largest of the kept": (
        lambda self, hidden, mask: torch.where(mask.unsqueeze(-1), hidden, -1e9).max(1).values, 0
    ),
    "a shape": (lambda self, hidden, mask: torch.zeros_like(hidden).cumsum(1), 0),
    "two readers": (lambda self, hidden, mask: (hidden, masked_mean(self, hidden, mask)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_readers(name: str) -> None:
    """What follows the layers is computed from the kept tokens; outputs that hold padding are declared."""
    after, declared = READERS[name]
    assert len(check(Model(after), *inputs("xxxxx", "xx...", "xxx..")).open) == declared


class Attending(nn.Module):
    """Layers with masks of their own, and queries of another length."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(Layer() for _ in range(2)), how
        self.queries, self.same = (nn.Parameter(torch.randn(4, length, WIDTH)) for length in (3, 5))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = mask.bool()
        x = self.layers[0](x, kept)
        if self.how.startswith("cross"):  # the second layer's queries are not the tokens
            queries = self.queries if self.how == "cross" else self.layers[1].out(self.same)
            heads = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (queries, x, self.layers[1].out(x)))
            return F.scaled_dot_product_attention(*heads, kept[:, None, None, :]).transpose(1, 2)
        return self.layers[1](x, {"none": None, "other": kept | (mask == 2)}[self.how])


@pytest.mark.parametrize("how", ["cross", "cross, of the same sizes"])
def test_other_queries_that_attend_to_the_kept(how: str) -> None:
    """They are no padding, though the mask has their sizes."""
    record = check(Attending(how), *inputs(*PADDED))
    assert record.open == ()
    assert len(record.refusals) == 1


def test_two_masks() -> None:
    """The first layer's padding would be attended to by the second; the second layer's own padding can go."""
    record = check(Attending("other"), *inputs(*PADDED))
    assert ["reads padding into results of other tokens" in refusal.reason for refusal in record.refusals] == [True]


LEFT_ALONE: dict[str, tuple[nn.Module, str]] = {
    "no mask": (
        Model(lambda self, hidden, mask: Layer.forward(self.layers[0], hidden, None)),
        "it has no mask, so that nothing says which tokens are padding",
    ),
    "a layer without the mask": (Attending("none"), "(accelkit.attention.default) reads padding into results of other tokens"),
    "relative positions": (Model(bias=torch.randn(5, 5)), "is added to the scores: no mask of padding alone"),
    "tokens moved between the layers": (
        Between(lambda self, x, mask: x.flip(1) * mask[..., None]), "(aten.flip.default) reads padding into results of other tokens"
    ),
    "padding chosen": (
        Model(lambda self, hidden, mask: torch.where(mask.unsqueeze(-1), self.positions[0], hidden).sum(1)),
        "(aten.sum.dim_IntList) reads padding into results of other tokens",
    ),
    "another mask's mean": (
        Model(lambda self, hidden, mask: (hidden * mask.roll(1, 1).unsqueeze(-1)).sum(1)),
        "(aten.sum.dim_IntList) reads padding into results of other tokens",
    ),
    "a mean over padding": (
        Model(lambda self, hidden, mask: hidden.mean(1)), "mean (aten.mean.dim) reads padding into results of other tokens"
    ),
    "a convolution over tokens": (
        Model(lambda self, hidden, mask: F.conv1d(hidden.transpose(1, 2), self.positions[:, :, None])),
        "(aten.permute.default) reads padding into results of other tokens",
    ),
    "other positions mixed": (
        Model(lambda self, hidden, mask: torch.cat([hidden[:, 0], hidden[:, 1]], -1)),
        "cat (aten.cat.default) reads different positions of the sequences",
    ),
    "the first token beside each": (
        Model(lambda self, hidden, mask: hidden + hidden[:, :1]),
        "(aten.add.Tensor) reads padding into results of other tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    model, reason = LEFT_ALONE[name]
    graph = graph_of(model, *inputs("xxxxx", "xx...", "xxx..", "x...."))
    text = graph_text(graph)
    record = apply(RemovePadding(), graph)
    assert (record.rewrites, graph_text(graph)) == ((), text)
    assert any(reason in refusal.reason for refusal in record.refusals), record.refusals


def test_left_alone_without_recognised_attention() -> None:
    graph = trace(Model(), *inputs(*PADDED))
    (reason, _) = [refusal.reason for refusal in apply(RemovePadding(), graph).refusals]
    assert "recognise_attention has to run before" in reason


def test_left_alone_where_a_kernel_was_asked_for() -> None:
    graph = graph_of(Model(), *inputs(*PADDED))
    apply(SwapAttention("math"), graph)
    assert {r.reason for r in apply(RemovePadding(), graph).refusals} == {
        "it was asked to run as 'math', which takes no packed rows"
    }


def test_left_alone_where_memory_is_written() -> None:
    graph = graph_of(Model(), *inputs(*PADDED))
    write_before(graph, next(n.name for n in graph.graph.nodes if n.op == "call_function"))
    assert [r.reason for r in apply(RemovePadding(), graph).refusals] == ["the graph writes to memory"]


def test_by_request_only() -> None:
    names = [one.name for one in default_passes("fp16", remove_padding=True)]
    assert "remove_padding" not in accelkit_passes.DEFAULT
    assert [n for n in names if n != "remove_padding"] == [one.name for one in default_passes("fp16")]
    assert names.index("fuse_linear_activation") < names.index("remove_padding") < names.index("eliminate_dead_code")


def test_optimize_compares_the_kept_tokens() -> None:
    """The outputs' padding is left out of the comparison, and the report says of how many positions it was made."""
    model, given = Model(lambda self, hidden, mask: (hidden, hidden[:, 0])), inputs("xxxxx", "xx...", "..xx.")
    fast = accelkit.optimize(
        model.eval(), given, target="eager", passes=default_passes(remove_padding=True), cache=False, progress=False
    )
    (variant,) = fast.report().variants
    assert all(one.error < 1e-5 for one in variant.accuracy)
    whole, first = (note for note in variant.notes if "padding removed" in note)
    assert "compared at 9 of 15 positions" in whole
    assert "compared at 2 of 3 positions" in first
    assert not fast(*given)[0][given[1] == 0].any()
    other = (torch.randn(3, 5, WIDTH), inputs("..x..", "xxxxx", ".....")[1])
    with torch.no_grad():
        plain = model(*other)[0][other[1] == 1]
    torch.testing.assert_close(fast(*other)[0][other[1] == 1], plain, atol=1e-5, rtol=1e-5)
