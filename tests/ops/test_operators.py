"""Every fused operator: what it computes, its fake and its schema, over dtypes, odd sizes, strides and bad arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from accelkit.ops import OPERATORS

fused = torch.ops.accelkit


@dataclass(frozen=True)
class Case:
    """A call of an operator, and the same in textbook formulas.

    Attributes:
        name: the operator's. arguments: those of the call. formula: the same arguments, in float64, to the results.
        rows: only so many rows (of the leading dimension) of the results mean something; None: all.
    """

    name: str
    arguments: Callable[[], dict[str, Any]]
    formula: Callable[..., Any]
    rows: int | None = None

    def __str__(self) -> str:
        return self.name


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    result = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Any, bias: Any, eps: float = 1e-5, rows: Any = None
) -> Any:
    return normalised(x + residual, weight, bias, eps), x + residual


def residual_rms_norm(x: Tensor, residual: Tensor, weight: Any, eps: float = 1e-6, rows: Any = None) -> Any:
    total = x + residual
    result = total / (total.square().mean(-1, keepdim=True) + eps).sqrt()
    return result if weight is None else result * weight, total


def embedding_layer_norm(indices: Any, tables: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Tensor:
    rows = [table[index.long()] for index, table in zip(indices, tables, strict=True)]
    return normalised(sum(rows[1:], rows[0]), weight, bias, eps)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Any, activation: str = "none", residual: Any = None, rows: Any = None
) -> Tensor:
    y = x @ weight.T + (0 if bias is None else bias)
    y = {
        "none": lambda: y,
        "gelu": lambda: y * (1 + torch.erf(y / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2,
        "relu": lambda: y.clamp_min(0),
        "silu": lambda: y / (1 + torch.exp(-y)),
    }[activation]()
    return y if residual is None else y + residual


def folded_linear(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Any = None, statistics: bool = False, **given: Any
) -> Any:
    if (moments := given.get("moments")) is not None:  # the norm before the layer, without its own weight
        x = (x - moments[..., :1]) * moments[..., 1:]
    if (moments := given.get("residual_moments")) is not None:
        residual = (residual - moments[..., :1]) * moments[..., 1:] * given["residual_weight"] + given["residual_bias"]
    y = linear_activation(x, weight, bias, given.get("activation", "none"), residual)
    if not statistics:
        return y, y.new_empty((*y.shape[:-1], 0, 2))
    groups = y.unflatten(-1, (-1, 64))
    return y, torch.stack([groups.mean(-1), groups.var(-1, correction=0) * 64], -1)


def linear_residual_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Any:
    return residual_layer_norm(x @ weight.T + bias, residual, norm_weight, norm_bias, eps)


def row_moments(statistics: Tensor, eps: float) -> Tensor:
    # rows with these statistics: 32 columns of each group one deviation above its mean, 32 one below
    deviation = (statistics[..., 1:] / 64).sqrt()
    signs = torch.tensor([1.0, -1.0], device=statistics.device, dtype=statistics.dtype).repeat_interleave(32)
    rows = (statistics[..., :1] + deviation * signs).flatten(-2)
    return torch.stack([rows.mean(-1), 1 / (rows.var(-1, correction=0) + eps).sqrt()], -1)


def patch_embedding(image: Tensor, weight: Tensor, bias: Any) -> Tensor:
    height, width = weight.shape[2:]
    patches = image.unfold(2, height, height).unfold(3, width, width)  # batch, channels, rows, columns, height, width
    result = torch.einsum("bcrxhw,fchw->brxf", patches, weight).flatten(1, 2)
    return result if bias is None else result + bias


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    causal: bool = False,
    scale: Any = None,
    kind: str = "auto",
) -> Tensor:
    members = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(members, 2), value.repeat_interleave(members, 2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    if causal:
        line = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~line, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0.0), value)


def variable_length_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, causal: bool = False, scale: Any = None
) -> Tensor:
    result = torch.zeros_like(query)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        part = (t[None, first:last] for t in (query, key, value))
        result[first:last] = attention(*part, causal=causal, scale=scale)[0]
    return result


def packed_layout(mask: Tensor) -> Any:
    kept = [i for i, keep in enumerate(mask.flatten().tolist()) if keep]
    positions = [kept.index(i) if i in kept else -1 for i in range(mask.numel())]
    counts = [sum(row) for row in mask.tolist()]
    offsets = [sum(counts[:i]) for i in range(len(counts) + 1)]
    rest = [i for i in range(mask.numel()) if i not in kept]
    numbers = (kept + rest, positions, offsets, [len(kept)])
    shapes = ((-1,), mask.shape, (-1,), (1,))
    return [torch.tensor(n, device=mask.device).reshape(shape) for n, shape in zip(numbers, shapes, strict=True)]


def pack_rows(x: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    return torch.stack([x[int(i) // x.shape[1], int(i) % x.shape[1]] for i in sources])


def unpack_rows(packed: Tensor, positions: Tensor) -> Tensor:
    result = packed.new_zeros(*positions.shape, *packed.shape[1:])
    result[positions >= 0] = packed[positions[positions >= 0].long()]
    return result


def r(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


half = torch.float16
CASES = {
    "layer norm": Case(
        "residual_layer_norm", lambda: {"x": r(2, 5, 9), "residual": r(2, 5, 9), "weight": r(9), "bias": r(9)}, residual_layer_norm
    ),
    "layer norm, fp16 beside fp32, no bias, counted rows": Case(
        "residual_layer_norm",
        lambda: {
            "x": r(6, 33, dtype=half), "residual": r(6, 33), "weight": r(33, dtype=half), "bias": None, "eps": 1e-3,
            "rows": torch.tensor([4], dtype=torch.int32),
        },
        residual_layer_norm,
        4,
    ),
    "layer norm, transposed and sliced": Case(
        "residual_layer_norm",
        lambda: {"x": r(8, 6).t(), "residual": r(6, 16)[:, ::2], "weight": r(16)[::2], "bias": r(8)},
        residual_layer_norm,
    ),
    "rms norm": Case(
        "residual_rms_norm",
        lambda: {"x": r(3, 20, dtype=half), "residual": r(3, 20, dtype=half), "weight": r(20)},
        residual_rms_norm,
    ),
    "rms norm, no weight": Case(
        "residual_rms_norm", lambda: {"x": r(20, 3).t(), "residual": r(3, 20), "weight": None, "eps": 1e-2}, residual_rms_norm
    ),
    "embeddings": Case(
        "embedding_layer_norm",
        lambda: {
            "indices": [torch.randint(0, 30, (2, 5)), torch.arange(5), torch.zeros(2, 1, dtype=torch.int32)],
            "tables": [r(30, 12), r(7, 12), r(2, 12)], "weight": r(12), "bias": r(12), "eps": 1e-12,
        },
        embedding_layer_norm,
    ),
    "one embedding, fp16": Case(
        "embedding_layer_norm",
        lambda: {"indices": [torch.randint(0, 30, (2, 3, 4))], "tables": [r(12, 30, dtype=half).t()], "weight": None, "bias": None},
        embedding_layer_norm,
    ),
    **{
        f"linear, {activation}": Case(
            "linear_activation",
            lambda activation=activation: {"x": r(2, 5, 24), "weight": r(10, 24), "bias": r(10), "activation": activation},
            linear_activation,
        )
        for activation in ("none", "gelu", "gelu_tanh", "relu", "silu")
    },
    "linear, residual, no bias, strided": Case(
        "linear_activation",
        lambda: {
            "x": r(6, 48, dtype=half)[:, ::2], "weight": r(24, 10, dtype=half).t(), "bias": None, "activation": "relu",
            "residual": r(10, 6, dtype=half).t(), "rows": torch.tensor([5], dtype=torch.int32),
        },
        linear_activation,
        5,
    ),
    "folded linear": Case(
        "folded_linear",
        lambda: {
            "x": r(2, 5, 24), "weight": (weight := r(128, 24)), "bias": r(128), "activation": "gelu",
            "moments": r(2, 5, 2).abs() + 0.5, "column_sums": weight.sum(1), "residual": r(2, 5, 128),
            "residual_moments": r(2, 5, 2).abs(), "residual_weight": r(128), "residual_bias": r(128), "statistics": True,
        },
        lambda column_sums, **given: folded_linear(**given),
    ),
    "folded linear, fp16, nothing folded": Case(
        "folded_linear",
        lambda: {"x": r(5, 24, dtype=half), "weight": r(16, 24, dtype=half), "bias": None, "residual": r(5, 16, dtype=half)},
        folded_linear,
    ),
    "linear and layer norm": Case(
        "linear_residual_layer_norm",
        lambda: {
            "x": r(2, 5, 24, dtype=half), "weight": r(16, 24, dtype=half), "bias": r(16, dtype=half),
            "residual": r(2, 5, 16, dtype=half), "norm_weight": r(16), "norm_bias": r(16, dtype=half), "eps": 1e-3,
        },
        linear_residual_layer_norm,
    ),
    "row moments": Case("row_moments", lambda: {"statistics": r(2, 5, 3, 2).abs(), "eps": 1e-3}, row_moments),
    "patches": Case("patch_embedding", lambda: {"image": r(2, 3, 9, 13), "weight": r(7, 3, 4, 4), "bias": r(7)}, patch_embedding),
    "patches, oblong, channels last": Case(
        "patch_embedding",
        lambda: {
            "image": r(1, 3, 12, 12, dtype=half).contiguous(memory_format=torch.channels_last),
            "weight": r(8, 3, 2, 6, dtype=half), "bias": None,
        },
        patch_embedding,
    ),
    "attention": Case(
        "attention", lambda: dict(zip(("query", "key", "value"), r(2, 7, 3, 2, 8).unbind(2), strict=True)), attention
    ),
    "attention, grouped, causal, fp16": Case(
        "attention",
        lambda: {
            "query": r(1, 9, 4, 16, dtype=half), "key": r(1, 9, 2, 16, dtype=half), "value": r(1, 9, 2, 16, dtype=half),
            "causal": True, "scale": 0.3,
        },
        attention,
    ),
    "attention, boolean key mask with an empty row": Case(
        "attention",
        lambda: {
            "query": r(2, 5, 2, 8), "key": r(2, 6, 2, 8), "value": r(2, 6, 2, 8),
            "mask": torch.tensor([[True] * 4 + [False] * 2, [False] * 6])[:, None, None, :],
        },
        attention,
    ),
    "attention, added mask of another dtype, causal, other value width": Case(
        "attention",
        lambda: {
            "query": r(2, 5, 2, 8, dtype=half), "key": r(2, 6, 2, 8, dtype=half), "value": r(2, 6, 2, 4, dtype=half),
            "mask": r(5, 6).half().float(), "causal": True,
        },
        attention,
    ),
    "sparse attention": Case(
        "sparse_attention",
        lambda: {
            **dict(zip(("query", "key", "value"), r(2, 7, 3, 2, 8).unbind(2), strict=True)),
            "allowed": (torch.arange(7)[:, None] - torch.arange(7)).abs() < 2,
        },
        lambda allowed, **given: attention(mask=allowed, **given),
    ),
    "sparse attention, grouped, oblong with an empty row, fp16": Case(
        "sparse_attention",
        lambda: {
            "query": r(1, 130, 4, 32, dtype=half), "key": r(1, 9, 2, 32, dtype=half), "value": r(1, 9, 2, 32, dtype=half),
            "allowed": (torch.arange(130)[:, None] + torch.arange(9)) % 3 < (torch.arange(130) != 4)[:, None], "scale": 0.3,
        },
        lambda allowed, **given: attention(mask=allowed, **given),
    ),
    "places of packed rows": Case(
        "packed_layout",
        lambda: {"mask": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool).t()},
        packed_layout,
    ),
    "rows packed": Case(
        "pack_rows",
        lambda: {
            "x": r(2, 6, 4, dtype=half)[:, ::2], "sources": torch.tensor([1, 3, 4, 0, 2, 5], dtype=torch.int32),
            "rows": torch.tensor([4], dtype=torch.int32),
        },
        pack_rows,
        4,
    ),
    "rows unpacked": Case(
        "unpack_rows",
        lambda: {"packed": r(6, 2, 3), "positions": torch.tensor([[-1, 0, 1], [-1, -1, 2]], dtype=torch.int32)},
        unpack_rows,
    ),
    "sequences": Case(
        "variable_length_attention",
        lambda: {
            "query": r(12, 2, 8), "key": r(12, 1, 8), "value": r(12, 1, 8),
            "offsets": torch.tensor([0, 3, 3, 10], dtype=torch.int32), "longest": 7, "causal": True,
        },
        variable_length_attention,
        10,
    ),
}  # fmt: skip
on_each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # `to` would keep no stride of what is sliced, and the strides are the point
    def moved(tensor: Tensor) -> Tensor:
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return copy.copy_(tensor)

    return pytree.tree_map_only(Tensor, moved, arguments)


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)


def test_every_operator_has_cases() -> None:
    assert {case.name for case in CASES.values()} == set(OPERATORS)


@on_each_case
def test_numbers(case: Case, device: str) -> None:
    arguments = on(device, case.arguments())
    results = pytree.tree_leaves(getattr(fused, case.name)(**arguments))
    plain = pytree.tree_leaves(OPERATORS[case.name].meaning(**arguments))
    formula = pytree.tree_leaves(case.formula(**doubled(arguments)))
    assert len(results) == len(plain) == len(formula)
    for result, meant, truth in zip(results, plain, formula, strict=True):
        assert result.dtype is meant.dtype
        assert result.is_contiguous()
        result, meant, truth = (t[: case.rows].double() for t in (result, meant, truth))
        floor = (torch.finfo(plain[0].dtype).eps if plain[0].is_floating_point() else 0.0) * truth.norm()
        assert (meant - truth).norm() <= 4 * floor  # the definition means the formula
        assert (result - truth).norm() <= 2 * (meant - truth).norm() + floor


@pytest.mark.parametrize("count", [0, 3, 6, 9])
def test_a_cpu_computes_the_rows_that_count(count: int) -> None:
    x, residual, weight, bias = r(2, 3, 8), r(3, 8).expand(2, 3, 8), r(8, 8), r(8)
    x.view(6, 8)[count:] = math.nan  # would show in a sum, or in a result
    rows = torch.tensor([count], dtype=torch.int32)
    calls = {
        "linear_activation": (x, weight, bias, "gelu", residual),
        "residual_layer_norm": (x, residual, bias, None, 1e-5),
        "residual_rms_norm": (x, residual, bias, 1e-6),
    }
    for name, arguments in calls.items():
        counted = pytree.tree_leaves(getattr(fused, name)(*arguments, rows))
        for result, whole in zip(counted, pytree.tree_leaves(getattr(fused, name)(*arguments)), strict=True):
            assert result.shape == whole.shape
            torch.testing.assert_close(result.view(6, 8)[:count], whole.view(6, 8)[:count])
            assert not result.view(6, 8)[count:].any()


@on_each_case
def test_schema_and_fake(case: Case, device: str) -> None:
    arguments = on(device, case.arguments())
    if "rows" in arguments:
        # rows beyond the count differ from run to run on a GPU
        arguments["rows"] = torch.full_like(arguments["rows"], 6) if case.name == "pack_rows" else None
    overload = getattr(fused, case.name).default
    if case.name == "variable_length_attention":
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # reads its offsets: no symbolic trace
    else:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, (), arguments, test_utils=tests)


@on_each_case
def test_refusals_are_sentences(case: Case) -> None:
    """They are asked of fake tensors too, and never raise."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = pytree.tree_map_only(Tensor, mode.from_tensor, case.arguments())
        reason = OPERATORS[case.name].refusal(**arguments)
    assert reason is None or len(reason.split()) > 3


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"packed_layout", "pack_rows", "unpack_rows"}))  # copy only
def test_float64_stays_with_pytorch(name: str) -> None:
    case = next(case for case in CASES.values() if case.name == name)
    reason = OPERATORS[name].refusal(**doubled(case.arguments()))
    assert reason is not None


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("residual_layer_norm", {"residual": r(5, 9)}, "the same sizes"),
    ("residual_layer_norm", {"weight": r(8)}, r"weight and bias have to be \[9\]"),
    ("residual_rms_norm", {"residual": r(1, 20)}, "the same sizes"),
    ("residual_rms_norm", {"weight": r(20, 1)}, r"weight and bias have to be \[20\]"),
    ("embedding_layer_norm", {"tables": [r(30, 12)]}, "each index needs a table"),
    ("embedding_layer_norm", {"tables": [r(30, 12), r(7, 12), r(2, 13)]}, "of one width"),
    ("embedding_layer_norm", {"bias": r(13)}, "as wide as the tables"),
    ("linear_activation", {"activation": "softplus"}, "none, gelu, gelu_tanh, relu, silu, not 'softplus'"),
    ("attention", {"kind": "fastest"}, "auto, triton, cudnn, flash, efficient, xformers, math, not 'fastest'"),
    ("attention", {"query": r(7, 2, 8)}, r"takes \[batch, length, heads, width\]"),
    ("attention", {"key": r(1, 7, 2, 8)}, "agree in batch"),
    ("attention", {"value": r(2, 6, 2, 8)}, "key and value in length"),
    ("attention", {"query": r(2, 7, 3, 8)}, "a multiple of the key's"),
    ("attention", {"mask": torch.ones(2, 1, 1, 6, dtype=torch.bool)}, "does not broadcast"),
    ("sparse_attention", {"allowed": torch.ones(7, 7)}, r"boolean \[length, keys\], not torch.float32\[7, 7\]"),
    ("sparse_attention", {"allowed": torch.ones(7, 8, dtype=torch.bool)}, "does not broadcast"),
    ("sparse_attention", {"key": r(2, 7, 2, 4)}, "agree in batch"),
    ("packed_layout", {"mask": torch.ones(2, 3)}, r"boolean \[batch, length\]"),
    ("pack_rows", {"x": r(2, 4, 4)}, "has 8 rows, and there are 6 sources"),
    ("pack_rows", {"sources": torch.arange(6)}, "int32"),
    ("unpack_rows", {"positions": torch.zeros(6, dtype=torch.int32)}, r"int32 \[batch, length\]"),
    ("variable_length_attention", {"query": r(12, 16)}, r"takes \[rows, heads, width\]"),
    ("variable_length_attention", {"query": r(11, 2, 8)}, "as many keys as queries"),
    ("variable_length_attention", {"offsets": torch.tensor([0, 12])}, "an int32 vector, not torch.int64"),
]


@pytest.mark.parametrize(("name", "changed", "message"), BAD, ids=[f"{name}-{m}" for name, _, m in BAD])
def test_bad_arguments(name: str, changed: dict[str, Any], message: str, device: str) -> None:
    case = next(case for case in CASES.values() if case.name == name)
    arguments = on(device, {**case.arguments(), **changed})
    with pytest.raises(ValueError, match=message):
        getattr(fused, name)(**arguments)
    meta = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments)
    with pytest.raises(ValueError, match=message):
        OPERATORS[name].fake(**meta)
