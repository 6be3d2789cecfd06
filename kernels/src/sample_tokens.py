"""One token per row of logits, sampled from the truncated distribution; see rlhf_fast/ops/tokens/sample_tokens.py.

One program per row. The thresholds of top-k and top-p are found exactly, two bits of the order-preserving integer key
of a float at a time, so nothing is sorted; a row stays in the second-level cache between the sweeps. Sums are kept in
float64 in a fixed order: the same inputs give the same bits.
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

BLOCK = 2048


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
def _keys(z):
    """int64 in the order of the floats that they stand for."""
    if z.dtype == tl.float64:
        bits = z.to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = z.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _from(keys, weights, pivot):
    return tl.sum(tl.where(keys >= pivot, weights, 0.0), 0)


@triton.jit
def _mass(logits, V, factor, scale, cap, row_max, pivot, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of exp(z - max z) at keys from `pivot` on."""
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, V, BLOCK):
        z = _below(_load(logits, start, V, scale, cap, SOFTCAP, BLOCK), row_max, factor)
        mass += _from(_keys(z), tl.exp(z).to(tl.float64), pivot)
    return mass


@triton.jit
def _greatest(logits, V, factor, scale, cap, row_max, lowest, enough, COUNT: tl.constexpr, SOFTCAP: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """The greatest key from which on there are `enough` elements (COUNT), or enough mass at keys from `lowest` on."""
    bits: tl.constexpr = 64 if row_max.dtype == tl.float64 else 32
    found = tl.full([], -1, tl.int64) << (bits - 1)
    for step in range(bits // 2):
        unit = tl.full([], 1, tl.int64) << (bits - 2 - 2 * step)
        sum1 = tl.full([], 0.0, tl.float64)
        sum2 = tl.full([], 0.0, tl.float64)
        sum3 = tl.full([], 0.0, tl.float64)
        for start in range(0, V, BLOCK):
            z = _below(_load(logits, start, V, scale, cap, SOFTCAP, BLOCK), row_max, factor)
            keys = _keys(z)
            if COUNT:
                weights = tl.where(start + tl.arange(0, BLOCK) < V, 1.0, 0.0).to(tl.float64)
            else:
                weights = tl.where(keys >= lowest, tl.exp(z), 0.0).to(tl.float64)
            sum1 += _from(keys, weights, found + unit)
            sum2 += _from(keys, weights, found + 2 * unit)
            sum3 += _from(keys, weights, found + 3 * unit)
        held = (sum1 >= enough).to(tl.int64) + (sum2 >= enough).to(tl.int64) + (sum3 >= enough).to(tl.int64)
        found += held * unit
    return found


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

    threshold = tl.full([], -0x8000000000000000, tl.int64)
    full = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)
    kept = full
    if TOP_K:
        enough = tl.full([], 0.0, tl.float64) + top_k
        threshold = _greatest(logits, V, factor, scale, cap, row_max, threshold, enough, True, SOFTCAP, BLOCK)
        kept = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)
    if TOP_P:
        pivot = _greatest(logits, V, factor, scale, cap, row_max, threshold, top_p * kept, False, SOFTCAP, BLOCK)
        threshold = tl.maximum(threshold, pivot)
        kept = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)
    if MIN_P:
        threshold = tl.maximum(threshold, _keys(tl.full([], log_min_p, acc) + 0.0))
        kept = _mass(logits, V, factor, scale, cap, row_max, threshold, SOFTCAP, BLOCK)

    # Inverse of the cumulative distribution in the order of the ids, at one uniform of 53 bits.
    row_id, count = tl.load(row_ids + row), tl.load(step)
    a, b, _, _ = tl.philox(
        tl.load(seed), (row_id & 0xFFFFFFFF).to(tl.uint32), (row_id >> 32).to(tl.uint32),
        (count & 0xFFFFFFFF).to(tl.uint32), (count >> 32).to(tl.uint32),
    )  # fmt: skip
    uniform = ((a >> 5).to(tl.float64) * 67108864.0 + (b >> 6).to(tl.float64)) * 1.1102230246251565e-16
    cumulative = tl.full([], 0.0, tl.float64)
    chosen = tl.full([], V, tl.int32)
    last = tl.full([], 0, tl.int32)  # of those that are kept: rounding may leave the uniform above the whole sum
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _below(_load(logits, start, V, scale, cap, SOFTCAP, BLOCK), row_max, factor)
        weights = tl.where(_keys(z) >= threshold, tl.exp(z), 0.0).to(tl.float64)
        reached = (weights > 0) & (cumulative + tl.cumsum(weights, 0) > uniform * kept)
        chosen = tl.minimum(chosen, tl.min(tl.where(reached, columns, V), 0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, columns, 0), 0))
        cumulative += tl.sum(weights, 0)
    chosen = tl.minimum(chosen, last)
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
        MIN_P=min_p > 0, BLOCK=min(BLOCK, triton.next_power_of_2(vocabulary)),
    )  # fmt: skip
