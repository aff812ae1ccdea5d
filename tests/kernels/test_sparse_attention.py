"""FlexAttention over a constant mask: numbers, the blocks' life, and where PyTorch's dispatcher would be in its way.

On a CPU FlexAttention's own plain form runs, without torch.compile; on a GPU the compiled kernel.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from accelkit.kernels import sparse_attention as kernels
from accelkit.ops.sparse_attention import meaning, refusal
from accelkit.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def _plain_on_a_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    yield
    kernels._KERNELS.clear()


def operands(device: str, heads: int = 2, key_heads: int = 2, width: int = 16, length: int = 150) -> list[Tensor]:
    sizes = ((2, length, heads, width), (2, length, key_heads, width), (2, length, key_heads, width))
    dtype = torch.float16 if device == "cuda" else torch.float32
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes]


def band(device: str, length: int = 150) -> Tensor:
    """Diagonal, with a row that attends to nothing."""
    place = torch.arange(length, device=device)
    allowed = (place[:, None] - place).abs() < 9
    allowed[5] = False
    return allowed


def assert_right(result: Tensor, given: list[Tensor], allowed: Tensor, scale: float | None = None) -> None:
    truth = meaning(*(t.double() for t in given), allowed, scale)
    plain = relative_error(meaning(*given, allowed, scale), truth)
    assert relative_error(result, truth) <= 2 * plain + torch.finfo(result.dtype).eps
    assert result.is_contiguous()
    assert result.dtype is given[0].dtype
    assert not result[:, 5].any()


@pytest.mark.parametrize(
    ("sizes", "scale"), [((2, 2, 16), None), ((4, 2, 32), 0.3), ((2, 2, 12), None)], ids=["equal", "grouped", "narrow"]
)
def test_numbers(device: str, sizes: tuple[int, int, int], scale: float | None) -> None:
    given, allowed = operands(device, *sizes), band(device)
    assert_right(kernels.sparse_attention(*given, allowed, scale), given, allowed, scale)


def test_few_grouped_queries_of_one_batch(device: str) -> None:
    """Where PyTorch would take its decoding kernel."""
    given, allowed = operands(device, 4, 2, 32, length=100), band(device, 100)
    given = [t[:1] for t in given]
    assert_right(kernels.sparse_attention(*given, allowed), given, allowed)


def test_the_definition_has_zeros_whatever_pytorch_gives(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernel in PyTorch 2.11 lowers the scores of pairs that are not allowed by 65504, and no more."""
    given, allowed = [t.float() for t in operands(device)], band(device)
    real = torch.nn.functional.scaled_dot_product_attention

    def as_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Tensor:
        lowered = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -65504.0)
        return real(query, key, value, lowered, **options)

    expected = meaning(*given, allowed)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", as_cudnn)
    result = meaning(*given, allowed)
    torch.testing.assert_close(result, expected)
    assert not result[:, 5].any()


def test_packed_operands_of_several_batch_sizes(device: str) -> None:
    allowed = band(device)
    for batch in (1, 2, 5):
        dtype = torch.float16 if device == "cuda" else torch.float32
        given = list(torch.randn(batch, 150, 3, 2, 16, device=device, dtype=dtype).unbind(2))
        assert_right(kernels.sparse_attention(*given, allowed), given, allowed)
    assert [len(made) for made in kernels._KERNELS.values()] == [1]


def test_made_once_a_mask_and_freed_with_it(device: str) -> None:
    given, allowed = operands(device), band(device)
    made = [kernels._kernel_for(allowed, key) for key in [(torch.float32, 2, 2, 16, 16, 0.25)] * 2]
    assert made[0] is made[1]
    kernels.sparse_attention(*given, allowed)
    assert len(kernels._KERNELS) == 1
    del allowed, made
    gc.collect()
    assert len(kernels._KERNELS) == 0


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", [torch.inference_mode, _Watching, torch.enable_grad])
def test_below_the_dispatcher(device: str, around: Any) -> None:
    """The operator runs there: where a mode is on, FlexAttention on its own fails."""
    library = torch.library.Library("accelkit_tests_sparse", "FRAGMENT")
    library.define("sparse(Tensor q, Tensor k, Tensor v, Tensor allowed) -> Tensor")
    library.impl("sparse", kernels.sparse_attention, device.upper())
    given, allowed = operands(device), band(device)
    with around():
        result = torch.ops.accelkit_tests_sparse.sparse(
            *(t.requires_grad_(around is torch.enable_grad) for t in given), allowed
        )
    assert_right(result, [t.detach() for t in given], allowed)
    library._destroy()


def test_blocks_that_are_empty_are_skipped() -> None:
    allowed = torch.zeros(500, 500, dtype=torch.bool)
    allowed[:, :128] = True
    allowed[400, 300] = True
    blocks = kernels.block_mask(allowed)
    assert blocks.full_kv_num_blocks.flatten().tolist() == [1, 1, 1, 0]
    assert blocks.kv_num_blocks.flatten().tolist() == [0, 0, 0, 2]  # the last block of rows is not whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_in_a_cuda_graph() -> None:
    given, allowed = operands("cuda"), band("cuda")
    sparse = torch.ops.accelkit.sparse_attention
    expected = sparse(*given, allowed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sparse(*given, allowed)
    graph.replay()
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"query": torch.randn(1, 9, 2, 16, dtype=torch.float64)}, "of one dtype"),
        ({"query": torch.randn(1, 9, 2, 300)}, "heads up to 256 wide, not 300"),
        ({name: torch.zeros(1, 9, 2, 16, dtype=torch.float64) for name in ("query", "key", "value")}, "takes float16"),
    ],
)
def test_left_to_plain_pytorch(changed: dict[str, Tensor], reason: str) -> None:
    given = {name: torch.randn(1, 9, 2, 16) for name in ("query", "key", "value")} | changed
    assert reason in str(refusal(**given, allowed=torch.ones(9, 9, dtype=torch.bool)))
