"""Packing and unpacking on a GPU (or in Triton's interpreter): the same numbers as the definitions, whatever the mask."""

from __future__ import annotations

import pytest
import torch

from accelkit.ops import pack_rows, packed_layout, unpack_rows

rows = pytest.importorskip("accelkit.kernels.rows", reason="the kernels need Triton")


def masks() -> dict[str, torch.Tensor]:
    return {
        "anywhere": torch.rand(5, 9) < 0.5,
        "full": torch.ones(3, 4, dtype=torch.bool),
        "none": torch.zeros(2, 3, dtype=torch.bool),
        "one token": torch.tensor([[True]]),
        "longer than a block": torch.rand(2, 1100) < 0.4,
        "more sequences than a block": torch.rand(300, 2) < 0.4,
        "transposed": (torch.rand(9, 5) < 0.5).t(),
        "no sequence": torch.ones(0, 4, dtype=torch.bool),
        "no token": torch.ones(4, 0, dtype=torch.bool),
    }


@pytest.mark.parametrize("name", list(masks()))
def test_places(device: str, name: str) -> None:
    mask = masks()[name].to(device)
    for found, meant in zip(rows.packed_layout(mask), packed_layout.meaning(mask), strict=True):
        assert found.dtype is torch.int32
        assert torch.equal(found, meant)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("features", [(), (1,), (7,), (3, 5), (1030,)])
def test_there_and_back(device: str, dtype: torch.dtype, features: tuple[int, ...]) -> None:
    mask = (torch.rand(3, 7) < 0.5).to(device)
    x = (torch.randn(3, 7, *features) * 3).to(device, dtype)
    sources, positions, _, count = packed_layout.meaning(mask)
    packed = rows.pack_rows(x, sources, count)
    kept = int(count)
    assert torch.equal(packed[:kept], pack_rows.meaning(x, sources, count)[:kept])
    packed[kept:] = 1  # what lies there is read by nobody
    assert torch.equal(rows.unpack_rows(packed, positions), unpack_rows.meaning(packed, positions))


def test_strided_rows(device: str) -> None:
    mask = (torch.rand(4, 6) < 0.5).to(device)
    sources, positions, _, count = packed_layout.meaning(mask)
    x = torch.randn(6, 4, 16, device=device).transpose(0, 1)[:, :, ::2]
    packed = rows.pack_rows(x, sources, count)
    wide = torch.randn(24, 16, device=device)
    assert torch.equal(packed[: int(count)], x[mask])
    assert torch.equal(rows.unpack_rows(wide[:, :8], positions), unpack_rows.meaning(wide[:, :8], positions))
