"""Selective log-softmax over rows of logits; formula and numerics in rlhf_fast/ops/token_logprobs.py.

One program per row. Forward reads every logit once; backward reads every logit once and writes its gradient, also
over the logits themselves. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.scalar import expm1, log1p
from torch import Tensor

BLOCK = 4096


@triton.jit
def _write_gradient(
    logits,  # (V,) of this row
    gradient,  # (V,) of this row, may be the logits
    target_id,
    target,  # the target's logit / temperature
    logprob,
    entropy,
    row_max,
    row_logsum,
    grad_logprob,
    grad_entropy,
    temperature,
    V,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(logits + columns, mask=inside, other=0.0).to(row_max.dtype) / temperature
        log_p = (z - row_max) - row_logsum
        p = tl.exp(log_p)
        one_minus_p = tl.where(columns == target_id, -expm1(logprob), -p)
        value = grad_logprob * one_minus_p
        if HAS_ENTROPY:
            value -= tl.where(p > 0, grad_entropy * p * (log_p + entropy), 0.0)
        tl.store(gradient + columns, (value / temperature).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    logits,  # (outer, inner, V), last stride 1
    targets,  # (outer * inner,) int64
    mask,  # (outer * inner,) uint8
    logprobs,  # (outer * inner,)
    entropies,  # (outer * inner,)
    row_maxes,  # (outer * inner,)
    row_logsums,  # (outer * inner,)
    gradient,  # like logits, may be the logits
    temperature,
    V,
    inner,
    outer_stride,
    inner_stride,
    HAS_MASK: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc = logprobs.dtype.element_ty
    base = (row // inner) * outer_stride + (row % inner) * inner_stride
    target_id = tl.load(targets + row)
    counts = True
    if HAS_MASK:
        counts = tl.load(mask + row) != 0
    if not counts:
        tl.store(logprobs + row, 0.0)
        tl.store(row_maxes + row, 0.0)
        tl.store(row_logsums + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropies + row, 0.0)
        if HAS_GRADIENT:
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                tl.store(gradient + base + columns, tl.zeros([BLOCK], acc), mask=columns < V)
        return

    valid = (target_id >= 0) & (target_id < V)
    target = tl.load(logits + base + target_id, mask=valid, other=float("nan")).to(acc) / temperature

    # Statistics of all logits but the target's: m, and per lane the sums over the elements below m (`rest`),
    # the number of elements equal to m (`ties`), and sum of exp(z - m) (m - z) (`spread`).
    m = tl.full([], -float("inf"), acc)
    rest = tl.zeros([BLOCK], acc)
    ties = tl.zeros([BLOCK], acc)
    spread = tl.zeros([BLOCK], acc)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        other = (columns < V) & (columns != target_id)
        z = tl.load(logits + base + columns, mask=other, other=-float("inf")).to(acc) / temperature
        new_m = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        lifted = new_m > m
        # exp(-inf) = 0 when the first finite maximum arrives; lanes are empty until then
        scale = tl.where(lifted, tl.exp(m - shift), 1.0)
        delta = tl.where(lifted & (m > -float("inf")), shift - m, 0.0)
        spread = tl.where(scale > 0, scale * (spread + delta * (rest + ties)), 0.0)
        rest = tl.where(lifted, (rest + ties) * scale, rest)
        ties = tl.where(lifted, 0.0, ties)
        e = tl.exp(z - shift)
        at_max = other & (z == new_m) & (z > -float("inf"))
        rest += tl.where(at_max, 0.0, e)
        ties += tl.where(at_max, 1.0, 0.0)
        if HAS_ENTROPY:
            spread += tl.where(e > 0, e * (shift - z), 0.0)
        m = new_m
    r = tl.sum(rest, 0) + (tl.sum(ties, 0) - 1.0)
    t = tl.sum(spread, 0)
    alone = m == -float("inf")  # no other finite logit
    r = tl.where(alone & (r < 0), 0.0, r)

    margin = tl.where(alone, m, (m - target) + log1p(r))
    logprob = -(tl.maximum(margin, 0.0) + log1p(tl.exp(-tl.abs(margin))))
    logprob = tl.where(target != target, target, logprob)
    # Add the target to the others.
    row_max = tl.maximum(m, target)
    gap = tl.abs(m - target)
    small = tl.where(gap < float("inf"), tl.exp(-gap), 0.0)
    gap = tl.where(small > 0, gap, 0.0)
    target_leads = target > m
    t = tl.where(target_leads, small * (t + gap * (1.0 + r)), t + small * gap)
    r = tl.where(target_leads, small * (1.0 + r), r + small)
    row_logsum = log1p(r)
    entropy = row_logsum + t / (1.0 + r)
    tl.store(logprobs + row, logprob)
    tl.store(row_maxes + row, row_max)
    tl.store(row_logsums + row, row_logsum)
    if HAS_ENTROPY:
        tl.store(entropies + row, entropy)
    if HAS_GRADIENT:
        _write_gradient(
            logits + base, gradient + base, target_id, target, logprob, entropy, row_max, row_logsum,
            1.0, 0.0, temperature, V, False, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    logits,  # (outer, inner, V), last stride 1
    targets,  # (outer * inner,) int64
    mask,  # (outer * inner,) uint8
    logprobs,  # (outer * inner,)
    entropies,  # (outer * inner,)
    row_maxes,  # (outer * inner,)
    row_logsums,  # (outer * inner,)
    grad_logprobs,  # (outer * inner,)
    grad_entropies,  # (outer * inner,)
    gradient,  # (outer, inner, V), last stride 1, may be the logits
    temperature,
    V,
    inner,
    outer_stride,
    inner_stride,
    grad_outer_stride,
    grad_inner_stride,
    HAS_MASK: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc = logprobs.dtype.element_ty
    base = (row // inner) * outer_stride + (row % inner) * inner_stride
    out = (row // inner) * grad_outer_stride + (row % inner) * grad_inner_stride
    grad_logprob = tl.full([], 0.0, acc)
    grad_entropy = tl.full([], 0.0, acc)
    entropy = tl.full([], 0.0, acc)
    if HAS_LOGPROB:
        grad_logprob = tl.load(grad_logprobs + row)
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropies + row)
        entropy = tl.load(entropies + row)
    counts = (grad_logprob != 0) | (grad_entropy != 0)
    if HAS_MASK:
        counts = counts & (tl.load(mask + row) != 0)
    if not counts:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(gradient + out + columns, tl.zeros([BLOCK], acc), mask=columns < V)
        return
    _write_gradient(
        logits + base, gradient + out, tl.load(targets + row), 0.0, tl.load(logprobs + row), entropy,
        tl.load(row_maxes + row), tl.load(row_logsums + row), grad_logprob, grad_entropy, temperature, V,
        HAS_ENTROPY, BLOCK,
    )  # fmt: skip


def _block(vocabulary: int) -> int:
    return min(BLOCK, triton.next_power_of_2(vocabulary))


def forward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
    stats: list[Tensor],
    gradient: Tensor | None,
) -> None:
    """Fills stats = [logprobs, entropy, row_max, row_logsum], and d logprob / d logits where `gradient` is given."""
    outer, inner, vocabulary = logits.shape
    if outer * inner == 0:
        return
    _forward_kernel[(outer * inner,)](
        logits, targets, mask, *stats, gradient, temperature, vocabulary, inner, logits.stride(0), logits.stride(1),
        HAS_MASK=mask is not None, HAS_ENTROPY=want_entropy, HAS_GRADIENT=gradient is not None,
        BLOCK=_block(vocabulary), num_warps=8,
    )  # fmt: skip


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    stats: list[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    gradient: Tensor,
) -> None:
    """gradient = grad_logprobs * d logprob / d logits + grad_entropy * d entropy / d logits."""
    outer, inner, vocabulary = logits.shape
    if outer * inner == 0:
        return
    _backward_kernel[(outer * inner,)](
        logits, targets, mask, *stats, grad_logprobs, grad_entropy, gradient, temperature, vocabulary, inner,
        logits.stride(0), logits.stride(1), gradient.stride(0), gradient.stride(1),
        HAS_MASK=mask is not None, HAS_LOGPROB=grad_logprobs is not None, HAS_ENTROPY=grad_entropy is not None,
        BLOCK=_block(vocabulary), num_warps=8,
    )  # fmt: skip
