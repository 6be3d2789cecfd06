"""Cross-entropy of a value distribution with a Gaussian histogram; rlhf_fast/ops/values/distributional_value_loss.py.

A program holds whole rows of bins. Sums are made in two stages over a number of partial sums that depends on the sizes
alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.linear_value_loss import PARTS, sum_parts
from torch import Tensor

BLOCK_ELEMENTS = 512  # logits that a program holds at a time


@triton.jit
def _distributional_value_loss_kernel(
    logits,  # (N, K), columns contiguous
    returns,  # (N,)
    mask,  # (N,) uint8 or None
    values,  # (N,)
    coefficients,  # (N, K): d (loss * denominator) / d logits
    partials,  # (3, programs): sums of loss, outside, count
    v_min: tl.float64,
    v_max: tl.float64,
    width: tl.float64,  # of a bin
    spread: tl.float64,  # sqrt(2) sigma
    N,
    K,
    logits_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc: tl.constexpr = values.dtype.element_ty
    low, high = tl.full([], v_min, acc), tl.full([], v_max, acc)
    width, spread = tl.full([], width, acc), tl.full([], spread, acc)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    bins = tl.arange(0, BLOCK_K)
    loss_sums = tl.zeros([BLOCK_ROWS], acc)
    outside_sums = tl.zeros([BLOCK_ROWS], acc)
    counts = tl.zeros([BLOCK_ROWS], acc)
    for block in range(program, tl.cdiv(N, BLOCK_ROWS), programs):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = rows < N
        counted = inside
        if mask is not None:
            counted = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
        used = counted[:, None] & (bins < K)[None, :]
        wanted = tl.load(returns + rows, mask=counted, other=0.0)
        shift = low - tl.where(wanted < low, low, tl.where(wanted > high, high, wanted))
        first, last = tl.erf(shift / spread), tl.erf((shift + (high - low)) / spread)
        below = tl.erf((shift[:, None] + bins[None, :].to(acc) * width) / spread)
        above = tl.erf((shift[:, None] + (bins[None, :] + 1).to(acc) * width) / spread)
        target = tl.where(used, (above - below) / (last - first)[:, None], 0.0)
        z = tl.load(
            logits + rows[:, None] * logits_row + bins[None, :],
            mask=used,
            other=-float("inf"),
        ).to(acc)
        z = tl.where(counted[:, None], z, 0.0)
        z -= tl.max(z, 1)[:, None]
        weights = tl.exp(z)
        total = tl.sum(weights, 1)
        cross = tl.sum(tl.where(target == 0, 0.0, target * z), 1)
        mean = tl.sum(weights * (bins[None, :].to(acc) + 0.5), 1) / total
        gradient = tl.where(used, weights / total[:, None] - target, 0.0)
        place = coefficients + rows[:, None] * K + bins[None, :]
        tl.store(place, gradient, mask=inside[:, None] & (bins < K)[None, :])
        tl.store(values + rows, tl.where(counted, low + width * mean, 0.0), mask=inside)
        loss_sums += tl.where(counted, tl.log(total) - cross, 0.0)
        outside_sums += tl.where(counted & ((wanted < low) | (wanted > high)), 1.0, 0.0)
        counts += tl.where(counted, 1.0, 0.0)
    tl.store(partials + program, tl.sum(loss_sums, 0))
    tl.store(partials + programs + program, tl.sum(outside_sums, 0))
    tl.store(partials + 2 * programs + program, tl.sum(counts, 0))


def distributional_value_loss(
    logits: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    denominator: Tensor | None,
    v_min: float,
    v_max: float,
    sigma: float,
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [loss (), outside fraction (), values (N,), coefficients (N, K), divisor ()]."""
    loss, outside, values, coefficients, divisor = outputs
    rows, bins = logits.shape
    block_k = triton.next_power_of_2(bins)
    block_rows = max(1, BLOCK_ELEMENTS // block_k)
    programs = max(1, min(PARTS, triton.cdiv(rows, block_rows)))
    partials = loss.new_empty(3, programs)
    launch(
        _distributional_value_loss_kernel, (programs,),
        logits, returns, mask, values, coefficients, partials, v_min, v_max, (v_max - v_min) / bins, 2**0.5 * sigma,
        rows, bins, logits.stride(0), BLOCK_ROWS=block_rows, BLOCK_K=block_k,
        num_warps=loss.element_size(),  # float64 takes twice the registers
    )  # fmt: skip
    sum_parts(partials, denominator, loss, outside, divisor)
