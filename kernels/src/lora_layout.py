"""How the row segments and the adapters of lora_linear are laid out for its Triton kernels.

Two tables say which rows and which ranks of the concatenated bank a program works on. The number of partial sums of a
gradient depends on the layout alone, so the same inputs give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 64
SPLITS = 8  # partial sums of a gradient at most, each over 512 rows or more

Spans = list[tuple[int, int, int]]  # (adapter, first row, end row)


class Layout(NamedTuple):
    """Which rows and ranks belong to which adapter, on the device."""

    tiles: Tensor  # (tiles, 3) int64: first row, end row, adapter; in the order of the adapters
    adapters: Tensor  # (adapters, 4) int64: first rank, number of ranks, first tile, end tile
    scales: Tensor  # (adapters,) float64
    block_rows: int
    block_rank: int
    rank_blocks: int
    warps: int  # of a program with a tile of block_rows x block_rank
    splits: int


@lru_cache(maxsize=1024)
def layout(spans: tuple[tuple[int, int, int], ...], ranks: tuple[int, ...], scales: tuple[float, ...],
           device: torch.device, most_rows: int = 64) -> Layout:  # fmt: skip
    """Kept per layout, so that the copy to the device is made once, before a CUDA graph is captured."""
    # A tile has few rows while tokens are generated, but a tile product needs 16.
    block_rows = 16 if max((stop - start for _, start, stop in spans), default=0) <= 16 else most_rows
    tiles, adapters = [], []
    for i, rank in enumerate(ranks):
        first_tile = len(tiles)
        for _, start, stop in (span for span in spans if span[0] == i):
            tiles += [(row, min(row + block_rows, stop), i) for row in range(start, stop, block_rows)]
        adapters.append((sum(ranks[:i]), rank, first_tile, len(tiles)))
    longest = block_rows * max(last - first for _, _, first, last in adapters)
    block_rank = min(64, max(16, triton.next_power_of_2(max(ranks))))
    warps = 8 if block_rows * block_rank > 2048 else 4
    return Layout(
        torch.tensor(tiles or [(0, 0, 0)], device=device),
        torch.tensor(adapters, device=device),
        torch.tensor(scales, dtype=torch.float64, device=device),
        block_rows, block_rank, triton.cdiv(max(ranks), block_rank), warps, max(1, min(SPLITS, longest // 512)),
    )  # fmt: skip


def ranks_of(downs: list[Tensor]) -> tuple[int, ...]:
    """The ranks of the adapters with these A (R, in)."""
    return tuple(down.shape[0] for down in downs)


def bank(matrices: list[Tensor], dimension: int) -> Tensor:
    """The matrices of all adapters as one, along their ranks; a single one is not copied."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dimension)


def precision(x: Tensor) -> str:
    """TF32 has all the bits of a half-precision x and more of an adapter's than x's own type would keep."""
    return "tf32" if x.dtype in (torch.bfloat16, torch.float16) else "ieee"


@triton.jit
def accumulate(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in the type of acc."""
    return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
