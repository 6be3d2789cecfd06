"""Divergence of rows of logits from rows of reference logits; see rlhf_fast/ops/tokens/token_kl.py.

One program per row. Forward and backward read both rows twice, for the maximum and for the sums; backward writes the
gradient, also over the logits or the reference's. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import exp_minus_1_minus_near_0, expm1, log1p, tanh_slope
from torch import Tensor

BLOCK, WARPS = 1024, 4
STAGES = 3  # blocks of a row that are on their way or in use
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _kl_term(x, y, log_ratio):
    """x log(x / y) - x + y >= 0, given log(y / x): does not cancel where x is near y."""
    near = tl.abs(log_ratio) < 0.5
    term = tl.where(near, x * exp_minus_1_minus_near_0(tl.where(near, log_ratio, 0.0)), (y - x) - x * log_ratio)
    return tl.where(x == 0, y, term)


# p: the policy's probability, q: the reference's, log_ratio = log(q / p) -> what element j adds to the divergence D and
# to mean = sum_k p_k s_k, and slope = p_j s_j, with s_j = d D / d p_j up to a constant: d D / d z_j = slope - p_j mean.
@triton.jit
def reverse(p, q, log_ratio, js_weight):
    value = _kl_term(p, q, log_ratio)
    return value, value, tl.where(p == 0, 0.0, -p * log_ratio)


@triton.jit
def forward_kl(p, q, log_ratio, js_weight):
    near = tl.abs(log_ratio) < 0.5
    slope = tl.where(near, -p * expm1(tl.where(near, log_ratio, 0.0)), p - q)
    return _kl_term(q, p, -log_ratio), p * 0.0, slope


@triton.jit
def js(p, q, log_ratio, js_weight):
    policy_leads = log_ratio <= 0
    policy_weight = 1.0 - js_weight
    shrunk = log1p(tl.where(policy_leads, js_weight, policy_weight) * expm1(-tl.abs(log_ratio)))
    mixture = js_weight * q + policy_weight * p
    over_p = tl.where(policy_leads, shrunk, shrunk + log_ratio)  # log(mixture / p)
    over_q = tl.where(policy_leads, shrunk - log_ratio, shrunk)  # log(mixture / q)
    mean = policy_weight * _kl_term(p, mixture, over_p)
    value = js_weight * _kl_term(q, mixture, over_q) + mean
    return value, mean, tl.where(p == 0, 0.0, -policy_weight * p * over_p)


DIVERGENCES = {"reverse": reverse, "forward": forward_kl, "js": js}


@triton.jit
def _scalars(temperature, scale, cap, js_weight, acc: tl.constexpr, HAS_CAP: tl.constexpr):
    """(factor, inner_scale) of z = factor * s with s = x, or tanh(inner_scale * x) under a softcap, and js_weight."""
    outer = tl.full([], scale, tl.float64)
    inner_scale = tl.full([], 1.0, tl.float64)
    if HAS_CAP:
        inner_scale = outer / cap
        outer = tl.full([], cap, tl.float64)
    return (outer / temperature).to(acc), inner_scale.to(acc), tl.full([], js_weight, tl.float64).to(acc)


@triton.jit
def _read(logits, start, V, inner_scale, acc: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """A block of s (see _scalars), -inf past the end."""
    columns = start + tl.arange(0, BLOCK)
    s = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(acc)
    if HAS_CAP:
        e = expm1(-2.0 * tl.abs(s * inner_scale))
        t = -e / (2.0 + e)
        s = tl.where(columns < V, tl.where(s < 0, -t, t), s)
    return s


@triton.jit
def _row_max(logits, V, inner_scale, acc: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    largest = tl.full([BLOCK], -float("inf"), acc)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        largest = tl.maximum(largest, _read(logits, start, V, inner_scale, acc, HAS_CAP, BLOCK))
    return tl.max(largest, 0)


@triton.jit
def _forward_kernel(
    logits,  # (outer, inner, V), last stride 1
    ref_logits,  # (outer, inner, V), last stride 1
    mask,  # (outer * inner,) uint8
    logsums,  # (outer * inner,)
    ref_logsums,  # (outer * inner,)
    kls,  # (outer * inner,)
    means,  # (outer * inner,)
    temperatures,  # (outer * inner,) float32
    temperature: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    js_weight: tl.float64,
    V,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    DIVERGENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc = kls.dtype.element_ty
    counts = True
    if HAS_MASK:
        counts = tl.load(mask + row) != 0
    if not counts:
        tl.store(kls + row, 0.0)
        tl.store(means + row, 0.0)
        return
    if HAS_TEMPERATURES:
        temperature = tl.load(temperatures + row).to(tl.float64)
    factor, inner_scale, weight = _scalars(temperature, scale, cap, js_weight, acc, HAS_CAP)
    logits += (row // inner) * outer_stride + (row % inner) * inner_stride
    ref_logits += (row // inner) * ref_outer_stride + (row % inner) * ref_inner_stride
    top = _row_max(logits, V, inner_scale, acc, HAS_CAP, BLOCK, STAGES)
    ref_top = _row_max(ref_logits, V, inner_scale, acc, HAS_CAP, BLOCK, STAGES)
    logsum = tl.load(logsums + row)
    ref_logsum = tl.load(ref_logsums + row)

    kl = tl.zeros([BLOCK], acc)
    mean = tl.zeros([BLOCK], acc)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        log_p = (_read(logits, start, V, inner_scale, acc, HAS_CAP, BLOCK) - top) * factor - logsum
        log_q = (_read(ref_logits, start, V, inner_scale, acc, HAS_CAP, BLOCK) - ref_top) * factor - ref_logsum
        value, through_p, _slope = DIVERGENCE(tl.exp2(log_p * LOG2E), tl.exp2(log_q * LOG2E), log_q - log_p, weight)
        kl += value
        mean += through_p
    tl.store(kls + row, tl.sum(kl, 0))
    tl.store(means + row, tl.sum(mean, 0))


@triton.jit
def _backward_kernel(
    logits,  # (outer, inner, V), last stride 1
    ref_logits,  # (outer, inner, V), last stride 1
    mask,  # (outer * inner,) uint8
    logsums,  # (outer * inner,)
    ref_logsums,  # (outer * inner,)
    means,  # (outer * inner,)
    grad_kls,  # (outer * inner,)
    gradient,  # (outer, inner, V), last stride 1, may be the logits or the reference's
    temperatures,  # (outer * inner,) float32
    temperature: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    js_weight: tl.float64,
    V,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    grad_outer_stride,
    grad_inner_stride,
    DIVERGENCE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc = means.dtype.element_ty
    gradient += (row // inner) * grad_outer_stride + (row % inner) * grad_inner_stride
    grad_kl = tl.load(grad_kls + row)
    counts = grad_kl != 0
    if HAS_MASK:
        counts = counts & (tl.load(mask + row) != 0)
    if not counts:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(gradient + columns, tl.zeros([BLOCK], acc).to(gradient.dtype.element_ty), mask=columns < V)
        return
    if HAS_TEMPERATURES:
        temperature = tl.load(temperatures + row).to(tl.float64)
    factor, inner_scale, weight = _scalars(temperature, scale, cap, js_weight, acc, HAS_CAP)
    logits += (row // inner) * outer_stride + (row % inner) * inner_stride
    ref_logits += (row // inner) * ref_outer_stride + (row % inner) * ref_inner_stride
    top = _row_max(logits, V, inner_scale, acc, HAS_CAP, BLOCK, STAGES)
    ref_top = _row_max(ref_logits, V, inner_scale, acc, HAS_CAP, BLOCK, STAGES)
    logsum = tl.load(logsums + row)
    ref_logsum = tl.load(ref_logsums + row)
    mean = tl.load(means + row)
    slope_scale = grad_kl * factor
    if HAS_CAP:
        slope_scale *= inner_scale

    # A row's gradient sums to 0. Where one token holds more than half of p, its own element is taken from that:
    # computed directly it would cancel.
    leading = tl.where(logsum < 0.69, top, float("inf"))
    others = tl.zeros([BLOCK], acc)
    leader = tl.full([BLOCK], -1, tl.int64)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _read(logits, start, V, inner_scale, acc, HAS_CAP, BLOCK)
        log_p = (s - top) * factor - logsum
        log_q = (_read(ref_logits, start, V, inner_scale, acc, HAS_CAP, BLOCK) - ref_top) * factor - ref_logsum
        p = tl.exp2(log_p * LOG2E)
        _value, _mean, slope = DIVERGENCE(p, tl.exp2(log_q * LOG2E), log_q - log_p, weight)
        g = tl.where(p == 0, slope, slope - p * mean)
        leader = tl.where(s == leading, columns, leader)
        others += tl.where(s == leading, 0.0, g)
        if HAS_CAP:
            x = tl.load(logits + columns, mask=columns < V, other=0.0).to(acc)
            g *= tanh_slope(x * inner_scale)
        tl.store(
            gradient + columns, (g * slope_scale).to(gradient.dtype.element_ty), mask=(columns < V) & (s != leading)
        )
    if leading == top:
        g = -tl.sum(others, 0)
        if HAS_CAP:
            g *= tanh_slope(tl.load(logits + tl.max(leader, 0)).to(acc) * inner_scale)
        tl.store(gradient + tl.max(leader, 0), (g * slope_scale).to(gradient.dtype.element_ty))


def _shared(
    logits: Tensor, transform: Any, divergence: str, mask: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(the transform's arguments, options) that both kernels take; `transform`: see ops/tokens/token_logprobs.py."""
    temperature, temperatures, logit_scale, softcap = transform
    options = {
        "DIVERGENCE": DIVERGENCES[divergence],
        "HAS_MASK": mask is not None,
        "HAS_TEMPERATURES": temperatures is not None,
        "HAS_CAP": softcap > 0,
        "BLOCK": min(BLOCK, triton.next_power_of_2(logits.shape[-1])),
        "STAGES": STAGES,
        "num_warps": WARPS,
    }
    return (temperatures, temperature, logit_scale, softcap), options


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    transform: Any,
    divergence: str,
    js_weight: float,
    stats: list[Tensor],
) -> None:
    """Fills kl and mean of stats = [kl, mean, logsum, ref_logsum]."""
    kl, mean, logsum, ref_logsum = stats
    if kl.numel() == 0:
        return
    scalars, options = _shared(logits, transform, divergence, mask)
    launch(
        _forward_kernel, (kl.numel(),),
        logits, ref_logits, mask, logsum, ref_logsum, kl, mean, *scalars, js_weight, logits.shape[-1], logits.shape[1],
        *logits.stride()[:2], *ref_logits.stride()[:2], **options,
    )  # fmt: skip


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    transform: Any,
    divergence: str,
    js_weight: float,
    stats: list[Tensor],
    grad_kl: Tensor,
    gradient: Tensor,
) -> None:
    """gradient = grad_kl * d kl / d logits."""
    _, mean, logsum, ref_logsum = stats
    if mean.numel() == 0:
        return
    scalars, options = _shared(logits, transform, divergence, mask)
    launch(
        _backward_kernel, (mean.numel(),),
        logits, ref_logits, mask, logsum, ref_logsum, mean, grad_kl, gradient, *scalars, js_weight, logits.shape[-1],
        logits.shape[1], *logits.stride()[:2], *ref_logits.stride()[:2], *gradient.stride()[:2], **options,
    )  # fmt: skip
