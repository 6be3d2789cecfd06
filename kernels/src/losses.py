"""Masked means of elementwise losses, with gradients and metrics, in one pass over the inputs.

A loss variant is one function of a single element (formulas in rlhf_fast/ops/<op>.py), which the one kernel takes as
a `tl.constexpr`. Sums are made in two stages over a number of partial sums that depends on the input's size alone, so
the same inputs give the same bits. Clamps are written with `where`, which keeps NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from rlhf_fast.kernels.scalar import exp_minus_1_minus, sigmoid, softplus
from torch import Tensor

BLOCK = 1024
PARTS = 128  # partial sums at most


@triton.jit
def ppo_clip(logprob, old_logprob, advantage, _3, _4, _5, clip_min, clip_max, dual_clip):
    log_ratio = logprob - old_logprob
    saturated = tl.abs(log_ratio) > 20.0
    ratio = tl.exp(tl.where(saturated, tl.where(log_ratio > 0, 20.0, -20.0), log_ratio))
    bounded = tl.where(ratio < clip_min, clip_min, tl.where(ratio > clip_max, clip_max, ratio))
    clipped = bounded * advantage < ratio * advantage
    dual = (advantage < 0) & (ratio > dual_clip)
    factor = tl.where(dual, dual_clip, tl.where(clipped, bounded, ratio))
    coefficient = tl.where(clipped | dual | saturated, 0.0, -ratio * advantage)
    stopped = tl.where(clipped | dual, 1.0, 0.0)
    return -factor * advantage, coefficient, 0.0, stopped, exp_minus_1_minus(log_ratio), ratio, ratio


@triton.jit
def value(value, target, _2, _3, _4, _5, _p0, _p1, _p2):
    error = value - target
    return 0.5 * error * error, error, 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def value_clip(value, target, old_value, _3, _4, _5, clip_eps, _p1, _p2):
    low = old_value - clip_eps
    high = old_value + clip_eps
    bounded = tl.where(value < low, low, tl.where(value > high, high, value))
    error = value - target
    bounded_error = bounded - target
    clipped = bounded_error * bounded_error > error * error
    active = tl.where(clipped, bounded_error, error)
    return 0.5 * active * active, tl.where(clipped, 0.0, error), 0.0, tl.where(clipped, 1.0, 0.0), 0.0, 0.0, 0.0


@triton.jit
def sigmoid_preference(chosen, rejected, ref_chosen, ref_rejected, _4, _5, beta, label_smoothing, _p2):
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    h = chosen_reward - rejected_reward
    loss = (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)
    slope = beta * (label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h))
    accuracy = tl.where(chosen_reward > rejected_reward, 1.0, 0.0)
    return loss, slope, -slope, accuracy, h, chosen_reward, rejected_reward


@triton.jit
def ipo(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, beta, _p1, _p2):
    chosen_length = tl.where(chosen_length < 1, 1.0, chosen_length)
    rejected_length = tl.where(rejected_length < 1, 1.0, rejected_length)
    chosen_ratio = (chosen - ref_chosen) / chosen_length
    rejected_ratio = (rejected - ref_rejected) / rejected_length
    error = (chosen_ratio - rejected_ratio) - 0.5 / beta
    chosen_reward = beta * chosen_ratio
    rejected_reward = beta * rejected_ratio
    accuracy = tl.where(chosen_reward > rejected_reward, 1.0, 0.0)
    return (
        error * error, 2 * error / chosen_length, -2 * error / rejected_length,
        accuracy, chosen_reward - rejected_reward, chosen_reward, rejected_reward,
    )  # fmt: skip


@triton.jit
def bradley_terry(chosen_reward, rejected_reward, margin, _3, _4, _5, _p0, _p1, _p2):
    difference = chosen_reward - rejected_reward
    h = difference - margin
    slope = sigmoid(-h)
    return softplus(-h), -slope, slope, tl.where(difference > 0, 1.0, 0.0), difference, 0.0, 0.0


class Variant(NamedTuple):
    """function: (6 inputs, 3 parameters) -> (loss, d loss / d input 0 and 1, 4 metrics), of one element each."""

    function: triton.JITFunction
    inputs: int
    last_is_max: bool = False  # the last metric is the maximum over the elements, not their mean


VARIANTS = {
    "ppo_clip": Variant(ppo_clip, 3, last_is_max=True),
    "value": Variant(value, 2),
    "value_clip": Variant(value_clip, 3),
    "sigmoid": Variant(sigmoid_preference, 4),
    "ipo": Variant(ipo, 6),
    "bradley_terry": Variant(bradley_terry, 3),
}


@triton.jit
def _load(x, row_stride, column_stride, row, column, counts, acc: tl.constexpr):
    return tl.load(x + row * row_stride + column * column_stride, mask=counts, other=0.0).to(acc)


@triton.jit
def _elements_kernel(
    x0, x1, x2, x3, x4, x5,  # (rows, columns) each, any strides; those from INPUTS on are never read
    r0, c0, r1, c1, r2, c2, r3, c3, r4, c4, r5, c5,  # their strides
    mask,  # (rows * columns,) uint8
    coefficient0,  # (rows * columns,)
    coefficient1,  # (rows * columns,)
    partials,  # (6, programs): sums of loss, four metrics, count
    p0: tl.float64,
    p1: tl.float64,
    p2: tl.float64,
    N,
    columns,
    FUNCTION: tl.constexpr,
    INPUTS: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    LAST_IS_MAX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = partials.dtype.element_ty
    p0 = tl.full([], p0, acc)
    p1 = tl.full([], p1, acc)
    p2 = tl.full([], p2, acc)
    program, programs = tl.program_id(0), tl.num_programs(0)
    loss_sum = tl.zeros([BLOCK], acc)
    count = tl.zeros([BLOCK], acc)
    sum0 = tl.zeros([BLOCK], acc)
    sum1 = tl.zeros([BLOCK], acc)
    sum2 = tl.zeros([BLOCK], acc)
    sum3 = tl.zeros([BLOCK], acc)
    for block in range(program, tl.cdiv(N, BLOCK), programs):
        i = tl.full([], block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < N
        counts = inside
        if HAS_MASK:
            counts = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
        row, column = i // columns, i % columns
        a0 = _load(x0, r0, c0, row, column, counts, acc)
        a1 = _load(x1, r1, c1, row, column, counts, acc)
        a2, a3, a4, a5 = a0, a0, a0, a0
        if INPUTS > 2:
            a2 = _load(x2, r2, c2, row, column, counts, acc)
        if INPUTS > 3:
            a3 = _load(x3, r3, c3, row, column, counts, acc)
        if INPUTS > 4:
            a4 = _load(x4, r4, c4, row, column, counts, acc)
            a5 = _load(x5, r5, c5, row, column, counts, acc)
        loss, g0, g1, m0, m1, m2, m3 = FUNCTION(a0, a1, a2, a3, a4, a5, p0, p1, p2)
        tl.store(coefficient0 + i, tl.where(counts, g0, 0.0), mask=inside)
        if COEFFICIENTS > 1:
            tl.store(coefficient1 + i, tl.where(counts, g1, 0.0), mask=inside)
        loss_sum += tl.where(counts, loss, 0.0)
        count += tl.where(counts, 1.0, 0.0)
        sum0 += tl.where(counts, m0, 0.0)
        sum1 += tl.where(counts, m1, 0.0)
        sum2 += tl.where(counts, m2, 0.0)
        last = tl.where(counts, m3, 0.0)
        if LAST_IS_MAX:
            sum3 = tl.where((last > sum3) | (last != last), last, sum3)
        else:
            sum3 += last
    tl.store(partials + program, tl.sum(loss_sum, 0))
    tl.store(partials + programs + program, tl.sum(sum0, 0))
    tl.store(partials + 2 * programs + program, tl.sum(sum1, 0))
    tl.store(partials + 3 * programs + program, tl.sum(sum2, 0))
    if LAST_IS_MAX:
        tl.store(partials + 4 * programs + program, tl.max(sum3, 0))
    else:
        tl.store(partials + 4 * programs + program, tl.sum(sum3, 0))
    tl.store(partials + 5 * programs + program, tl.sum(count, 0))


@triton.jit
def _total(partials, k, programs, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(partials + k * programs + part, mask=part < programs, other=0.0), 0)


@triton.jit
def _divide(x, y):
    # `/` on float32 is approximate, and the mean of ones must be 1.
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _means_kernel(
    partials,  # (6, programs)
    denominator,  # () or None
    loss,  # ()
    means,  # (5,): four metrics, then the denominator
    programs,
    LAST_IS_MAX: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    PARTS: tl.constexpr,
):
    count = _total(partials, 5, programs, PARTS)
    if HAS_DENOMINATOR:
        count = tl.load(denominator)
    count = tl.where(count == 0, 1.0, count)  # nothing counts: every sum is 0
    tl.store(loss, _divide(_total(partials, 0, programs, PARTS), count))
    for k in tl.static_range(3):
        tl.store(means + k, _divide(_total(partials, k + 1, programs, PARTS), count))
    if LAST_IS_MAX:
        part = tl.arange(0, PARTS)
        last = tl.max(tl.load(partials + 4 * programs + part, mask=part < programs, other=0.0), 0)
    else:
        last = _divide(_total(partials, 4, programs, PARTS), count)
    tl.store(means + 3, last)
    tl.store(means + 4, count)


def masked_loss(
    variant: str,
    inputs: list[Tensor],
    mask: Tensor | None,
    denominator: Tensor | None,
    parameters: list[float],
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [loss (), means (5,), a gradient coefficient (rows, columns) per differentiable input]."""
    function, count, last_is_max = VARIANTS[variant]
    loss, means, *coefficients = outputs
    n, columns = coefficients[0].numel(), coefficients[0].shape[1]
    programs = max(1, min(PARTS, triton.cdiv(n, BLOCK)))
    partials = means.new_empty(6, programs)
    slots = inputs[:count] + [inputs[0]] * (6 - count)
    strides = [s for x in slots for s in x.stride()]
    _elements_kernel[(programs,)](
        *slots, *strides, mask, coefficients[0], coefficients[-1], partials, *parameters, n, columns,
        FUNCTION=function, INPUTS=count, COEFFICIENTS=len(coefficients), LAST_IS_MAX=last_is_max,
        HAS_MASK=mask is not None, BLOCK=BLOCK,
    )  # fmt: skip
    _means_kernel[(1,)](
        partials, denominator, loss, means, programs, LAST_IS_MAX=last_is_max,
        HAS_DENOMINATOR=denominator is not None, PARTS=PARTS,
    )  # fmt: skip
