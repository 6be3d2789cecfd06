"""The low-rank half of a linear layer whose row segments use different adapters; see rlhf_fast/ops/lora/lora_linear.py.

One launch each for all adapters, whatever their ranks: a program works on one tile of rows, or on one slice of one
adapter's gradient; lora_layout.py has the tables that say which. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.lora_layout import BLOCK_COLUMNS, Spans, accumulate, bank, layout, precision, ranks_of
from rlhf_fast.kernels.lora_magnitude import magnitude_backward, norms
from torch import Tensor

__all__ = ["expand", "gradients", "magnitude_backward", "norms", "shrink"]

Dropout = tuple[int, Tensor] | None  # (threshold, seed); see _kept


@triton.jit
def _kept(seed, threshold, rows, column, BLOCK: tl.constexpr):
    """(rows, BLOCK): whether dropout keeps the elements from `column` on, a multiple of 4.

    One Philox counter (column // 4, row) serves four columns.
    """
    group = (column // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([rows.shape[0], BLOCK // 4], tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), zero + group, zero + rows.to(tl.uint32)[:, None], zero, zero)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (bits >> 8).to(tl.int32) >= threshold


@triton.jit
def _tile(tiles, adapters, tile):
    """first row, end row, adapter, first rank and number of ranks of a row tile."""
    adapter = tl.load(tiles + tile * 3 + 2)
    first, rank = tl.load(adapters + adapter * 4), tl.load(adapters + adapter * 4 + 1)
    return tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), adapter, first, rank


@triton.jit
def _shrink_kernel(
    x,  # (N, K)
    down,  # (sum of ranks, K)
    h,  # (N, widest rank), contiguous
    tiles,  # (tiles, 3) int64: first row, end row, adapter
    adapters,  # (adapters, 4) int64: first rank, number of ranks, first tile, end tile
    seed,  # () int64, or None without dropout
    threshold,
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
    start, stop, _, first, rank = _tile(tiles, adapters, tl.program_id(0))
    first_rank = tl.program_id(1) * BLOCK_RANK
    if first_rank >= rank:
        return
    rows = start + tl.arange(0, BLOCK_ROWS)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32)
    for k in range(0, K, BLOCK_K):
        columns = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        x_tile = tl.load(
            x + rows[:, None] * x_row + columns[None, :] * x_column,
            mask=(rows < stop)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        if seed is not None:
            x_tile = tl.where(_kept(seed, threshold, rows, k, BLOCK_K), x_tile, 0.0)
        down_tile = tl.load(
            down + (first + ranks)[None, :] * down_row + columns[:, None] * down_column,
            mask=(ranks < rank)[None, :] & (columns < K)[:, None],
            other=0.0,
        )
        acc = accumulate(x_tile, down_tile, acc, PRECISION)
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
    tiles,  # (tiles, 3) int64, and
    adapters,  # (adapters, 4) int64, as above
    scales,  # (adapters,) float64
    seed,  # () int64, or None without dropout of what is added
    threshold,
    factors,  # (adapters, OUT) float: magnitude / norm, or None
    bias,  # (OUT,) or None: the part of y that factors leave alone
    unscaled,  # (N, OUT), contiguous: y without factors and bias, or None where nobody wants it
    OUT,
    h_row,
    up_row,
    up_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start, stop, adapter, first, rank = _tile(tiles, adapters, tl.program_id(0))
    rows = start + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS
    columns = (column + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    acc: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    delta = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], acc)
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
        delta = accumulate(h_tile, up_tile, delta, PRECISION)
    if seed is not None:
        delta = tl.where(_kept(seed, threshold, rows, column, BLOCK_COLUMNS), delta, 0.0)
    place = rows[:, None] * OUT + columns[None, :]
    inside = (rows < stop)[:, None] & (columns < OUT)[None, :]
    total = tl.load(y + place, mask=inside, other=0.0).to(acc)
    shift = tl.zeros([BLOCK_COLUMNS], acc)
    if bias is not None:
        shift = tl.load(bias + columns, mask=columns < OUT, other=0.0).to(acc)
    total = (total - shift[None, :]) + tl.load(scales + adapter).to(acc) * delta
    if unscaled is not None:
        tl.store(unscaled + place, total.to(unscaled.dtype.element_ty), mask=inside)
    if factors is not None:
        factor = tl.load(factors + adapter * OUT + columns, mask=columns < OUT, other=0.0).to(acc)
        total = total * factor[None, :] + shift[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    narrow,  # (N, widest rank), contiguous
    wide,  # (N, WIDTH)
    partials,  # (splits, sum of ranks * WIDTH): the adapters' gradients one after the other
    tiles,  # (tiles, 3) int64, and
    adapters,  # (adapters, 4) int64, as above
    scales,  # (adapters,) float64
    seed,  # () int64, or None without dropout of `wide`
    threshold,
    WIDTH,
    size,
    narrow_row,
    wide_row,
    wide_column,
    splits,
    RANK_FIRST: tl.constexpr,  # each gradient is (R, WIDTH), else (WIDTH, R)
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column, adapter = tl.program_id(0) * BLOCK_COLUMNS, tl.program_id(1).to(tl.int64)
    split, first_rank = tl.program_id(2) % splits, tl.program_id(2) // splits * BLOCK_RANK
    first, rank = tl.load(adapters + adapter * 4), tl.load(adapters + adapter * 4 + 1)
    if first_rank >= rank:
        return
    columns = (column + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    ranks = (first_rank + tl.arange(0, BLOCK_RANK)).to(tl.int64)
    acc = tl.zeros([BLOCK_RANK, BLOCK_COLUMNS], partials.dtype.element_ty)
    for tile in range(tl.load(adapters + adapter * 4 + 2) + split, tl.load(adapters + adapter * 4 + 3), splits):
        rows = tl.load(tiles + tile * 3) + tl.arange(0, BLOCK_ROWS)
        inside = rows < tl.load(tiles + tile * 3 + 1)
        narrow_tile = tl.load(
            narrow + rows[None, :] * narrow_row + ranks[:, None],
            mask=inside[None, :] & (ranks < rank)[:, None],
            other=0.0,
        )
        wide_tile = tl.load(
            wide + rows[:, None] * wide_row + columns[None, :] * wide_column,
            mask=inside[:, None] & (columns < WIDTH)[None, :],
            other=0.0,
        )
        if seed is not None:
            wide_tile = tl.where(_kept(seed, threshold, rows, column, BLOCK_COLUMNS), wide_tile, 0.0)
        acc = accumulate(narrow_tile, wide_tile, acc, PRECISION)
    place = ranks[:, None] * WIDTH + columns[None, :] if RANK_FIRST else columns[None, :] * rank + ranks[:, None]
    tl.store(
        partials + split.to(tl.int64) * size + first * WIDTH + place,
        tl.load(scales + adapter).to(acc.dtype) * acc,
        mask=(ranks < rank)[:, None] & (columns < WIDTH)[None, :],
    )


# --- The launches -----------------------------------------------------------------------------------------------------


def shrink(x: Tensor, downs: list[Tensor], spans: Spans, dropout: Dropout, h: Tensor) -> None:
    """h[rows] = x[rows] @ down^T for every span; downs (R, K), x (N, K), any strides."""
    if not spans:
        return
    table = layout(tuple(spans), ranks_of(downs), (1.0,) * len(downs), x.device)
    down = bank(downs, 0)
    threshold, seed = dropout or (0, None)
    block_k = max(16, (256 if table.block_rows == 16 else 64) // x.element_size())  # a tile product needs 16
    launch(
        _shrink_kernel, (len(table.tiles), table.rank_blocks),
        x, down, h, table.tiles, table.adapters, seed, threshold, x.shape[1], *x.stride(), *down.stride(),
        h.stride(0), BLOCK_ROWS=table.block_rows, BLOCK_K=block_k, BLOCK_RANK=table.block_rank,
        PRECISION=precision(x), num_warps=table.warps,
    )  # fmt: skip


def expand(h: Tensor, ups: list[Tensor], scales: list[float], spans: Spans, dropout: Dropout, y: Tensor,
           factors: Tensor | None = None, bias: Tensor | None = None,
           unscaled: Tensor | None = None) -> None:  # fmt: skip
    """y[rows] += scale * h[rows] @ up^T for every span, ups (OUT, R) of any strides, y contiguous; then, with factors
    (adapters, OUT), u = y - bias goes to `unscaled` where that is given and y = u * factors + bias."""
    if not spans:
        return
    table = layout(tuple(spans), tuple(up.shape[1] for up in ups), tuple(scales), y.device)
    up = bank(ups, 1)
    threshold, seed = dropout or (0, None)
    launch(
        _expand_kernel, (len(table.tiles), triton.cdiv(y.shape[1], BLOCK_COLUMNS)),
        h, up, y, table.tiles, table.adapters, table.scales, seed, threshold, factors,
        None if factors is None else bias, unscaled, y.shape[1], h.stride(0), *up.stride(),
        BLOCK_ROWS=table.block_rows, BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_RANK=16, PRECISION=precision(y),
        num_warps=table.block_rows // 8,
    )  # fmt: skip


def gradients(narrow: Tensor, wide: Tensor, ranks: list[int], scales: list[float], spans: Spans, dropout: Dropout,
              rank_first: bool, out: Tensor) -> None:  # fmt: skip
    """out = scale * narrow^T wide over the adapter's rows, (R, width) or transposed, one adapter after the other."""
    table = layout(tuple(spans), tuple(ranks), tuple(scales), wide.device, 32)
    threshold, seed = dropout or (0, None)
    width, splits = wide.shape[1], table.splits
    partials = out if splits == 1 else out.new_empty(splits, out.numel())
    launch(
        _gradient_kernel, (triton.cdiv(width, BLOCK_COLUMNS), len(ranks), splits * table.rank_blocks),
        narrow, wide, partials, table.tiles, table.adapters, table.scales, seed, threshold, width, out.numel(),
        narrow.stride(0), *wide.stride(), splits, RANK_FIRST=rank_first, BLOCK_ROWS=table.block_rows,
        BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_RANK=table.block_rank, PRECISION=precision(wide), num_warps=table.warps,
    )  # fmt: skip
    if splits > 1:
        torch.sum(partials, 0, out=out)
