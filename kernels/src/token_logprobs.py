"""Selective log-softmax over rows of logits; formula and numerics in rlhf_fast/ops/tokens/token_logprobs.py.

Forward takes one program per row and reads every logit once. Backward takes one per chunk of a row, reads every logit
once and writes its gradient, also over the logits themselves; as in a copy, programs that run together work on
neighbouring memory. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import expm1, log1p
from rlhf_fast.kernels.transform import capped, capped_slope, row_factor
from torch import Tensor

BLOCK, WARPS = 2048, 4
STAGES = 4  # blocks of a row that are on their way or in use
CHUNK, CHUNK_WARPS = 8192, 8  # what a program differentiates of a row
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_POWER = tl.constexpr(-4096.0)  # where 2^x is 0 in every type: stands in for x = -inf in a product with it


@triton.jit
def _write_zeros(out, first, last, BLOCK: tl.constexpr):
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, tl.zeros([BLOCK], tl.float32), mask=columns < last)


@triton.jit
def _write_gradient(
    first,  # the logits [first, last) of the row are differentiated
    last,
    logits,  # (V,) of this row
    gradient,  # (V,) of this row, may be the logits
    targets,  # (K,) of this row
    logprobs,  # (K,) of this row
    grad_logprobs,  # (K,) of this row
    entropy,
    row_max,
    row_logsum,
    grad_entropy,
    grad_lse,
    factor,
    logit_scale,
    cap,
    K,
    HAS_LOGPROB: tl.constexpr,  # False: no gradient of the log-probabilities
    HAS_UPSTREAM: tl.constexpr,  # False: 1 for each log-probability
    HAS_ENTROPY: tl.constexpr,
    HAS_CAP: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = logprobs.dtype.element_ty
    k = tl.arange(0, K_BLOCK)
    g = tl.zeros([K_BLOCK], acc)
    if HAS_LOGPROB:
        g = tl.where(k < K, 1.0, 0.0).to(acc)
        if HAS_UPSTREAM:
            g = tl.load(grad_logprobs + k, mask=k < K, other=0.0)
    sum_g = tl.sum(g, 0)
    if HAS_LOGPROB:
        ids = tl.load(targets + k, mask=k < K, other=-1)
        inside = (k < K) & (ids >= first) & (ids < last)
        if HAS_CAP:  # before the gradient, which may be the logits, is written
            target_slopes = capped_slope(tl.load(logits + ids, mask=inside, other=0.0).to(acc), logit_scale, cap)
            tl.debug_barrier()

    # As if no element were a target: p (constant + linear log2 p).
    shift = row_max / factor
    factor2 = factor * LOG2E
    logsum2 = row_logsum * LOG2E
    constant = sum_g - grad_lse
    if HAS_ENTROPY:
        constant += grad_entropy * entropy
        linear = -factor * LN2 * grad_entropy
    constant *= -factor
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < last, other=0.0).to(acc)
        log2_p = (capped(x, logit_scale, cap, HAS_CAP) - shift) * factor2 - logsum2
        value = constant
        if HAS_ENTROPY:
            value += linear * tl.maximum(log2_p, NO_POWER)
        value *= tl.exp2(log2_p)
        if HAS_CAP:
            value *= capped_slope(x, logit_scale, cap)
        tl.store(gradient + columns, value.to(gradient.dtype.element_ty), mask=columns < last)

    if HAS_LOGPROB:
        # At the targets, with 1 - p from expm1; equal targets write equal values.
        tl.debug_barrier()
        log_p = tl.load(logprobs + k, mask=k < K, other=0.0)
        elsewhere = tl.zeros([K_BLOCK], acc)
        if K_BLOCK > 1:
            for i in range(0, K):
                g_i = tl.full([], 1.0, acc)
                if HAS_UPSTREAM:
                    g_i = tl.load(grad_logprobs + i)
                elsewhere += tl.where(ids == tl.load(targets + i), 0.0, g_i)
        p = tl.exp(log_p)
        value = sum_g * -expm1(log_p) - elsewhere + grad_lse * p
        if HAS_ENTROPY:
            value -= tl.where(p > 0, grad_entropy * p * (log_p + entropy), 0.0)
        value *= factor
        if HAS_CAP:
            value *= target_slopes
        tl.store(gradient + ids, value.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _added(sums, x, s, factor2, scale, cap, HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
           HAS_SQUARES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The sums of _forward_kernel with a block of logits x, capped: s; -inf in both adds nothing."""
    m, shift, rest, spread, squares = sums
    top = tl.max(x, 0)
    if top > m:  # in few blocks; what follows is all that the others take
        first_lane = tl.where(tl.arange(0, BLOCK) == 0, 1.0, 0.0).to(rest.dtype)
        new_shift = capped(top, scale, cap, HAS_CAP)
        # the first finite maximum: nothing has been counted
        lift = tl.where(m == -float("inf"), 0.0, (shift - new_shift) * factor2)
        e = tl.where(m == -float("inf"), 0.0, tl.exp2(lift))
        leaders = x == top
        ties = tl.sum(leaders.to(rest.dtype), 0) - 1.0
        rest += first_lane
        if HAS_ENTROPY:
            spread = e * (spread + lift * rest)
        if HAS_SQUARES:
            squares = e * e * (squares + first_lane) + first_lane * ties
        rest = e * rest + first_lane * ties
        s = tl.where(leaders, -float("inf"), s)
        m = top
        shift = new_shift
    t = (s - shift) * factor2
    e = tl.exp2(t)
    rest += e
    if HAS_ENTROPY:
        spread += e * tl.maximum(t, NO_POWER)
    if HAS_SQUARES:
        squares += e * e
    return m, shift, rest, spread, squares


