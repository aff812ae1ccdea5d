"""Which kernel computes an attention: the rules, what was measured, and why each kernel refuses what it refuses."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from accelkit.ops import attention as operator
from accelkit.ops import attention_choice, attention_kinds, variable_length_attention
from accelkit.ops.attention_choice import AttentionChoice, chosen, chosen_kind, mask_form, problem_of
from accelkit.ops.attention_kinds import aligned_bias, refusal_of

half = torch.float16


def operands(
    length: int = 6,
    keys: int = 6,
    heads: int = 4,
    key_heads: int = 4,
    width: int = 16,
    dtype: torch.dtype = half,
    **on: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((2, length, heads, width), (2, keys, key_heads, width), (2, keys, key_heads, width))
    query, key, value = (torch.randn(size, dtype=dtype, **on) for size in sizes)
    return query, key, value


MASK = torch.tensor([[True] * 5 + [False], [True] * 2 + [False] * 4])[:, None, None, :]


@pytest.fixture(autouse=True)
def _xformers_is_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Everywhere but where its absence is tested, so that the rules are tested on any machine."""
    if "missing" not in request.node.name and "cuda" not in request.node.name:
        monkeypatch.setattr(attention_kinds, "without_xformers", lambda: None)
        monkeypatch.setattr(attention_kinds, "without_triton", lambda: None)


REFUSED: list[tuple[str, dict[str, Any], Tensor | None, bool, str]] = [
    ("triton", {"dtype": torch.float64}, None, False, "takes bfloat16, float16, float32, not float64"),
    ("triton", {"width": 264}, None, False, "heads up to 256 wide, not 264"),
    ("cudnn", {"dtype": torch.float32}, None, False, "takes bfloat16, float16, not float32"),
    ("cudnn", {}, MASK, False, "without a mask only"),
    ("cudnn", {"key_heads": 2}, None, False, "as many key heads as query heads"),
    ("cudnn", {"width": 136}, None, False, "multiples of 8, up to 128, not 136"),
    ("cudnn", {"width": 20}, None, False, "multiples of 8, up to 128, not 20"),
    ("cudnn", {"keys": 1}, None, False, "two keys or more"),
    ("cudnn", {"length": 5}, None, True, "draws the causal line from the last key"),
    ("flash", {"dtype": torch.float32}, None, False, "not float32"),
    ("flash", {}, MASK, False, "takes no mask"),
    ("flash", {"width": 264}, None, False, "up to 256, not 264"),
    ("flash", {"length": 5}, None, True, "draws the causal line from the last key"),
    ("efficient", {"key_heads": 2}, None, False, "as many key heads as query heads"),
    ("efficient", {"width": 12}, None, False, "multiples of 8 in this dtype, not 12"),
    ("efficient", {"width": 6, "dtype": torch.float32}, None, False, "multiples of 4 in this dtype, not 6"),
    ("xformers", {"width": 12}, None, False, "multiples of 8, not 12"),
    ("xformers", {"width": 264}, None, False, "up to 256 wide without a mask"),
    ("xformers", {"length": 5}, None, True, "draws the causal line from the last key"),
]


@pytest.mark.parametrize(("kind", "sizes", "mask", "causal", "reason"), REFUSED)
def test_refusals(kind: str, sizes: dict[str, Any], mask: Tensor | None, causal: bool, reason: str) -> None:
    assert reason in str(refusal_of(kind, *operands(**sizes), mask, causal))
    assert reason in str(operator.refusal(*operands(**sizes), mask, causal, kind=kind))
    assert refusal_of(kind, *operands(dtype=half), None, True) is None


@pytest.mark.parametrize("kind", ["triton", "cudnn", "flash", "efficient", "xformers"])
def test_every_kind_needs_one_dtype_and_one_width(kind: str) -> None:
    query, key, value = operands()
    assert "one dtype, not bfloat16, float16" in str(refusal_of(kind, query, key.bfloat16(), value, None, False))
    assert "values as wide as queries, not 8 beside 16" in str(
        refusal_of(kind, query, key, value[..., :8], None, False)
    )
    assert refusal_of("math", query, key, value[..., :8], None, False) is None


