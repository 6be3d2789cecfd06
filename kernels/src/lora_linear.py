"""The low-rank half of a linear layer whose row segments use different adapters; see rlhf_fast/ops/lora_linear.py.

shrink: h[rows] = x[rows] @ down^T. expand: y[rows] += scale * h[rows] @ up^T. One launch each for all segments: a
program works on a tile of rows, and a table says which rows and which slice of the concatenated bank. No atomics.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_OUT, BLOCK_RANK = 64, 16


@triton.jit
def _shrink_kernel(
    x,  # (N, K)
    down,  # (sum of ranks, K)
    h,  # (N, widest rank), contiguous
    tiles,  # (tiles, 4) int64: first row, end row, first rank, number of ranks
    K,
    x_row,
    x_column,
    down_row,
    down_column,
    h_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    first, rank = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    acc_type = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    rows = start + tl.arange(0, BLOCK_ROWS)
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_RANK], acc_type)
    for k in range(0, K, BLOCK_K):
        columns = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_tile = tl.load(
            x + rows[:, None] * x_row + columns[None, :] * x_column,
            mask=(rows < stop)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        down_tile = tl.load(
            down + (first + ranks)[None, :] * down_row + columns[:, None] * down_column,
            mask=(ranks < rank)[None, :] & (columns < K)[:, None],
            other=0.0,
        )
        acc = tl.dot(x_tile.to(acc_type), down_tile.to(acc_type), acc, input_precision=PRECISION, out_dtype=acc_type)
    tl.store(
        h + rows[:, None] * h_row + ranks[None, :],
        acc.to(h.dtype.element_ty),
        mask=(rows < stop)[:, None] & (ranks < rank)[None, :],
    )


@triton.jit
def _expand_kernel(
    h,  # (N, widest rank), contiguous
    up,  # (OUT, sum of ranks)
    y,  # (N, OUT), contiguous
    tiles,  # (tiles, 4) int64, as above
    scales,  # (tiles,) float64
    OUT,
    h_row,
    up_row,
    up_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    first, rank = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    acc_type = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    rows = start + tl.arange(0, BLOCK_ROWS)
    columns = (tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)).to(tl.int64)
    delta = tl.zeros([BLOCK_ROWS, BLOCK_OUT], acc_type)
    for r in range(0, rank, BLOCK_RANK):
        ranks = r + tl.arange(0, BLOCK_RANK)
        h_tile = tl.load(
            h + rows[:, None] * h_row + ranks[None, :],
            mask=(rows < stop)[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        up_tile = tl.load(
            up + columns[None, :] * up_row + (first + ranks)[:, None] * up_column,
            mask=(ranks < rank)[:, None] & (columns < OUT)[None, :],
            other=0.0,
        )
        delta = tl.dot(h_tile.to(acc_type), up_tile.to(acc_type), delta, input_precision=PRECISION, out_dtype=acc_type)
    place = y + rows[:, None] * OUT + columns[None, :]
    inside = (rows < stop)[:, None] & (columns < OUT)[None, :]
    total = tl.load(place, mask=inside, other=0.0).to(acc_type) + tl.load(scales + tile).to(acc_type) * delta
    tl.store(place, total.to(y.dtype.element_ty), mask=inside)


def shrink(x: Tensor, downs: list[Tensor], spans: list[tuple[int, int, int]], h: Tensor) -> None:
    """h[rows] = x[rows] @ down^T for every span (adapter, start, stop); downs (R, K), x (N, K), any strides."""
    if not spans:
        return
    ranks = tuple(down.shape[0] for down in downs)
    block_rows = _block_rows(spans)
    tiles, _ = _tiles(tuple(spans), ranks, (1.0,) * len(ranks), block_rows, x.device)
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    _shrink_kernel[(len(tiles), triton.cdiv(max(ranks), BLOCK_RANK))](
        x, down, h, tiles, x.shape[1], *x.stride(), *down.stride(), h.stride(0),
        BLOCK_ROWS=block_rows, BLOCK_K=128 // x.element_size(), BLOCK_RANK=BLOCK_RANK, PRECISION=_precision(x),
    )  # fmt: skip


def expand(h: Tensor, ups: list[Tensor], scales: list[float], spans: list[tuple[int, int, int]], y: Tensor) -> None:
    """y[rows] += scale * h[rows] @ up^T for every span (adapter, start, stop); ups (OUT, R), y contiguous."""
    if not spans:
        return
    ranks = tuple(up.shape[1] for up in ups)
    block_rows = _block_rows(spans)
    tiles, factors = _tiles(tuple(spans), ranks, tuple(scales), block_rows, y.device)
    up = ups[0] if len(ups) == 1 else torch.cat(ups, 1)
    _expand_kernel[(len(tiles), triton.cdiv(y.shape[1], BLOCK_OUT))](
        h, up, y, tiles, factors, y.shape[1], h.stride(0), *up.stride(),
        BLOCK_ROWS=block_rows, BLOCK_OUT=BLOCK_OUT, BLOCK_RANK=BLOCK_RANK, PRECISION=_precision(y),
    )  # fmt: skip


def _precision(x: Tensor) -> str:
    """TF32 has all the bits of a half-precision x and more of an adapter's than x's own type would keep."""
    return "tf32" if x.dtype in (torch.bfloat16, torch.float16) else "ieee"


def _block_rows(spans: list[tuple[int, int, int]]) -> int:
    """Rows of a tile: few while tokens are generated, but a tile product needs 16."""
    return 16 if max(stop - start for _, start, stop in spans) <= 16 else 64


@lru_cache(maxsize=1024)
def _tiles(spans: tuple[tuple[int, int, int], ...], ranks: tuple[int, ...], scales: tuple[float, ...],
           block_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The table of row tiles and their scales. Kept per layout, so that the copy to the device is made once."""
    firsts = [sum(ranks[:i]) for i in range(len(ranks))]
    rows, factors = [], []
    for i, start, stop in spans:
        for row in range(start, stop, block_rows):
            rows.append((row, min(row + block_rows, stop), firsts[i], ranks[i]))
            factors.append(scales[i])
    return torch.tensor(rows, device=device), torch.tensor(factors, dtype=torch.float64, device=device)
