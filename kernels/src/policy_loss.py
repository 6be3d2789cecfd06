"""Policy losses: loss, metrics and gradient coefficients in one pass; rlhf_fast/ops/policy/policy_loss.py.

The one kernel takes a loss as functions (policy_losses.py). Losses and corrections made from sequences have a first
kernel, one program per sequence, that leaves what its tokens share. Sums are made in two stages over a number of
partial sums that depends on the input's size alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.kl_estimate import VARIANTS as KL_VARIANTS
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.plane import is_short, place, plane, read
from rlhf_fast.kernels.policy_losses import FUNCTIONS, Numbers, Shared, Token, bounded_exp, in_type
from rlhf_fast.kernels.scalar import bounded, divide, exp_minus_1_minus, load_parts, product
from torch import Tensor

BLOCK = 512
PARTS = 1024  # partial sums at most: as many programs as run at a time on a large GPU
WARPS = 4


class Flags(NamedTuple):
    counts: tl.tensor
    dropped: tl.tensor
    selected: tl.tensor


class Sequence(NamedTuple):
    """Of every token; after Shared, the rows of what _sequences_kernel leaves."""

    shared: Shared
    weight: tl.tensor  # of the sequence in the loss over its length, for losses of a sequence
    ratio: tl.tensor  # to the sampler
    far: tl.tensor  # 1: from the sampler, negative advantages are dropped


SHARED = tl.constexpr(len(Shared._fields))
ROWS = SHARED.value + len(Sequence._fields) - 1


class SequenceSums(NamedTuple):
    count: tl.tensor
    statistic: tl.tensor
    advantage: tl.tensor
    correction: tl.tensor  # of the log-ratio to the sampler
    kl: tl.tensor  # from the sampler, k1
    weight: tl.tensor
    weight_negative: tl.tensor  # of the tokens with a negative advantage


class Sums(NamedTuple):
    """The rows of the partial sums, but the last two; None: nobody asked for it."""

    loss: tl.tensor
    low: tl.tensor
    high: tl.tensor
    approx_kl: tl.tensor
    ratio: tl.tensor
    dropped: tl.tensor
    kl: tl.tensor = None
    entropy: tl.tensor = None
    correction: tl.tensor = None
    outside: tl.tensor = None
    sampler_kl: tl.tensor = None


SUMS = tl.constexpr(len(Sums._fields))  # the two rows after them: the largest and the smallest ratio


@triton.jit
def _zeros(count: tl.constexpr, BLOCK: tl.constexpr, acc: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(count):
        zeros += (tl.zeros([BLOCK], acc),)
    return zeros


# --- Of a token -------------------------------------------------------------------------------------------------------


@triton.jit
def _flags(flags, i, inside, MARKS: tl.constexpr):
    """flags: uint8, not 0 where a token counts; with MARKS bits: 2 dropped, 4 selected. None: all that are inside."""
    counts, dropped, selected = inside, i < 0, i < 0
    if flags is not None:
        flag = tl.load(flags + i, mask=inside, other=0)
        counts = flag != 0
        if MARKS:
            dropped, selected = (flag & 2) != 0, (flag & 4) != 0
    return Flags(counts, dropped, selected)


@triton.jit
def _weight(weights, denominator, row, column, counts, acc: tl.constexpr):
    """Of every token in the loss."""
    if weights is None:
        return tl.where(counts, 1.0, 0.0).to(acc) / tl.load(denominator).to(acc)
    else:
        return read(weights, row, column, counts, acc)


@triton.jit
def _corrected(ratio, p, MODE: tl.constexpr):
    """(weight, outside of the bounds) of a ratio to the sampler."""
    outside = (ratio < p.correction_low) | (ratio > p.correction_high)
    if MODE == "mask":
        return tl.where(outside, 0.0, ratio), outside
    else:
        return bounded(ratio, p.correction_low, p.correction_high), outside


@triton.jit
def _log_corrected(ratio, p, MODE: tl.constexpr):
    weight, _outside = _corrected(ratio, p, MODE)
    return tl.log(tl.where(weight < 2.061153622438558e-09, 2.061153622438558e-09, weight))  # exp(-20)


@triton.jit
def _kl_to_ref(apart, ratio, KL: tl.constexpr, IS_K3: tl.constexpr, UNBIASED: tl.constexpr):
    """(estimate, d estimate / d logprob) from apart = ref_logprob - logprob."""
    x = apart
    if IS_K3 or UNBIASED:
        x = bounded(apart, -20.0, 20.0)
    value, slope = KL(x)
    if UNBIASED:
        value, slope = ratio * value, ratio * x
    elif IS_K3:
        slope = tl.where(x == apart, value + x, 0.0)  # without a second exponential: x is bounded
    return value, -slope


@triton.jit
def _sequence(rows, sequences, counts):
    """The Sequence of every token; rows: pointers to its element of the first row."""
    shared = ()
    for k in tl.static_range(SHARED):
        shared += (tl.load(rows + k * sequences, mask=counts, other=0.0),)
    rows += SHARED * sequences
    weight = tl.load(rows, mask=counts, other=0.0)
    ratio = tl.load(rows + sequences, mask=counts, other=0.0)
    return Sequence(Shared(*shared), weight, ratio, tl.load(rows + 2 * sequences, mask=counts, other=0.0))


# --- The kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _sequences_kernel(
    logprobs, old_logprobs, advantages, sampler_logprobs,  # Planes; the last one may be None
    flags,  # (rows * columns,) uint8, or None
    weights,  # Plane, or None
    cu_seqlens,  # (S + 1,) int64, or None: the rows are the sequences
    denominator,  # ()
    shared,  # (ROWS, S)
    columns,
    clip_eps_low: tl.float64, clip_eps_high: tl.float64, ratio_low: tl.float64, ratio_high: tl.float64,
    dual_clip: tl.float64, max_divergence: tl.float64, kl_cov_coef: tl.float64, sapo_temperature_pos: tl.float64,
    sapo_temperature_neg: tl.float64, vespo_k_pos: tl.float64, vespo_lambda_pos: tl.float64, vespo_k_neg: tl.float64,
    vespo_lambda_neg: tl.float64, dro_beta: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    correction_low: tl.float64, correction_high: tl.float64, off_policy_max_kl: tl.float64,
    STATISTIC: tl.constexpr, SHARED_OF: tl.constexpr, FOLDS: tl.constexpr, LEVEL: tl.constexpr, MODE: tl.constexpr,
    MARKS: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = shared.dtype.element_ty
    p = in_type(
        (clip_eps_low, clip_eps_high, ratio_low, ratio_high, dual_clip, max_divergence, kl_cov_coef,
         sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
         dro_beta, kl_coef, entropy_coef, correction_low, correction_high, off_policy_max_kl), acc
    )  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = sequence * columns, (sequence + 1) * columns
    if cu_seqlens is not None:
        begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    sums = SequenceSums(*_zeros(7, BLOCK, acc))
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        counts, dropped, _selected = _flags(flags, i, i < end, MARKS)
        row, column = place(i, columns, SHORT)
        lp = read(logprobs, row, column, counts, acc)
        old = read(old_logprobs, row, column, counts, acc)
        a = read(advantages, row, column, counts, acc)
        weight = _weight(weights, denominator, row, column, counts, acc)
        if MARKS:
            weight = tl.where(dropped, 0.0, weight)
        statistic = STATISTIC(lp - old, a, p)
        source = old
        if sampler_logprobs is not None:
            source = read(sampler_logprobs, row, column, counts, acc)
            if LEVEL == "token":
                ratio = bounded_exp(old - source)
                if FOLDS:
                    statistic += _log_corrected(ratio, p, MODE)
                else:
                    weight *= _corrected(ratio, p, MODE)[0]
        terms = SequenceSums(
            count=tl.where(counts, 1.0, 0.0), statistic=tl.where(counts, statistic, 0.0), advantage=a,
            correction=old - source, kl=source - lp, weight=weight, weight_negative=tl.where(a < 0, weight, 0.0),
        )  # fmt: skip
        total = ()
        for k in tl.static_range(len(sums)):
            total += (sums[k] + terms[k],)
        sums = SequenceSums(*total)
    total = ()
    for k in tl.static_range(len(sums)):
        total += (tl.sum(sums[k], 0),)
    total = SequenceSums(*total)
    length = tl.where(total.count == 0, 1.0, total.count)
    far = total.kl / length > p.off_policy_max_kl
    weight = total.weight - tl.where(far, total.weight_negative, 0.0)
    statistic, ratio = total.statistic, total.correction
    if LEVEL == "geometric":
        ratio = ratio / length
    ratio = bounded_exp(ratio)
    if sampler_logprobs is not None and LEVEL != "token":
        weight *= _corrected(ratio, p, MODE)[0]
        if FOLDS:
            statistic += tl.where(LEVEL == "sequence", 1.0, length) * _log_corrected(ratio, p, MODE)
    rows = SHARED_OF(statistic / length, length, total.advantage / length, p)
    rows += (weight / length, ratio, tl.where(far, 1.0, 0.0))
    for k in tl.static_range(len(rows)):
        tl.store(shared + k * tl.num_programs(0) + sequence, rows[k])


@triton.jit
def _tokens_kernel(
    logprobs, old_logprobs, advantages, ref_logprobs, sampler_logprobs, entropy,  # Planes; the last three may be None
    flags,  # (rows * columns,) uint8, or None
    weights,  # Plane, or None
    sequence_ids,  # (columns,) int64 of packed tokens, or None: the rows are the sequences
    denominator,  # ()
    shared,  # (ROWS, sequences), or None
    coefficient,  # (rows * columns,)
    entropy_coefficient,  # (rows * columns,), or None
    partials,  # (SUMS + 2, programs)
    N, columns, sequences,
    clip_eps_low: tl.float64, clip_eps_high: tl.float64, ratio_low: tl.float64, ratio_high: tl.float64,
    dual_clip: tl.float64, max_divergence: tl.float64, kl_cov_coef: tl.float64, sapo_temperature_pos: tl.float64,
    sapo_temperature_neg: tl.float64, vespo_k_pos: tl.float64, vespo_lambda_pos: tl.float64, vespo_k_neg: tl.float64,
    vespo_lambda_neg: tl.float64, dro_beta: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    correction_low: tl.float64, correction_high: tl.float64, off_policy_max_kl: tl.float64,
    LOSS: tl.constexpr, OF_SEQUENCE: tl.constexpr, FOLDS: tl.constexpr, LEVEL: tl.constexpr, MODE: tl.constexpr,
    MARKS: tl.constexpr, KL: tl.constexpr, IS_K3: tl.constexpr, UNBIASED: tl.constexpr, BONUS: tl.constexpr,
    SHORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = partials.dtype.element_ty
    p = in_type(
        (clip_eps_low, clip_eps_high, ratio_low, ratio_high, dual_clip, max_divergence, kl_cov_coef,
         sapo_temperature_pos, sapo_temperature_neg, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg,
         dro_beta, kl_coef, entropy_coef, correction_low, correction_high, off_policy_max_kl), acc
    )  # fmt: skip
    sums = Sums(*_zeros(SUMS, BLOCK, acc))
    highest = tl.full([BLOCK], float("-inf"), acc)
    lowest = tl.full([BLOCK], float("inf"), acc)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        i = tl.full([], block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < N
        counts, dropped, selected = _flags(flags, i, inside, MARKS)
        row, column = place(i, columns, SHORT)
        lp = read(logprobs, row, column, counts, acc)
        old = read(old_logprobs, row, column, counts, acc)
        a = read(advantages, row, column, counts, acc)
        w = _weight(weights, denominator, row, column, counts, acc)
        sequence = Sequence(Shared(), 0.0, 0.0, 0.0)
        if shared is not None:
            s = row
            if sequence_ids is not None:
                s = tl.load(sequence_ids + column, mask=inside, other=0)
            sequence = _sequence(shared + s, sequences, counts)
            dropped = dropped | ((sequence.far > 0) & (a < 0))
        x = lp - old
        ratio = bounded_exp(x)
        out = LOSS(Token(lp, old, a, x, ratio, selected), sequence.shared, p)

        policy_weight = tl.where(dropped, 0.0, w)
        correction, outside, sampler_kl = None, None, None
        if sampler_logprobs is not None:
            apart = old - read(sampler_logprobs, row, column, counts, acc)
            to_sampler = sequence.ratio
            if LEVEL == "token":
                to_sampler = bounded_exp(apart)
            correction, outside = _corrected(to_sampler, p, MODE)
            if not FOLDS:
                policy_weight *= correction
            correction, outside = tl.where(counts, correction, 0.0), tl.where(counts & outside, 1.0, 0.0)
            sampler_kl = exp_minus_1_minus(apart)
        loss = tl.where(policy_weight == 0, 0.0, policy_weight * out.loss)
        if OF_SEQUENCE:
            slope = tl.where(counts, product(sequence.weight, out.slope), 0.0)
        else:
            slope = tl.where(policy_weight == 0, 0.0, policy_weight * out.slope)
        kl, h = None, None
        if ref_logprobs is not None:
            apart = read(ref_logprobs, row, column, counts, acc) - lp
            kl, kl_slope = _kl_to_ref(apart, ratio, KL, IS_K3, UNBIASED)
            loss += w * product(p.kl_coef, kl)
            slope += tl.where(counts, product(w * p.kl_coef, kl_slope), 0.0)
        if entropy is not None:
            h = read(entropy, row, column, counts, acc)
            if BONUS:
                loss -= w * (p.entropy_coef * h)
                tl.store(entropy_coefficient + i, -p.entropy_coef * w, mask=inside)
        tl.store(coefficient + i, slope, mask=inside)
        terms = Sums(
            loss=loss, low=tl.where(counts & out.low, 1.0, 0.0), high=tl.where(counts & out.high, 1.0, 0.0),
            approx_kl=exp_minus_1_minus(x), ratio=tl.where(counts, ratio, 0.0),
            dropped=tl.where(counts & dropped, 1.0, 0.0), kl=kl, entropy=h, correction=correction,
            outside=outside, sampler_kl=sampler_kl,
        )  # fmt: skip
        total = ()
        for k in tl.static_range(SUMS):
            total += (sums[k] if terms[k] is None else sums[k] + terms[k],)
        sums = Sums(*total)
        highest = tl.where(counts & (ratio > highest), ratio, highest)
        lowest = tl.where(counts & (ratio < lowest), ratio, lowest)
    own, programs = partials + tl.program_id(0), tl.num_programs(0)
    for k in tl.static_range(SUMS):
        tl.store(own + k * programs, tl.sum(sums[k], 0))
    tl.store(own + SUMS * programs, tl.max(highest, 0))
    tl.store(own + (SUMS + 1) * programs, tl.min(lowest, 0))


@triton.jit
def _metrics_kernel(
    partials,  # (SUMS + 2, programs)
    denominator,  # ()
    loss,  # ()
    metrics,  # (13,)
    programs,
    PARTS: tl.constexpr,
):
    part = tl.arange(0, PARTS)
    there = part < programs
    highest = tl.load(partials + SUMS * programs + part, mask=there, other=float("-inf"))
    lowest = tl.load(partials + (SUMS + 1) * programs + part, mask=there, other=float("inf"))
    parts = load_parts(partials, SUMS, programs, PARTS)
    highest, lowest = tl.max(highest, 0), tl.min(lowest, 0)
    nothing = highest < lowest
    tokens = tl.load(denominator)
    total = ()
    for k in tl.static_range(SUMS):
        total += (tl.sum(parts[k], 0),)
    total = Sums(*total)
    broken = tl.where(total.ratio != total.ratio, total.ratio, 0.0)  # NaN is no maximum
    in_order = (
        divide(total.low + total.high, tokens), divide(total.low, tokens), divide(total.high, tokens),
        divide(total.approx_kl, tokens), divide(total.ratio, tokens),
        tl.where(nothing, 0.0, highest) + broken, tl.where(nothing, 0.0, lowest) + broken,
        divide(total.kl, tokens), divide(total.entropy, tokens), divide(total.correction, tokens),
        divide(total.outside, tokens), divide(total.sampler_kl, tokens), divide(total.dropped, tokens),
    )  # fmt: skip
    tl.store(loss, total.loss)
    for k in tl.static_range(len(in_order)):
        tl.store(metrics + k, in_order[k])


def policy_loss(inputs: Any, plan: Any, numbers: Any, outputs: list[Tensor]) -> None:
    """Fills outputs = [loss (), metrics (13,), d loss / d logprob, and d loss / d entropy where it has a weight].

    inputs, plan: those of rlhf_fast/ops/policy/batch.py, the denominator given; numbers: those of policy_loss.py there.
    """
    loss, metrics, *coefficients = outputs
    logprobs, cu_seqlens = inputs.logprobs, plan.cu_seqlens
    rows, columns = logprobs.shape
    sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    function = FUNCTIONS[numbers.function]
    values = [getattr(numbers, name) for name in Numbers._fields]
    planes, weights = [plane(x) for x in inputs], plane(plan.weights)
    lp, old, advantages, _ref, sampler, _entropy = planes
    options = {
        "FOLDS": function.folds_correction, "LEVEL": numbers.correction_level, "MODE": numbers.correction_mode,
        "MARKS": numbers.marks_tokens, "SHORT": is_short(logprobs.numel()), "BLOCK": BLOCK,
    }  # fmt: skip
    shared = ids = None
    if numbers.needs_sequences:
        shared = metrics.new_empty(ROWS, sequences)
        if cu_seqlens is not None:
            steps = torch.arange(columns, device=logprobs.device)
            ids = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True).clamp(max=sequences - 1)
        if logprobs.numel():
            launch(
                _sequences_kernel, (sequences,),
                lp, old, advantages, sampler, plan.flags, weights, cu_seqlens, plan.denominator, shared, columns,
                *values, STATISTIC=function.statistic, SHARED_OF=function.shared, **options,
            )  # fmt: skip
    programs = max(1, min(PARTS, triton.cdiv(logprobs.numel(), BLOCK)))
    partials = metrics.new_empty(SUMS.value + 2, programs)
    launch(
        _tokens_kernel, (programs,),
        *planes, plan.flags, weights, ids, plan.denominator, shared, coefficients[0], *(coefficients[1:] or [None]),
        partials, logprobs.numel(), columns, sequences, *values, LOSS=function.token, OF_SEQUENCE=function.of_sequence,
        KL=KL_VARIANTS[numbers.kl_variant], IS_K3=numbers.kl_variant == "k3", UNBIASED=numbers.kl_unbiased,
        BONUS=len(coefficients) > 1, num_warps=WARPS, **options,
    )  # fmt: skip
    launch(_metrics_kernel, (1,), partials, plan.denominator, loss, metrics, programs, PARTS=PARTS, num_warps=8)