def test_unknown_sizes_are_proved_or_refused() -> None:
    """Lengths may be unknown; nothing is asked of them that would fix them."""
    query, key, value = operands(length=6, keys=6)

    def form(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        total = query + key + value  # from here on it is known that their lengths are the same
        seen.append([refusal_of(kind, query, key, value, None, True) for kind in ("triton", "cudnn", "flash")])
        return total

    seen: list[list[str | None]] = []
    dim = torch.export.Dim("length", min=2)
    model = type("Form", (torch.nn.Module,), {"forward": lambda self, *operands: form(*operands)})()
    program = torch.export.export(model, (query, key, value), dynamic_shapes=(({1: dim},) * 3,), strict=False)
    assert seen[-1] == [None, None, None]
    assert len(program.range_constraints) == 1


@pytest.mark.parametrize(
    ("sizes", "mask", "causal", "kind"),
    [
        ({}, None, False, "cudnn"),
        ({"dtype": torch.bfloat16}, None, True, "cudnn"),
        ({}, MASK, False, "triton"),
        ({"key_heads": 2}, None, False, "triton"),
        ({"length": 5}, None, True, "triton"),
        ({"dtype": torch.float32}, None, False, "efficient"),
        ({"dtype": torch.float32}, MASK, False, "efficient"),
        ({"dtype": torch.float32, "key_heads": 1}, None, False, "triton"),
        ({"width": 264}, MASK, False, "efficient"),
        ({"dtype": torch.float64}, None, False, "math"),
    ],
)
def test_rules(sizes: dict[str, Any], mask: Tensor | None, causal: bool, kind: str) -> None:
    assert chosen_kind(*operands(**sizes), mask, causal) == kind
    refused = operator.refusal(*operands(**sizes), mask, causal)
    assert (refused is None) == (kind != "math")


def test_what_was_measured_goes_before_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands()
    monkeypatch.setitem(chosen, (given[0].device, problem_of(*given, None, False)), AttentionChoice("flash"))
    assert chosen_kind(*given, None, False) == "flash"
    assert chosen_kind(*given, None, True) == "cudnn"
    assert chosen_kind(*operands(length=7), None, False) == "cudnn"


def test_a_measured_choice_that_cannot_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    where = (torch.device("cpu"), problem_of(*operands(), None, False))
    monkeypatch.setitem(chosen, where, AttentionChoice("xformers"))
    monkeypatch.setattr(attention_kinds, "without_xformers", lambda: "xFormers is not installed")
    assert attention_choice.chosen_kind(*operands(), None, False) == "cudnn"


def test_forms_of_masks() -> None:
    assert mask_form(None) == "none"
    assert mask_form(MASK) == mask_form(torch.ones(6, dtype=torch.bool)) == "boolean by key"
    assert mask_form(torch.randn(6, 6)) == "additive by query and key"


def test_xformers_that_is_missing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    attention_kinds.without_xformers.cache_clear()
    reason = refusal_of("xformers", *operands(), None, False)
    attention_kinds.without_xformers.cache_clear()
    assert "xFormers is not installed" in str(reason)
    assert 'pip install "accelkit[gpu]"' in str(reason)


def test_variable_lengths_refuse_what_the_kernel_refuses() -> None:
    query, key, value = (t[0] for t in operands(width=264))
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    assert "up to 256 wide" in str(variable_length_attention.refusal(query, key, value, offsets, 6))
    query, key, value = (t[0] for t in operands())
    assert variable_length_attention.refusal(query, key, value, offsets, 6) is None


@pytest.mark.parametrize("shape", [(6,), (2, 1, 1, 6), (4, 5, 6), (5, 1), (2, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_aligned_bias(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query = operands(length=5)[0]
    mask = torch.rand(shape) > 0.5 if dtype is torch.bool else torch.randn(shape)
    bias = aligned_bias(mask, query, 6)
    wide = mask.expand(2, 4, 5, 6)
    expected = torch.zeros(2, 4, 5, 6).masked_fill(~wide, float("-inf")) if dtype is torch.bool else wide
    assert torch.equal(bias, expected.to(half))
    assert bias.stride(3) == 1
    assert all(stride % 8 == 0 for stride in bias.stride()[:3])


@pytest.mark.parametrize("kind", operator.KINDS)
def test_on_a_cpu_all_kinds_mean_the_same(kind: str) -> None:
    given = operands(dtype=torch.float32)
    result = torch.ops.accelkit.attention(*given, MASK, kind=kind)
    assert torch.equal(result, operator.meaning(*given, MASK))


def test_math_is_the_definition() -> None:
    """The one of the kinds that a CPU can run as well."""
    empty = MASK & torch.tensor([False, True])[:, None, None, None]
    for mask in (None, MASK, torch.randn(6), empty):
        given = operands(dtype=torch.float32, key_heads=2)
        result = attention_kinds.run("math", *given, mask, mask is None, None)
        torch.testing.assert_close(result, operator.meaning(*given, mask, mask is None))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", operator.KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["none", "causal", "boolean", "additive", "grouped", "empty rows"])
def test_kinds_on_cuda(kind: str, dtype: torch.dtype, form: str) -> None:
    query, key, value = operands(37, 37, 4, 2 if form == "grouped" else 4, 64, dtype, device="cuda")
    mask = None
    if form in ("boolean", "empty rows"):
        mask = torch.rand(2, 1, 1, 37, device="cuda") > 0.4
        mask[:, ..., 0] = True
        mask[0] &= form != "empty rows"
    elif form == "additive":
        mask = torch.randn(4, 37, 37, device="cuda")
    causal = form == "causal"
    if reason := refusal_of("math" if kind == "auto" else kind, query, key, value, mask, causal):
        pytest.skip(reason)
    result = torch.ops.accelkit.attention(query, key, value, mask, causal, kind=kind)
    plain = operator.meaning(query, key, value, mask, causal)
    wide = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype).double()
    truth = operator.meaning(query.double(), key.double(), value.double(), wide, causal)
    assert result.is_contiguous()
    floor = torch.finfo(dtype).eps * truth.norm()
    assert (result.double() - truth).norm() <= 2 * (plain.double() - truth).norm() + floor


@pytest.mark.gpu
def test_no_copies_of_packed_operands_on_cuda() -> None:
    """[batch, length, heads, width] slices go to the kernels as they lie, and come back that way."""
    query, key, value = torch.randn(2, 64, 3, 4, 64, device="cuda", dtype=half).unbind(2)
    for kind in ("triton", "cudnn", "flash"):
        torch.ops.accelkit.attention(query, key, value, kind=kind)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            torch.ops.accelkit.attention(query, key, value, kind=kind)
        kernels = [event.key for event in profile.key_averages() if "mem" not in event.key.lower()]
        assert not [name for name in kernels if "copy" in name.lower() or "elementwise" in name.lower()], kind
