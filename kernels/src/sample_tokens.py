"""One token per row of logits, sampled from the truncated distribution; see rlhf_fast/ops/tokens/sample_tokens.py.

One program per row. The thresholds of top-k and top-p are found exactly by a search that sums from three candidates on
in each sweep, so nothing is sorted; a row stays in the second-level cache between the sweeps. Sums are kept in float64,
lane by lane and then over the lanes: the same inputs give the same bits, and more elements never a smaller sum.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import log1p, product
from rlhf_fast.kernels.transform import capped, row_factor
from torch import Tensor

BLOCK, WARPS = 4096, 32
LOG2E = tl.constexpr(1.4426950408889634)
ROUNDING = tl.constexpr(1e-12)  # more than that of a sum of float64 over a vocabulary, relative


@triton.jit
def _load(logits, start, V, scale, cap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """The capped logits of the block from `start` on, -inf behind the vocabulary."""
    columns = start + tl.arange(0, BLOCK)
    x = tl.load(logits + columns, mask=columns < V, other=0.0).to(scale.dtype)
    return tl.where(columns < V, capped(x, scale, cap, SOFTCAP), -float("inf"))


@triton.jit
def _below(s, top, factor):
    """z - max z. The factor of a tiny temperature takes differences alone to infinity; + 0: one key for both zeros."""
    return product(s - top, factor) + 0.0


@triton.jit
def _key(z):
    """int64 in the order of the floats that they stand for."""
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = z.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _float(key, dtype: tl.constexpr):
    """The float that a key stands for."""
    if dtype == tl.float64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        bits = key.to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(z, lowest):
    """exp(z) from `lowest` on, else 0"""
    return tl.where(z >= lowest, tl.exp2(z * LOG2E), 0.0).to(tl.float64)


@triton.jit
def _mass(logits, V, factor, scale, cap, row_max, lowest, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of exp(z - max z) from `lowest` on."""
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        mass += _weights(_below(_load(logits, start, V, scale, cap, SOFTCAP, BLOCK), row_max, factor), lowest)
    return tl.sum(mass, 0)


