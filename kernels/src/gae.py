"""Returns and advantages by an affine scan over time; formula in rlhf_fast/ops/advantages/gae.py.

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
WARPS = 4


@triton.jit
def _got(reward, value, counts, decay, blend, carry, lanes):
    # What every step gets from the one after it, and what the first one hands on.
    got, _handed, carry = backward(
        tl.where(counts, decay, 1.0), tl.where(counts, decay * reward + blend * value, 0.0), carry, lanes
    )
    return got, carry


@triton.jit
def _gae_kernel(
    rewards,  # (sequences, time) or (time,), last stride 1
    values,  # like rewards, or None
    mask,  # (sequences, time) or (time,) uint8, or None
    cu_seqlens,  # (sequences + 1,) int64, or None
    bootstrap,  # (sequences,), or None
    lams,  # (2, sequences) float64, or None
    advantages,  # (sequences, time) or (time,), or None
    returns,  # (sequences, time) or (time,)
    sequences,
    time,
    reward_stride,
    value_stride,
    gamma: tl.float64,
    lam: tl.float64,
    value_lam: tl.float64,
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    HAS_LAMS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    acc = returns.dtype.element_ty
    if PACKED:
        begin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - begin
        reward_begin = begin
        value_begin = begin
    else:
        begin = sequence * time
        length = tl.full([], time, tl.int64)
        reward_begin = sequence * reward_stride
        value_begin = sequence * value_stride
    gamma = tl.full([], gamma, tl.float64)
    lam = tl.full([], lam, tl.float64)
    value_lam = tl.full([], value_lam, tl.float64)
    if HAS_LAMS:
        lam = tl.load(lams + sequence)
        value_lam = tl.load(lams + sequences + sequence)
    decay = (gamma * lam).to(acc)
    blend = (gamma * (1 - lam)).to(acc)
    value_decay = (gamma * value_lam).to(acc)
    value_blend = (gamma * (1 - value_lam)).to(acc)
    carry = tl.full([], 0.0, acc)
    if HAS_BOOTSTRAP:
        carry = tl.load(bootstrap + sequence) * gamma.to(acc)
    value_carry = carry
    lanes = tl.arange(0, BLOCK)
    for block in range(0, tl.cdiv(length, BLOCK)):
        steps = length - (block + 1) * BLOCK + lanes
        inside = steps >= 0
        counts = inside
        if HAS_MASK:
            counts = inside & (tl.load(mask + begin + steps, mask=inside, other=0) != 0)
        reward = tl.load(rewards + reward_begin + steps, mask=counts, other=0.0).to(acc)
        value = tl.zeros_like(reward)
        if HAS_VALUES:
            value = tl.load(values + value_begin + steps, mask=counts, other=0.0).to(acc)
        got, carry = _got(reward, value, counts, decay, blend, carry, lanes)
        if HAS_VALUES:
            tl.store(advantages + begin + steps, tl.where(counts, (reward + got) - value, 0.0), mask=inside)
        if DECOUPLED:
            got, value_carry = _got(reward, value, counts, value_decay, value_blend, value_carry, lanes)
        tl.store(returns + begin + steps, tl.where(counts, reward + got, 0.0), mask=inside)


def gae(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    value_lam: float | None,
    lams: Tensor | None,
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [advantages, returns], or [returns] without values (then lam must be 1)."""
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else rewards.shape[0]
    time = rewards.shape[-1]
    if sequences * time == 0:
        return
    launch(
        _gae_kernel, (sequences,),
        rewards, values, mask, cu_seqlens, bootstrap, lams, None if values is None else outputs[0], outputs[-1],
        sequences, time, rewards.stride(0), 0 if values is None else values.stride(0), gamma, lam,
        lam if value_lam is None else value_lam, HAS_VALUES=values is not None, HAS_MASK=mask is not None,
        PACKED=packed, HAS_BOOTSTRAP=bootstrap is not None, HAS_LAMS=lams is not None, DECOUPLED=value_lam is not None,
        BLOCK=min(BLOCK, triton.next_power_of_2(time)), num_warps=WARPS,
    )  # fmt: skip
