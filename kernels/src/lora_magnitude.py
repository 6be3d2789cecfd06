"""The two kernels that a DoRA magnitude adds to lora_linear; see rlhf_fast/ops/lora/lora_linear.py."""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.lora_layout import BLOCK_COLUMNS, Spans, accumulate, bank, layout, precision, ranks_of
from torch import Tensor


@triton.jit
def _norms_kernel(
    weight,  # (OUT, K)
    down,  # (sum of ranks, K)
    up,  # (OUT, sum of ranks)
    norms,  # (adapters, OUT)
    adapters,  # (adapters, 4) int64, as above
    scales,  # (adapters,) float64
    OUT,
    K,
    weight_row,
    weight_column,
    down_row,
    down_column,
    up_row,
    up_column,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    adapter = tl.program_id(1).to(tl.int64)
    first, rank = tl.load(adapters + adapter * 4), tl.load(adapters + adapter * 4 + 1)
    outs = (tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    acc: tl.constexpr = norms.dtype.element_ty
    scale = tl.load(scales + adapter).to(acc)
    squares = tl.zeros([BLOCK_COLUMNS], acc)
    for k in range(0, K, BLOCK_K):
        columns = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        delta = tl.zeros([BLOCK_COLUMNS, BLOCK_K], acc)
        for r in range(0, rank, BLOCK_RANK):
            ranks = r + tl.arange(0, BLOCK_RANK)
            up_tile = tl.load(
                up + outs[:, None] * up_row + (first + ranks)[None, :] * up_column,
                mask=(outs < OUT)[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            down_tile = tl.load(
                down + (first + ranks)[:, None] * down_row + columns[None, :] * down_column,
                mask=(ranks < rank)[:, None] & (columns < K)[None, :],
                other=0.0,
            )
            delta = accumulate(up_tile, down_tile, delta, PRECISION)
        base = tl.load(
            weight + outs[:, None] * weight_row + columns[None, :] * weight_column,
            mask=(outs < OUT)[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        total = base.to(acc) + scale * delta
        squares += tl.sum(total * total, 1)
    tl.store(norms + adapter * OUT + outs, tl.sqrt(squares), mask=outs < OUT)


@triton.jit
def _magnitude_kernel(
    grad,  # (N, OUT), contiguous: multiplied in place by the factors of its row's adapter
    unscaled,  # (N, OUT), contiguous
    factors,  # (adapters, OUT)
    partials,  # (splits, adapters, OUT): sums of grad * unscaled over the adapter's rows
    tiles,  # (tiles, 3) int64, and
    adapters,  # (adapters, 4) int64, as above
    OUT,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    adapter, split, splits = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    columns = (tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    acc: tl.constexpr = partials.dtype.element_ty
    factor = tl.load(factors + adapter * OUT + columns, mask=columns < OUT, other=0.0).to(acc)
    sums = tl.zeros([BLOCK_COLUMNS], acc)
    for tile in range(tl.load(adapters + adapter * 4 + 2) + split, tl.load(adapters + adapter * 4 + 3), splits):
        rows = tl.load(tiles + tile * 3) + tl.arange(0, BLOCK_ROWS)
        inside = (rows < tl.load(tiles + tile * 3 + 1))[:, None] & (columns < OUT)[None, :]
        place = rows[:, None] * OUT + columns[None, :]
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(acc)
        if unscaled is not None:
            sums += tl.sum(upstream * tl.load(unscaled + place, mask=inside, other=0.0).to(acc), 0)
        tl.store(grad + place, (upstream * factor[None, :]).to(grad.dtype.element_ty), mask=inside)
    tl.store(partials + (split * tl.num_programs(1) + adapter) * OUT + columns, sums, mask=columns < OUT)


def norms(weight: Tensor, downs: list[Tensor], ups: list[Tensor], scales: list[float], out: Tensor) -> None:
    """out[i] = row norms of weight + scale * up @ down, for every adapter i."""
    table = layout((), ranks_of(downs), tuple(scales), weight.device)
    down, up = bank(downs, 0), bank(ups, 1)
    launch(
        _norms_kernel, (triton.cdiv(weight.shape[0], BLOCK_COLUMNS), len(downs)),
        weight, down, up, out, table.adapters, table.scales, *weight.shape, *weight.stride(), *down.stride(),
        *up.stride(), BLOCK_COLUMNS=BLOCK_COLUMNS, BLOCK_K=32, BLOCK_RANK=16, PRECISION=precision(weight), num_warps=8,
    )  # fmt: skip


def magnitude_backward(
    grad: Tensor, unscaled: Tensor | None, factors: Tensor, ranks: list[int], spans: Spans
) -> Tensor:
    """grad *= factors of its adapter, in place; returns the sums of grad * unscaled before that, (adapters, OUT)."""
    table = layout(tuple(spans), tuple(ranks), (1.0,) * len(ranks), grad.device)
    partials = factors.new_empty(table.splits, *factors.shape)
    launch(
        _magnitude_kernel, (triton.cdiv(grad.shape[1], BLOCK_COLUMNS), len(ranks), table.splits),
        grad, unscaled, factors, partials, table.tiles, table.adapters, grad.shape[1],
        BLOCK_ROWS=table.block_rows, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=8,
    )  # fmt: skip
    return partials.sum(0)
