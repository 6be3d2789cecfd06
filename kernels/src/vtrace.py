"""V-trace targets and advantages by an affine scan over time; formula in rlhf_fast/ops/advantages/vtrace.py.

One program per sequence, padded or packed, which walks over time from the end in blocks. No atomics: the same inputs
give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scan import backward
from torch import Tensor

BLOCK = 1024


@triton.jit
def _at_most(x, bound):
    return tl.where(x > bound, bound, x)  # NaN stays NaN


@triton.jit
def _load(x, begin, stride, sequence, steps, counts, PACKED: tl.constexpr, acc: tl.constexpr):
    at = begin if PACKED else sequence * stride
    return tl.load(x + at + steps, mask=counts, other=0.0).to(acc)


@triton.jit
def _vtrace_kernel(
    rewards,  # (sequences, time) or (time,), last stride 1
    values,  # like rewards
    logprobs,  # like rewards
    sampler_logprobs,  # like rewards
    mask,  # (sequences, time) or (time,) uint8, or None
    cu_seqlens,  # (sequences + 1,) int64, or None
    bootstrap,  # (sequences,), or None
    advantages,  # (sequences, time) or (time,)
    targets,  # (sequences, time) or (time,)
    time,
    reward_stride,
    value_stride,
    logprob_stride,
    sampler_stride,
    gamma: tl.float64,
    lam: tl.float64,
    rho_clip: tl.float64,
    c_clip: tl.float64,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    acc: tl.constexpr = targets.dtype.element_ty
    if PACKED:
        begin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - begin
    else:
        begin = sequence * time
        length = tl.full([], time, tl.int64)
    gamma = tl.full([], gamma, acc)
    lam = tl.full([], lam, acc)
    rho_clip = tl.full([], rho_clip, acc)
    c_clip = tl.full([], c_clip, acc)
    following = tl.full([], 0.0, acc)  # the value of the next step that counts
    if HAS_BOOTSTRAP:
        following = tl.load(bootstrap + sequence)
    excess = tl.full([], 0.0, acc)  # what the target of that step is above it
    lanes = tl.arange(0, BLOCK)
    for block in range(0, tl.cdiv(length, BLOCK)):
        steps = length - (block + 1) * BLOCK + lanes
        inside = steps >= 0
        counts = inside
        if HAS_MASK:
            counts = inside & (tl.load(mask + begin + steps, mask=inside, other=0) != 0)
        reward = _load(rewards, begin, reward_stride, sequence, steps, counts, PACKED, acc)
        value = _load(values, begin, value_stride, sequence, steps, counts, PACKED, acc)
        ratio = tl.exp(
            _load(logprobs, begin, logprob_stride, sequence, steps, counts, PACKED, acc)
            - _load(sampler_logprobs, begin, sampler_stride, sequence, steps, counts, PACKED, acc)
        )
        rho = _at_most(ratio, rho_clip)
        none = tl.zeros_like(value)
        next_value, _handed, following = backward(tl.where(counts, none, none + 1.0), value, following, lanes)
        scale = tl.where(counts, gamma * lam * _at_most(ratio, c_clip), 1.0)
        shift = tl.where(counts, rho * (reward + gamma * next_value - value), 0.0)
        next_excess, own_excess, excess = backward(scale, shift, excess, lanes)
        advantage = rho * (reward + gamma * (next_value + lam * next_excess) - value)
        tl.store(advantages + begin + steps, tl.where(counts, advantage, 0.0), mask=inside)
        tl.store(targets + begin + steps, tl.where(counts, value + own_excess, 0.0), mask=inside)


def vtrace(
    inputs: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: list[float],
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [advantages, targets]; rates = [gamma, lam, rho_clip, c_clip]."""
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else inputs[0].shape[0]
    time = inputs[0].shape[-1]
    if sequences * time == 0:
        return
    launch(
        _vtrace_kernel, (sequences,),
        *inputs, mask, cu_seqlens, bootstrap, *outputs, time, *(x.stride(0) for x in inputs), *rates,
        HAS_MASK=mask is not None, PACKED=packed, HAS_BOOTSTRAP=bootstrap is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(time)), num_warps=4,
    )  # fmt: skip