@triton.jit
def _greatest(logits, V, factor, scale, cap, row_max, lowest, low, enough, COUNT: tl.constexpr, SOFTCAP: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """(the greatest z from which on there is enough, how much there is)

    Of elements (COUNT) or of the mass from `lowest` on; there is enough from `low` on.
    """
    dtype: tl.constexpr = row_max.dtype
    binades: tl.constexpr = (1 << 54) if dtype == tl.float64 else (1 << 25)  # four: how many keys
    low = _key(low)
    high = tl.full([], 1, tl.int64)  # there is not enough from it on; the key of the maximum is 0
    first = low
    held = tl.full([], 0.0, tl.float64)
    while high - low > 1:
        # Halves of the floats and of the keys while these are far apart, then thirds.
        half = _key(0.5 * _float(low, dtype) + 0.5 * _float(high, dtype))
        wide = high - low > binades
        second = tl.where(wide, half, low + (high - low) // 3)
        third = tl.where(wide, low + (high - low) // 2, low + 2 * (high - low) // 3)
        start_at, pivot1, pivot2, pivot3 = (
            _float(low, dtype), _float(first, dtype), _float(second, dtype), _float(third, dtype)
        )  # fmt: skip
        sum1 = tl.zeros([BLOCK], tl.float64)
        sum2 = tl.zeros([BLOCK], tl.float64)
        sum3 = tl.zeros([BLOCK], tl.float64)
        least = tl.full([BLOCK], float("inf"), dtype)
        for start in range(0, V, BLOCK):
            z = _below(_load(logits, start, V, scale, cap, SOFTCAP, BLOCK), row_max, factor)
            if COUNT:
                weights = tl.where(start + tl.arange(0, BLOCK) < V, 1.0, 0.0).to(tl.float64)
            else:
                weights = _weights(z, lowest)
            sum1 += tl.where(z >= pivot1, weights, 0.0)
            sum2 += tl.where(z >= pivot2, weights, 0.0)
            sum3 += tl.where(z >= pivot3, weights, 0.0)
            least = tl.minimum(least, tl.where(z >= start_at, z, float("inf")))
        low, high, held = _narrowed(low, high, held, first, tl.sum(sum1, 0), enough)
        low, high, held = _narrowed(low, high, held, second, tl.sum(sum2, 0), enough)
        low, high, held = _narrowed(low, high, held, third, tl.sum(sum3, 0), enough)
        # Up to the least element there are none, and where there is not enough above it, it is what is looked for.
        low = tl.maximum(low, tl.minimum(_key(tl.min(least, 0)), high - 1))
        first = low + 1
    return _float(low, dtype), held


@triton.jit
def _narrowed(low, high, held, pivot, total, enough):
    """The range and what there is from `low` on, given the total from a pivot on."""
    holds = total >= enough
    rises = holds & (pivot >= low)
    held = tl.where(rises, total, held)
    low = tl.where(rises, pivot, low)
    high = tl.where(holds, high, tl.minimum(high, pivot))
    return low, high, held


@triton.jit
def _sample_kernel(
    logits,  # (rows, V), last stride 1
    temperatures,  # (rows,) or None
    row_ids,  # (rows,) int64
    seed,  # () int64
    step,  # () int64
    ids,  # (rows,) int64
    logprobs,  # (rows,)
    full_logprobs,  # (rows,)
    temperature: tl.float64,
    logit_scale: tl.float64,
    softcap: tl.float64,
    top_p: tl.float64,
    log_min_p: tl.float64,
    top_k,
    V,
    row_stride,
    HAS_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc = logprobs.dtype.element_ty
    logits += row * row_stride
    factor = row_factor(temperatures, row, temperature, logit_scale, acc, HAS_TEMPERATURES, SOFTCAP)
    scale = tl.full([], logit_scale, acc)
    cap = tl.full([], softcap, acc)

    row_max = tl.full([], -float("inf"), acc)
    invalid = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        s = _load(logits, start, V, scale, cap, SOFTCAP, BLOCK)
        invalid += tl.sum((s != s).to(tl.int32), 0)
        row_max = tl.maximum(row_max, tl.max(s, 0))
    if (invalid > 0) | (tl.abs(row_max) == float("inf")):
        tl.store(ids + row, 0)
        tl.store(logprobs + row, float("nan"))
        tl.store(full_logprobs + row, float("nan"))
        return

    threshold = tl.full([], -float("inf"), acc)
    full = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)
    kept = full
    if TOP_K:
        enough = tl.full([], 0.0, tl.float64) + top_k
        threshold, _ = _greatest(
            logits, V, factor, scale, cap, row_max, threshold, threshold, enough, True, SOFTCAP, BLOCK
        )
        kept = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)
    if TOP_P:
        # Below it V elements cannot hold what may be left out.
        low = threshold
        if 1.0 - top_p > ROUNDING:
            low = tl.maximum(low, (tl.log((1.0 - top_p) * kept / V) - 1.0).to(acc))
        threshold, kept = _greatest(
            logits, V, factor, scale, cap, row_max, threshold, low, top_p * kept, False, SOFTCAP, BLOCK
        )
    if MIN_P:
        threshold = tl.maximum(threshold, tl.full([], log_min_p, acc))
        kept = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)

    # Inverse of the cumulative distribution in the order of the ids, at one uniform of 53 bits.
    row_id, count = tl.load(row_ids + row), tl.load(step)
    a, b, _, _ = tl.philox(
        tl.load(seed), (row_id & 0xFFFFFFFF).to(tl.uint32), (row_id >> 32).to(tl.uint32),
        (count & 0xFFFFFFFF).to(tl.uint32), (count >> 32).to(tl.uint32),
    )  # fmt: skip
    uniform = ((a >> 5).to(tl.float64) * 67108864.0 + (b >> 6).to(tl.float64)) * 1.1102230246251565e-16
    # Its block and what comes before it; or the last with anything, for rounding may leave the uniform above all.
    cumulative = tl.full([], 0.0, tl.float64)
    before = tl.full([], 0.0, tl.float64)
    block = tl.full([], 0, tl.int32)
    searching = True
    for start in range(0, V, BLOCK):
        z = _below(_load(logits, start, V, scale, cap, SOFTCAP, BLOCK), row_max, factor)
        mass = tl.sum(_weights(z, threshold), 0)
        if searching & (mass > 0):
            before = cumulative
            block = start
            searching = cumulative + mass <= uniform * kept
        cumulative += mass
    columns = block + tl.arange(0, BLOCK)
    weights = _weights(_below(_load(logits, block, V, scale, cap, SOFTCAP, BLOCK), row_max, factor), threshold)
    reached = (weights > 0) & (before + tl.cumsum(weights, 0) > uniform * kept)
    chosen = tl.min(tl.where(reached, columns, V), 0)
    chosen = tl.minimum(chosen, tl.max(tl.where(weights > 0, columns, 0), 0))
    below = _below(capped(tl.load(logits + chosen).to(acc), scale, cap, SOFTCAP), row_max, factor).to(tl.float64)
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(logprobs + row, (below - log1p(kept - 1.0)).to(acc))
    tl.store(full_logprobs + row, (below - log1p(full - 1.0)).to(acc))


def sample(
    logits: Tensor,
    transform: Any,
    row_ids: Tensor,
    seed: Tensor,
    step: Tensor,
    top_k: int,
    top_p: float,
    min_p: float,
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [ids, logprobs, full_logprobs], (rows,) each."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    temperature, temperatures, logit_scale, softcap = transform
    launch(
        _sample_kernel, (rows,),
        logits, temperatures, row_ids, seed, step, *outputs, temperature, logit_scale, softcap, top_p,
        math.log(min_p) if min_p > 0 else 0.0, top_k, vocabulary, logits.stride(0),
        HAS_TEMPERATURES=temperatures is not None, SOFTCAP=softcap > 0, TOP_K=top_k < vocabulary, TOP_P=top_p < 1,
        MIN_P=min_p > 0, BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)), num_warps=WARPS,
    )  # fmt: skip
