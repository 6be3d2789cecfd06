"""Whitening with statistics in one pass; formula in rlhf_fast/ops/advantages/whiten.py.

Two launches: the moments of a fixed number of equal spans, then the whitening, in which every program combines all of
those moments in the same order. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from torch import Tensor

MOMENTS_BLOCK = 4096
BLOCK = 2048
PARTS = 512  # moments that are combined at a time


@triton.jit
def _merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    # Chan, Golub & LeVeque 1983, eq. 2.1; an empty side changes nothing.
    count = count_a + count_b
    share = tl.where(count > 0, count_b / tl.where(count > 0, count, 1.0), 0.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def _moments_kernel(
    x,  # (count,)
    mask,  # (count,) uint8, or None
    moments,  # (parts, 3) float64
    count,
    span,
    HAS_MASK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    n = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for start in range(0, span, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        at = part * span + lanes
        counts = (lanes < span) & (at < count)
        if HAS_MASK:
            counts = counts & (tl.load(mask + at, mask=counts, other=0) != 0)
        values = tl.load(x + at, mask=counts, other=0.0).to(ACC)
        # Distances from one of the block's numbers: equal ones have exactly that mean and no deviation.
        block_n = tl.sum(counts.to(ACC), 0)
        origin = tl.max(tl.where(counts, values, -float("inf")), 0)
        origin = tl.where(block_n > 0, origin, 0.0)
        distance = tl.where(counts, values - origin, 0.0)
        block_mean = tl.sum(distance, 0) / tl.maximum(block_n, 1.0)
        distance = tl.where(counts, distance - block_mean, 0.0)
        n, mean, m2 = _merge(
            n, mean, m2, block_n.to(tl.float64), origin.to(tl.float64) + block_mean.to(tl.float64),
            tl.sum(distance * distance, 0).to(tl.float64),
        )  # fmt: skip
    tl.store(moments + part * 3, n)
    tl.store(moments + part * 3 + 1, mean)
    tl.store(moments + part * 3 + 2, m2)


@triton.jit
def _whiten_kernel(
    x,  # (count,)
    mask,  # (count,) uint8, or None
    moments,  # (parts, 3) float64
    out,  # (count,)
    count,
    parts,
    eps: tl.float64,
    HAS_MASK: tl.constexpr,
    SHIFT_MEAN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc = out.dtype.element_ty
    n = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < parts
        part_n = tl.load(moments + part * 3, mask=inside, other=0.0)
        part_mean = tl.load(moments + part * 3 + 1, mask=inside, other=0.0)
        part_m2 = tl.load(moments + part * 3 + 2, mask=inside, other=0.0)
        # As _merge of all of them at once. Distances from one of the means, as above.
        tile_n = tl.sum(part_n, 0)
        origin = tl.max(tl.where(part_n > 0, part_mean, -float("inf")), 0)
        origin = tl.where(tile_n > 0, origin, 0.0)
        tile_mean = origin + tl.sum(part_n * (part_mean - origin), 0) / tl.maximum(tile_n, 1.0)
        distance = part_mean - tile_mean
        tile_m2 = tl.sum(part_m2 + part_n * distance * distance, 0)
        n, mean, m2 = _merge(n, mean, m2, tile_n, tile_mean, tile_m2)
    scale = (1.0 / tl.sqrt(m2 / tl.maximum(n - 1.0, 1.0) + eps)).to(acc)
    rounded = mean.to(acc)  # and what is left of the mean: one of 1e6 is rounded by more than a small deviation
    rest = (mean - rounded.to(tl.float64)).to(acc)

    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    counts = inside
    if HAS_MASK:
        counts = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    value = (tl.load(x + at, mask=counts, other=0.0).to(acc) - rounded - rest) * scale
    if not SHIFT_MEAN:
        value += rounded
    tl.store(out + at, tl.where(counts, value, 0.0), mask=inside)


def whiten_moments(x: Tensor, mask: Tensor | None, moments: Tensor) -> None:
    """Fills moments (parts, 3) with count, mean and sum of squared deviations of equal spans of x (count,)."""
    count, parts = x.numel(), moments.shape[0]
    span = triton.cdiv(count, parts)
    launch(
        _moments_kernel, (parts,),
        x, mask, moments, count, span, HAS_MASK=mask is not None,
        ACC=tl.float64 if x.element_size() == 8 else tl.float32, BLOCK=MOMENTS_BLOCK, num_warps=8,
    )  # fmt: skip


def whiten(x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float, out: Tensor) -> None:
    """Fills out (count,) with x whitened by all that moments (parts, 3) describe together."""
    count, parts = x.numel(), moments.shape[0]
    if count == 0:
        return
    launch(
        _whiten_kernel, (triton.cdiv(count, BLOCK),),
        x, mask, moments, out, count, parts, eps, HAS_MASK=mask is not None, SHIFT_MEAN=shift_mean,
        PARTS=min(PARTS, triton.next_power_of_2(parts)), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
