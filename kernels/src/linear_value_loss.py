"""The critic's loss straight from hidden states; see rlhf_fast/ops/values/linear_value_loss.py.

A program keeps whole rows of `hidden` in registers for their two uses: the product with the head, and the sum that is
the head's gradient. Sums are made in two stages over a number of partial sums that depends on the sizes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.losses import value, value_clip
from rlhf_fast.kernels.scalar import divide
from torch import Tensor

PARTS = 256  # partial sums at most
BLOCK_ELEMENTS = 16384  # of hidden that a program holds at a time


@triton.jit
def _linear_value_loss_kernel(
    hidden,  # (N, D), columns contiguous
    weight,  # (D,)
    bias,  # () or None
    old_values,  # (N,) or None without clipping
    returns,  # (N,)
    mask,  # (N,) uint8 or None
    values,  # (N,)
    coefficients,  # (N,): d (loss * denominator) / d value
    partials,  # (4, programs): sums of loss, clipped, count, coefficient
    weight_partials,  # (programs, D): sums of coefficient * hidden, or None
    clip_eps: tl.float64,
    N,
    D,
    hidden_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    acc: tl.constexpr = values.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)
    head = tl.load(weight + columns, mask=columns < D, other=0.0)
    shift = tl.zeros([], acc) if bias is None else tl.load(bias)
    weight_sums = tl.zeros([BLOCK_D], acc)
    loss_sums = tl.zeros([BLOCK_ROWS], acc)
    clipped_sums = tl.zeros([BLOCK_ROWS], acc)
    counts = tl.zeros([BLOCK_ROWS], acc)
    coefficient_sums = tl.zeros([BLOCK_ROWS], acc)
    for block in range(program, tl.cdiv(N, BLOCK_ROWS), programs):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = rows < N
        counted = inside
        if mask is not None:
            counted = inside & (tl.load(mask + rows, mask=inside, other=0) != 0)
        tile = tl.load(
            hidden + rows[:, None] * hidden_row + columns[None, :],
            mask=counted[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(acc)
        found = tl.sum(tile * head[None, :], 1) + shift
        target = tl.load(returns + rows, mask=counted, other=0.0)
        if old_values is None:
            loss, coefficient, _, _, _, _, _ = value((found, target), (0.0,))
            clipped = tl.zeros([BLOCK_ROWS], acc)
        else:
            old = tl.load(old_values + rows, mask=counted, other=0.0)
            loss, coefficient, _, clipped, _, _, _ = value_clip((found, target, old), (tl.full([], clip_eps, acc),))
        coefficient = tl.where(counted, coefficient, 0.0)
        tl.store(values + rows, tl.where(counted, found, 0.0), mask=inside)
        tl.store(coefficients + rows, coefficient, mask=inside)
        if weight_partials is not None:
            weight_sums += tl.sum(coefficient[:, None] * tile, 0)
        loss_sums += tl.where(counted, loss, 0.0)
        clipped_sums += tl.where(counted, clipped, 0.0)
        counts += tl.where(counted, 1.0, 0.0)
        coefficient_sums += coefficient
    tl.store(partials + program, tl.sum(loss_sums, 0))
    tl.store(partials + programs + program, tl.sum(clipped_sums, 0))
    tl.store(partials + 2 * programs + program, tl.sum(counts, 0))
    tl.store(partials + 3 * programs + program, tl.sum(coefficient_sums, 0))
    if weight_partials is not None:
        tl.store(weight_partials + program * D + columns, weight_sums, mask=columns < D)


@triton.jit
def _sum_parts_kernel(
    partials,  # (3 or 4, programs): sums of loss, metric, count, and what goes to `extra`
    weight_partials,  # (programs, D) or None
    denominator,  # () or None
    loss,  # ()
    metric,  # ()
    divisor,  # (): the denominator
    extra,  # () or None
    weight_sums,  # (D,) or None
    programs,
    D,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts = tl.arange(0, PARTS)
    there = parts < programs
    if tl.program_id(0) == 0:
        count = tl.sum(tl.load(partials + 2 * programs + parts, mask=there, other=0.0), 0)
        if denominator is not None:
            count = tl.load(denominator)
        count = tl.where(count == 0, 1.0, count)  # nothing counts: every sum is 0
        tl.store(loss, divide(tl.sum(tl.load(partials + parts, mask=there, other=0.0), 0), count))
        tl.store(metric, divide(tl.sum(tl.load(partials + programs + parts, mask=there, other=0.0), 0), count))
        tl.store(divisor, count)
        if extra is not None:
            tl.store(extra, tl.sum(tl.load(partials + 3 * programs + parts, mask=there, other=0.0), 0))
    if weight_sums is not None:
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        place = weight_partials + parts[:, None].to(tl.int64) * D + columns[None, :]
        inside = there[:, None] & (columns < D)[None, :]
        tl.store(weight_sums + columns, tl.sum(tl.load(place, mask=inside, other=0.0), 0), mask=columns < D)


def sum_parts(partials: Tensor, denominator: Tensor | None, loss: Tensor, metric: Tensor, divisor: Tensor,
              extra: Tensor | None = None, weight_partials: Tensor | None = None,
              weight_sums: Tensor | None = None) -> None:  # fmt: skip
    """Fills loss, metric, divisor () and, where they are given, extra () and weight_sums (D,) from the partial sums."""
    width, block = (0 if weight_sums is None else weight_sums.shape[0]), 32
    launch(
        _sum_parts_kernel, (max(1, triton.cdiv(width, block)),),
        partials, weight_partials, denominator, loss, metric, divisor, extra, weight_sums, partials.shape[1], width,
        PARTS=PARTS, BLOCK=block,
    )  # fmt: skip


def linear_value_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None,
    denominator: Tensor | None,
    clip_eps: float,
    outputs: list[Tensor],
) -> None:
    """Fills outputs.

    outputs: [loss (), clip fraction (), values (N,), coefficients (N,), weight sums (D,) or (0,), bias sum (),
    divisor ()].
    """
    loss, clip_fraction, values, coefficients, weight_sums, bias_sum, divisor = outputs
    rows, width = hidden.shape
    block_d = triton.next_power_of_2(width)
    block_rows = max(1, min(16, BLOCK_ELEMENTS // block_d))
    programs = max(1, min(PARTS, triton.cdiv(rows, block_rows)))
    partials = loss.new_empty(4, programs)
    wanted = weight_sums.numel() > 0
    weight_partials = loss.new_empty(programs, width) if wanted else None
    launch(
        _linear_value_loss_kernel, (programs,),
        hidden, weight, bias, old_values, returns, mask, values, coefficients, partials, weight_partials, clip_eps,
        rows, width, hidden.stride(0), BLOCK_ROWS=block_rows, BLOCK_D=block_d, num_warps=8,
    )  # fmt: skip
    sum_parts(
        partials, denominator, loss, clip_fraction, divisor, bias_sum, weight_partials, weight_sums if wanted else None
    )