@triton.jit
def _forward_kernel(
    logits,  # (outer, inner, V), last stride 1
    targets,  # (outer * inner, K) int64
    mask,  # (outer * inner,) uint8
    temperatures,  # (outer * inner,) float32
    logprobs,  # (outer * inner, K)
    entropies,  # (outer * inner,)
    row_maxes,  # (outer * inner,)
    row_logsums,  # (outer * inner,)
    sums_p_squared,  # (outer * inner,)
    gradient,  # like logits, may be the logits
    temperature: tl.float64,
    logit_scale: tl.float64,
    softcap: tl.float64,
    V,
    K,
    inner,
    outer_stride,
    inner_stride,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc: tl.constexpr = logprobs.dtype.element_ty
    base = (row // inner) * outer_stride + (row % inner) * inner_stride
    k = tl.arange(0, K_BLOCK)
    counts = True
    if HAS_MASK:
        counts = tl.load(mask + row) != 0
    if not counts:
        tl.store(logprobs + row * K + k, tl.zeros([K_BLOCK], acc), mask=k < K)
        tl.store(row_maxes + row, 0.0)
        tl.store(row_logsums + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropies + row, 0.0)
        if HAS_SQUARES:
            tl.store(sums_p_squared + row, 0.0)
        if HAS_GRADIENT:
            _write_zeros(gradient + base, 0, V, BLOCK)
        return

    factor = row_factor(temperatures, row, temperature, logit_scale, acc, HAS_TEMPERATURES, HAS_CAP)
    scale = tl.full([], logit_scale, tl.float64).to(acc)
    cap = tl.full([], softcap, tl.float64).to(acc)
    factor2 = factor * LOG2E

    # The greatest logit m and, with e = exp(z - max z), per lane the sums over all but one maximal element of e
    # (`rest`), e (z - max z) log2(e) (`spread`) and e^2 (`squares`). That element is counted when a greater one comes.
    sums = (
        tl.full([], -float("inf"), acc), tl.full([], 0.0, acc), tl.zeros([BLOCK], acc), tl.zeros([BLOCK], acc),
        tl.zeros([BLOCK], acc),
    )  # fmt: skip
    columns = tl.arange(0, BLOCK)
    whole = V - V % BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        x = tl.load(logits + base + start + columns).to(acc)
        s = capped(x, scale, cap, HAS_CAP)
        sums = _added(sums, x, s, factor2, scale, cap, HAS_CAP, HAS_ENTROPY, HAS_SQUARES, BLOCK)
    if whole < V:
        x = tl.load(logits + base + whole + columns, mask=columns < V - whole, other=-float("inf")).to(acc)
        s = tl.where(columns < V - whole, capped(x, scale, cap, HAS_CAP), -float("inf"))
        sums = _added(sums, x, s, factor2, scale, cap, HAS_CAP, HAS_ENTROPY, HAS_SQUARES, BLOCK)
    m, shift, rest, spread, squares = sums
    r = tl.where(shift == float("inf"), float("nan"), tl.sum(rest, 0))  # inf - inf
    row_logsum = log1p(r)
    row_max = tl.where(m == -float("inf"), m, factor * shift)

    ids = tl.load(targets + row * K + k, mask=k < K, other=-1)
    valid = (ids >= 0) & (ids < V)
    x = tl.load(logits + base + ids, mask=valid, other=float("nan")).to(acc)
    s = capped(x, scale, cap, HAS_CAP)
    below = tl.where(x == m, s - s, (s - shift) * factor)
    tl.store(logprobs + row * K + k, below - row_logsum, mask=k < K)
    tl.store(row_maxes + row, row_max)
    tl.store(row_logsums + row, row_logsum)
    if HAS_ENTROPY:
        tl.store(entropies + row, row_logsum - LN2 * tl.sum(spread, 0) / (1.0 + r))
    if HAS_SQUARES:
        tl.store(sums_p_squared + row, (1.0 + tl.sum(squares, 0)) / ((1.0 + r) * (1.0 + r)))
    if HAS_GRADIENT:
        tl.debug_barrier()  # the targets' logits have been read, their log-probabilities are there to be read
        _write_gradient(
            0, V, logits + base, gradient + base, targets + row * K, logprobs + row * K, logprobs, 0.0, row_max,
            row_logsum, 0.0, 0.0, factor, scale, cap, K, True, False, False, HAS_CAP, K_BLOCK, BLOCK,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    logits,  # (outer, inner, V), last stride 1
    targets,  # (outer * inner, K) int64
    mask,  # (outer * inner,) uint8
    temperatures,  # (outer * inner,) float32
    logprobs,  # (outer * inner, K)
    entropies,  # (outer * inner,)
    row_maxes,  # (outer * inner,)
    row_logsums,  # (outer * inner,)
    grad_logprobs,  # (outer * inner, K)
    grad_entropies,  # (outer * inner,)
    grad_lses,  # (outer * inner,)
    gradient,  # (outer, inner, V), last stride 1, may be the logits
    temperature: tl.float64,
    logit_scale: tl.float64,
    softcap: tl.float64,
    V,
    K,
    inner,
    outer_stride,
    inner_stride,
    grad_outer_stride,
    grad_inner_stride,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LSE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(V, CHUNK)
    row = tl.program_id(0).to(tl.int64) // chunks
    first = (tl.program_id(0) % chunks) * CHUNK
    last = tl.minimum(first + CHUNK, V)
    acc: tl.constexpr = logprobs.dtype.element_ty
    base = (row // inner) * outer_stride + (row % inner) * inner_stride
    out = (row // inner) * grad_outer_stride + (row % inner) * grad_inner_stride
    grad_entropy = tl.full([], 0.0, acc)
    entropy = tl.full([], 0.0, acc)
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropies + row)
        entropy = tl.load(entropies + row)
    grad_lse = tl.full([], 0.0, acc)
    if HAS_LSE:
        grad_lse = tl.load(grad_lses + row)
    counts = (grad_entropy != 0) | (grad_lse != 0)
    if HAS_LOGPROB:
        k = tl.arange(0, K_BLOCK)
        g = tl.load(grad_logprobs + row * K + k, mask=k < K, other=0.0)
        counts = counts | (tl.max((g != 0).to(tl.int32), 0) != 0)
    if HAS_MASK:
        counts = counts & (tl.load(mask + row) != 0)
    if not counts:
        _write_zeros(gradient + out, first, last, CHUNK)
        return
    factor = row_factor(temperatures, row, temperature, logit_scale, acc, HAS_TEMPERATURES, HAS_CAP)
    scale = tl.full([], logit_scale, tl.float64).to(acc)
    cap = tl.full([], softcap, tl.float64).to(acc)
    _write_gradient(
        first, last, logits + base, gradient + out, targets + row * K, logprobs + row * K, grad_logprobs + row * K,
        entropy, tl.load(row_maxes + row), tl.load(row_logsums + row), grad_entropy, grad_lse, factor, scale, cap, K,
        HAS_LOGPROB, True, HAS_ENTROPY, HAS_CAP, K_BLOCK, CHUNK,
    )  # fmt: skip


def _options(logits: Tensor, targets: Tensor, mask: Tensor | None, transform: Any) -> dict[str, Any]:
    per_row = targets.shape[2] if targets.dim() == 3 else 1
    return {
        "HAS_MASK": mask is not None,
        "HAS_TEMPERATURES": transform.temperatures is not None,
        "HAS_CAP": transform.softcap > 0,
        "K_BLOCK": triton.next_power_of_2(per_row),
    }


def _block(most: int, vocabulary: int) -> int:
    return min(most, triton.next_power_of_2(vocabulary))


def forward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    transform: Any,
    want_entropy: bool,
    stats: list[Tensor],
    gradient: Tensor | None,
) -> None:
    """As IMPLS in rlhf_fast/ops/tokens/token_logprobs.py says."""
    outer, inner, vocabulary = logits.shape
    if targets.numel() == 0:
        return
    temperature, temperatures, logit_scale, softcap = transform
    launch(
        _forward_kernel, (outer * inner,),
        logits, targets, mask, temperatures, *stats, gradient, temperature, logit_scale, softcap, vocabulary,
        targets.numel() // (outer * inner), inner, logits.stride(0), logits.stride(1),
        HAS_ENTROPY=want_entropy, HAS_SQUARES=stats[4].numel() > 0, HAS_GRADIENT=gradient is not None,
        BLOCK=_block(BLOCK, vocabulary), STAGES=STAGES, num_warps=WARPS, **_options(logits, targets, mask, transform),
    )  # fmt: skip


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    transform: Any,
    stats: list[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    gradient: Tensor,
) -> None:
    """As IMPLS in rlhf_fast/ops/tokens/token_logprobs.py says."""
    outer, inner, vocabulary = logits.shape
    if targets.numel() == 0:
        return
    temperature, temperatures, logit_scale, softcap = transform
    upstream = stats[0] if grad_logprobs is None else grad_logprobs  # a pointer to add to, not read without HAS_LOGPROB
    chunk = _block(CHUNK, vocabulary)
    launch(
        _backward_kernel, (outer * inner * triton.cdiv(vocabulary, chunk),),
        logits, targets, mask, temperatures, *stats[:4], upstream, grad_entropy, grad_lse, gradient, temperature,
        logit_scale, softcap, vocabulary, targets.numel() // (outer * inner), inner,
        logits.stride(0), logits.stride(1), gradient.stride(0), gradient.stride(1),
        HAS_LOGPROB=grad_logprobs is not None, HAS_ENTROPY=grad_entropy is not None,
        HAS_LSE=grad_lse is not None, CHUNK=chunk, num_warps=CHUNK_WARPS,
        **_options(logits, targets, mask, transform),
    )  # fmt: skip
