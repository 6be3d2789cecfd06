"""Policy losses: loss, metrics and gradient coefficients in one pass; rlhf_fast/ops/policy/policy_loss.py.

A loss is three functions of a token or a sequence (`Function`), which the one kernel takes as `tl.constexpr`. Losses
and corrections made from sequences have a first kernel, one program per sequence, that leaves what its tokens share.
Sums are made in two stages over a number of partial sums that depends on the input's size alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import divide, exp_minus_1_minus, expm1, product, sum_parts
from torch import Tensor

BLOCK = 512
PARTS = 128  # partial sums at most
SHARED = 9  # what the tokens of a sequence have in common: rows of _sequences_kernel's output
SUMS = 13  # loss, ten means, the largest and the smallest ratio: rows of the partial sums


@triton.jit
def bounded_exp(x):
    return tl.exp(tl.where(x > 20.0, 20.0, tl.where(x < -20.0, -20.0, x)))


@triton.jit
def clipped_surrogate(ratio, advantage, ratio_min, ratio_max, dual_clip):
    bounded = tl.where(ratio < ratio_min, ratio_min, tl.where(ratio > ratio_max, ratio_max, ratio))
    low = (advantage < 0) & (ratio < ratio_min)
    dual = (advantage < 0) & (ratio > dual_clip)
    high = ((advantage > 0) & (ratio > ratio_max)) | dual
    factor = tl.where(dual, dual_clip, tl.where(low | high, bounded, ratio))
    return -factor * advantage, tl.where(low | high, 0.0, -ratio * advantage), low, high


# --- Of a token -------------------------------------------------------------------------------------------------------
# (token, shared by its sequence, five numbers) -> loss, d loss / d logprob, held low, held high


@triton.jit
def ppo_clip(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    loss, slope, low, high = clipped_surrogate(r, a, p0, p1, p2)
    return loss, tl.where(saturated, 0.0, slope), low, high


@triton.jit
def clip_cov(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    loss, slope, low, high = clipped_surrogate(r, a, p0, p1, p2)
    low = low & (selected == 0)
    return tl.where(selected, 0.0, loss), tl.where(selected | saturated, 0.0, slope), low, high | selected


@triton.jit
def kl_cov(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    weight = tl.where(selected, p0, 0.0)
    sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
    return product(weight, tl.abs(x)) - r * a, weight * sign - tl.where(saturated, 0.0, r * a), x != x, selected


@triton.jit
def policy_gradient(
    lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4
):  # fmt: skip
    never = selected & (selected == 0)
    return product(-a, lp), -a, never, never


@triton.jit
def cispo(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    low = r < p0
    high = r > p1
    slope = -tl.where(low, p0, tl.where(high, p1, r)) * a
    return product(slope, lp), slope, low, high


@triton.jit
def sapo(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    tau = tl.where(a > 0, p0, p1)
    z = tau * (r - 1)
    e = tl.exp(-tl.abs(z))
    gate = tl.where(z < 0, e, 1.0) / (1 + e)
    slope = e / ((1 + e) * (1 + e))
    never = selected & (selected == 0)
    return -4 / tau * gate * a, tl.where(saturated, 0.0, -4 * slope * r * a), never, never


@triton.jit
def within(divergence, a, x, r, limit, cap):
    low = (divergence > limit) & (a < 0) & (x < 0)
    high = (divergence > limit) & (a > 0) & (x > 0)
    loss = tl.where(low | high, 0.0, -tl.where(r > cap, cap, r) * a)
    return loss, tl.where(x < -20.0, 0.0, loss), low, high


@triton.jit
def dppo_tv(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    return within(tl.abs(tl.exp(lp) - tl.exp(old)), a, x, r, p0, p1)


@triton.jit
def dppo_kl(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    old_rest = -expm1(old)
    has_rest = old_rest > 0
    old_rest, rest = tl.where(has_rest, old_rest, 1.0), tl.where(has_rest, -expm1(lp), 1.0)
    others = tl.where(has_rest, old_rest * (tl.log(old_rest) - tl.log(rest)), 0.0)
    return within(product(tl.exp(old), old - lp) + others, a, x, r, p0, p1)


@triton.jit
def gspo(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    return s_loss, s_slope, s_low > 0, s_high > 0


@triton.jit
def gspo_token(
    lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4
):  # fmt: skip
    return clipped_surrogate(s_pos, a, p0, p1, p2)


@triton.jit
def gmpo(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    low = (a < 0) & (x < p0)
    high = (a > 0) & (x > p1)
    return s_loss, tl.where(low | high, 0.0, s_slope), low, high


@triton.jit
def vespo(lp, old, a, x, r, saturated, selected, s_loss, s_slope, s_low, s_high, s_pos, s_neg, p0, p1, p2, p3, p4):
    slope = -tl.where(a >= 0, s_pos, s_neg) * a
    never = selected & (selected == 0)
    return product(slope, lp), slope, never, never


# --- Of a sequence ----------------------------------------------------------------------------------------------------
# statistic: (log-ratio, advantage, numbers) -> what is averaged; shared: (its mean, length, mean advantage, numbers) ->
# loss, d loss / d mean, held low, held high, weight of its tokens with a positive, with a negative advantage


@triton.jit
def log_ratio(x, a, p0, p1):
    return x


@triton.jit
def gmpo_log_ratio(x, a, p0, p1):
    return tl.where((a < 0) & (x < p0), p0, tl.where((a > 0) & (x > p1), p1, x))


@triton.jit
def nothing_shared(mean, length, a, p0, p1, p2, p3):
    return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@triton.jit
def gspo_shared(mean, length, a, p0, p1, p2, p3):
    ratio = bounded_exp(mean)
    loss, slope, low, high = clipped_surrogate(ratio, a, p0, p1, p2)
    slope = tl.where(tl.abs(mean) > 20.0, 0.0, slope)
    return loss, slope, tl.where(low, 1.0, 0.0), tl.where(high, 1.0, 0.0), ratio, ratio


@triton.jit
def gmpo_shared(mean, length, a, p0, p1, p2, p3):
    loss = -bounded_exp(mean) * a
    return loss, tl.where(tl.abs(mean) > 20.0, 0.0, loss), 0.0, 0.0, 0.0, 0.0


@triton.jit
def vespo_shared(mean, length, a, p0, p1, p2, p3):
    total = mean * length
    log_weight = tl.where(total > 20.0, 20.0, tl.where(total < -20.0, -20.0, total))
    above = expm1(log_weight)
    return 0.0, 0.0, 0.0, 0.0, tl.exp(p0 * log_weight - p1 * above), tl.exp(p2 * log_weight - p3 * above)


@triton.jit
def dro_shared(mean, length, a, p0, p1, p2, p3):
    total = mean * length
    return (0.5 * p0 * total - a) * total, length * (p0 * total - a), 0.0, 0.0, 0.0, 0.0


class Function(NamedTuple):
    token: triton.JITFunction
    statistic: triton.JITFunction = log_ratio
    shared: triton.JITFunction = nothing_shared
    of_sequence: bool = False  # the slope is d loss / d mean of the sequence
    folds_correction: bool = False  # into the sum of the log-ratios, in place of a weight


FUNCTIONS = {
    "ppo_clip": Function(ppo_clip),
    "clip_cov": Function(clip_cov),
    "kl_cov": Function(kl_cov),
    "policy_gradient": Function(policy_gradient),
    "cispo": Function(cispo),
    "sapo": Function(sapo),
    "dppo_tv": Function(dppo_tv),
    "dppo_kl": Function(dppo_kl),
    "gspo": Function(gspo, shared=gspo_shared, of_sequence=True),
    "gspo_token": Function(gspo_token, shared=gspo_shared),
    "gmpo": Function(gmpo, gmpo_log_ratio, gmpo_shared, of_sequence=True),
    "vespo": Function(vespo, shared=vespo_shared, folds_correction=True),
    "dro": Function(gspo, shared=dro_shared, of_sequence=True),
}


# --- The kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _load(x, row_stride, column_stride, row, column, counts, acc: tl.constexpr):
    return tl.load(x + row * row_stride + column * column_stride, mask=counts, other=0.0).to(acc)


@triton.jit
def _corrected(ratio, low, high, REJECT: tl.constexpr):
    outside = (ratio < low) | (ratio > high)
    bounded = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    if REJECT:
        bounded = tl.where(outside, 0.0, ratio)
    return bounded, outside


@triton.jit
def _log(weight):
    return tl.log(tl.where(weight < 2.061153622438558e-09, 2.061153622438558e-09, weight))  # exp(-20)


@triton.jit
def _sequences_kernel(
    logprobs, old_logprobs, advantages, sampler, weights,  # (rows, columns) each, any strides
    lp_r, lp_c, old_r, old_c, a_r, a_c, sampler_r, sampler_c, w_r, w_c,  # their strides
    flags,  # (rows * columns,) uint8, not 0 where a token counts; with MARKS bits: 2 dropped, 4 selected
    cu_seqlens,  # (S + 1,) int64
    denominator,  # ()
    shared,  # (SHARED, S)
    columns,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64,
    low: tl.float64, high: tl.float64, furthest: tl.float64,
    STATISTIC: tl.constexpr, SHARED_OF: tl.constexpr, LEVEL: tl.constexpr, REJECT: tl.constexpr,
    FOLDS: tl.constexpr, HAS_SAMPLER: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_FLAGS: tl.constexpr,
    MARKS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = shared.dtype.element_ty
    p0, p1, p2, p3 = tl.full([], p0, acc), tl.full([], p1, acc), tl.full([], p2, acc), tl.full([], p3, acc)
    low, high, furthest = tl.full([], low, acc), tl.full([], high, acc), tl.full([], furthest, acc)
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = sequence * columns, (sequence + 1) * columns
    if PACKED:
        begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    count = tl.zeros([BLOCK], acc)
    statistic = tl.zeros([BLOCK], acc)
    advantage = tl.zeros([BLOCK], acc)
    correction = tl.zeros([BLOCK], acc)
    kl = tl.zeros([BLOCK], acc)
    weight = tl.zeros([BLOCK], acc)
    weight_negative = tl.zeros([BLOCK], acc)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts = i < end
        kept = counts
        if HAS_FLAGS:
            flag = tl.load(flags + i, mask=counts, other=0)
            counts = flag != 0
            kept = counts
            if MARKS:
                kept = counts & ((flag & 2) == 0)
        row, column = i // columns, i % columns
        lp = _load(logprobs, lp_r, lp_c, row, column, counts, acc)
        old = _load(old_logprobs, old_r, old_c, row, column, counts, acc)
        a = _load(advantages, a_r, a_c, row, column, counts, acc)
        source = old
        if HAS_SAMPLER:
            source = _load(sampler, sampler_r, sampler_c, row, column, counts, acc)
        w = tl.where(kept, 1.0, 0.0).to(acc)
        if HAS_WEIGHTS:
            w *= _load(weights, w_r, w_c, row, column, counts, acc)
        else:
            w /= tl.load(denominator).to(acc)
        if HAS_SAMPLER and LEVEL == 0:
            bounded, _ = _corrected(bounded_exp(old - source), low, high, REJECT)
            if FOLDS:
                statistic += tl.where(counts, _log(bounded), 0.0)
            else:
                w *= bounded
        count += tl.where(counts, 1.0, 0.0)
        statistic += tl.where(counts, STATISTIC(lp - old, a, p0, p1), 0.0)
        advantage += a
        correction += old - source
        kl += source - lp
        weight += w
        weight_negative += tl.where(a < 0, w, 0.0)
    total = tl.sum(count, 0)
    length = tl.where(total == 0, 1.0, total)
    far = tl.sum(kl, 0) / length > furthest
    folded = tl.sum(statistic, 0)
    total_weight = tl.sum(weight, 0) - tl.where(far, tl.sum(weight_negative, 0), 0.0)
    ratio = tl.sum(correction, 0)
    if LEVEL == 2:
        ratio = ratio / length
    ratio = bounded_exp(ratio)
    if HAS_SAMPLER and LEVEL != 0:
        bounded, _ = _corrected(ratio, low, high, REJECT)
        total_weight *= bounded
        if FOLDS:
            folded += tl.where(LEVEL == 1, 1.0, length) * _log(bounded)
    mean, advantage_mean = folded / length, tl.sum(advantage, 0) / length
    s0, s1, s2, s3, s4, s5 = SHARED_OF(mean, length, advantage_mean, p0, p1, p2, p3)
    S = tl.num_programs(0)
    out = shared + sequence
    tl.store(out, s0)
    tl.store(out + S, s1)
    tl.store(out + 2 * S, s2)
    tl.store(out + 3 * S, s3)
    tl.store(out + 4 * S, s4)
    tl.store(out + 5 * S, s5)
    tl.store(out + 6 * S, total_weight / length)
    tl.store(out + 7 * S, ratio)
    tl.store(out + 8 * S, tl.where(far, 1.0, 0.0))


@triton.jit
def _add(partials, k, value):
    tl.store(partials + k * tl.num_programs(0) + tl.program_id(0), value)


@triton.jit
def _tokens_kernel(
    logprobs, old_logprobs, advantages, ref, sampler, entropy, weights,  # (rows, columns) each, any strides
    lp_r, lp_c, old_r, old_c, a_r, a_c, ref_r, ref_c, sampler_r, sampler_c, entropy_r, entropy_c, w_r, w_c,
    flags,  # (rows * columns,) uint8, not 0 where a token counts; with MARKS bits: 2 dropped, 4 selected
    sequence_ids,  # (columns,) int64, of packed tokens
    denominator,  # ()
    shared,  # (SHARED, S)
    coefficient,  # (rows * columns,)
    entropy_coefficient,  # (rows * columns,)
    partials,  # (SUMS, programs)
    N, columns, S,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, p4: tl.float64,
    kl_coef: tl.float64, entropy_coef: tl.float64, low: tl.float64, high: tl.float64,
    TOKEN: tl.constexpr, OF_SEQUENCE: tl.constexpr, FOLDS: tl.constexpr,
    ESTIMATOR: tl.constexpr, UNBIASED: tl.constexpr,
    LEVEL: tl.constexpr, REJECT: tl.constexpr, HAS_REF: tl.constexpr, HAS_SAMPLER: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, BONUS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_FLAGS: tl.constexpr,
    MARKS: tl.constexpr, HAS_SHARED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = partials.dtype.element_ty
    p0, p1, p2, p3 = tl.full([], p0, acc), tl.full([], p1, acc), tl.full([], p2, acc), tl.full([], p3, acc)
    p4, kl_coef, entropy_coef = tl.full([], p4, acc), tl.full([], kl_coef, acc), tl.full([], entropy_coef, acc)
    low, high = tl.full([], low, acc), tl.full([], high, acc)
    losses = tl.zeros([BLOCK], acc)
    held_low = tl.zeros([BLOCK], acc)
    held_high = tl.zeros([BLOCK], acc)
    approx_kl = tl.zeros([BLOCK], acc)
    ratios = tl.zeros([BLOCK], acc)
    kls = tl.zeros([BLOCK], acc)
    entropies = tl.zeros([BLOCK], acc)
    corrections = tl.zeros([BLOCK], acc)
    outsides = tl.zeros([BLOCK], acc)
    sampler_kl = tl.zeros([BLOCK], acc)
    drops = tl.zeros([BLOCK], acc)
    highest = tl.full([BLOCK], float("-inf"), acc)
    lowest = tl.full([BLOCK], float("inf"), acc)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        i = tl.full([], block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < N
        counts = inside
        dropped = i < 0
        selected = i < 0
        if HAS_FLAGS:
            flag = tl.load(flags + i, mask=inside, other=0)
            counts = flag != 0
            if MARKS:
                dropped = (flag & 2) != 0
                selected = (flag & 4) != 0
        row, column = i // columns, i % columns
        lp = _load(logprobs, lp_r, lp_c, row, column, counts, acc)
        old = _load(old_logprobs, old_r, old_c, row, column, counts, acc)
        a = _load(advantages, a_r, a_c, row, column, counts, acc)
        w = tl.where(counts, 1.0, 0.0).to(acc)
        if HAS_WEIGHTS:
            w = _load(weights, w_r, w_c, row, column, counts, acc)
        else:
            w /= tl.load(denominator).to(acc)
        zero = tl.zeros([BLOCK], acc)
        s0, s1, s2, s3, s4, s5, s6, ratio_of_sequence = zero, zero, zero, zero, zero, zero, zero, zero
        if HAS_SHARED:
            s = row
            if PACKED:
                s = tl.load(sequence_ids + column, mask=inside, other=0)
            s0 = tl.load(shared + s, mask=counts, other=0.0)
            s1 = tl.load(shared + S + s, mask=counts, other=0.0)
            s2 = tl.load(shared + 2 * S + s, mask=counts, other=0.0)
            s3 = tl.load(shared + 3 * S + s, mask=counts, other=0.0)
            s4 = tl.load(shared + 4 * S + s, mask=counts, other=0.0)
            s5 = tl.load(shared + 5 * S + s, mask=counts, other=0.0)
            s6 = tl.load(shared + 6 * S + s, mask=counts, other=0.0)
            ratio_of_sequence = tl.load(shared + 7 * S + s, mask=counts, other=0.0)
            dropped = dropped | ((tl.load(shared + 8 * S + s, mask=counts, other=0.0) > 0) & (a < 0))
        x = lp - old
        r = bounded_exp(x)
        saturated = tl.abs(x) > 20.0
        loss, slope, is_low, is_high = TOKEN(
            lp, old, a, x, r, saturated, selected, s0, s1, s2, s3, s4, s5, p0, p1, p2, p3, p4
        )
        policy_weight = tl.where(dropped, 0.0, w)
        if HAS_SAMPLER:
            apart = old - _load(sampler, sampler_r, sampler_c, row, column, counts, acc)
            to_sampler = ratio_of_sequence
            if LEVEL == 0:
                to_sampler = bounded_exp(apart)
            bounded, outside = _corrected(to_sampler, low, high, REJECT)
            if not FOLDS:
                policy_weight *= bounded
            corrections += tl.where(counts, bounded, 0.0)
            outsides += tl.where(counts & outside, 1.0, 0.0)
            sampler_kl += exp_minus_1_minus(apart)
        losses += tl.where(policy_weight == 0, 0.0, policy_weight * loss)
        if OF_SEQUENCE:
            slope = tl.where(counts, product(s6, slope), 0.0)
        else:
            slope = tl.where(policy_weight == 0, 0.0, policy_weight * slope)
        if HAS_REF:
            apart = _load(ref, ref_r, ref_c, row, column, counts, acc) - lp
            y = apart
            if (ESTIMATOR == 2) or UNBIASED:
                y = tl.where(apart > 20.0, 20.0, tl.where(apart < -20.0, -20.0, apart))
            k3 = exp_minus_1_minus(y)
            kl, kl_slope = k3, tl.where(y == apart, -(k3 + y), 0.0)
            if ESTIMATOR == 0:
                kl, kl_slope = -y, zero + 1.0
            if ESTIMATOR == 1:
                kl, kl_slope = 0.5 * y * y, -y
            if UNBIASED:
                kl, kl_slope = r * kl, -r * y
            kls += kl
            losses += w * product(kl_coef, kl)
            slope += tl.where(counts, product(w * kl_coef, kl_slope), 0.0)
        if HAS_ENTROPY:
            h = _load(entropy, entropy_r, entropy_c, row, column, counts, acc)
            entropies += h
            if BONUS:
                losses -= w * (entropy_coef * h)
                tl.store(entropy_coefficient + i, -entropy_coef * w, mask=inside)
        tl.store(coefficient + i, slope, mask=inside)
        held_low += tl.where(counts & is_low, 1.0, 0.0)
        held_high += tl.where(counts & is_high, 1.0, 0.0)
        approx_kl += exp_minus_1_minus(x)
        ratios += tl.where(counts, r, 0.0)
        drops += tl.where(counts & dropped, 1.0, 0.0)
        highest = tl.where(counts & (r > highest), r, highest)
        lowest = tl.where(counts & (r < lowest), r, lowest)
    _add(partials, 0, tl.sum(losses, 0))
    _add(partials, 1, tl.sum(held_low, 0))
    _add(partials, 2, tl.sum(held_high, 0))
    _add(partials, 3, tl.sum(approx_kl, 0))
    _add(partials, 4, tl.sum(ratios, 0))
    _add(partials, 5, tl.sum(kls, 0))
    _add(partials, 6, tl.sum(entropies, 0))
    _add(partials, 7, tl.sum(corrections, 0))
    _add(partials, 8, tl.sum(outsides, 0))
    _add(partials, 9, tl.sum(sampler_kl, 0))
    _add(partials, 10, tl.sum(drops, 0))
    _add(partials, 11, tl.max(highest, 0))
    _add(partials, 12, tl.min(lowest, 0))


@triton.jit
def _metrics_kernel(
    partials,  # (SUMS, programs)
    denominator,  # ()
    loss,  # ()
    metrics,  # (13,)
    programs,
    PARTS: tl.constexpr,
):
    tokens = tl.load(denominator)
    part = tl.arange(0, PARTS)
    there = part < programs
    highest = tl.max(tl.load(partials + 11 * programs + part, mask=there, other=float("-inf")), 0)
    lowest = tl.min(tl.load(partials + 12 * programs + part, mask=there, other=float("inf")), 0)
    nothing = highest < lowest
    ratios = sum_parts(partials, 4, programs, PARTS)
    broken = tl.where(ratios != ratios, ratios, 0.0)  # NaN is no maximum
    held_low = sum_parts(partials, 1, programs, PARTS)
    held_high = sum_parts(partials, 2, programs, PARTS)
    tl.store(loss, sum_parts(partials, 0, programs, PARTS))
    tl.store(metrics, divide(held_low + held_high, tokens))
    tl.store(metrics + 1, divide(held_low, tokens))
    tl.store(metrics + 2, divide(held_high, tokens))
    tl.store(metrics + 3, divide(sum_parts(partials, 3, programs, PARTS), tokens))
    tl.store(metrics + 4, divide(ratios, tokens))
    tl.store(metrics + 5, tl.where(nothing, 0.0, highest) + broken)
    tl.store(metrics + 6, tl.where(nothing, 0.0, lowest) + broken)
    for k in tl.static_range(5, 11):
        tl.store(metrics + k + 2, divide(sum_parts(partials, k, programs, PARTS), tokens))


def policy_loss(
    inputs: tuple[Tensor | None, ...],  # Inputs of rlhf_fast/ops/policy/batch.py
    plan: tuple[Tensor | None, ...],  # Plan of it
    function: str,
    parameters: list[float],
    choices: list[int],
    terms: list[float],
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [loss (), metrics (13,), d loss / d logprob, and d loss / d entropy where it has a weight]."""
    token, statistic, shared_of, of_sequence, folds = FUNCTIONS[function]
    logprobs, old_logprobs, advantages, ref, sampler, entropy = inputs
    flags, weights, denominator, cu_seqlens = plan
    loss, metrics, *coefficients = outputs
    estimator, unbiased, level, reject, needs_sequences, marks, _ = choices
    assert logprobs is not None
    rows, columns = logprobs.shape
    sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shared = metrics.new_empty(SHARED, sequences) if needs_sequences else None
    ids = None
    if needs_sequences and cu_seqlens is not None:
        steps = torch.arange(columns, device=logprobs.device)
        ids = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True).clamp(max=sequences - 1)
    flagged = {
        "FOLDS": folds, "LEVEL": level, "REJECT": bool(reject),
        "HAS_SAMPLER": sampler is not None, "PACKED": ids is not None,
        "HAS_WEIGHTS": weights is not None, "HAS_FLAGS": flags is not None, "MARKS": bool(marks), "BLOCK": BLOCK,
    }  # fmt: skip
    if needs_sequences and logprobs.numel():
        read = [logprobs, old_logprobs, advantages, sampler, weights]
        launch(
            _sequences_kernel, (sequences,),
            *read, *_strides(read), flags, cu_seqlens, denominator, shared, columns, *parameters[:4], *terms[2:],
            STATISTIC=statistic, SHARED_OF=shared_of, **flagged,
        )  # fmt: skip
    programs = max(1, min(PARTS, triton.cdiv(logprobs.numel(), BLOCK)))
    partials = metrics.new_empty(SUMS, programs)
    read = [logprobs, old_logprobs, advantages, ref, sampler, entropy, weights]
    launch(
        _tokens_kernel, (programs,),
        *read, *_strides(read), flags, ids, denominator, shared, coefficients[0], coefficients[-1], partials,
        logprobs.numel(), columns, sequences, *parameters, *terms[:4],
        TOKEN=token, OF_SEQUENCE=of_sequence, ESTIMATOR=estimator, UNBIASED=bool(unbiased), HAS_REF=ref is not None,
        HAS_ENTROPY=entropy is not None, BONUS=len(coefficients) > 1, HAS_SHARED=bool(needs_sequences), num_warps=8,
        **flagged,
    )  # fmt: skip
    launch(_metrics_kernel, (1,), partials, denominator, loss, metrics, programs, PARTS=PARTS)


def _strides(tensors: list[Tensor | None]) -> list[int]:
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride())]
