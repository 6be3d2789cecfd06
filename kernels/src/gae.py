"""Returns and advantages by an affine scan over time; formula in rlhf_fast/ops/gae.py.

One program per sequence, padded or packed, which walks over time from the end in blocks. No atomics: the same inputs
give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _compose(later_scale, later_shift, scale, shift):
    # x -> scale * x + shift after the map of the later steps; a reverse scan hands over the later part first.
    return later_scale * scale, scale * later_shift + shift


@triton.jit
def _gae_kernel(
    rewards,  # (sequences, time) or (time,), last stride 1
    values,  # like rewards, or None
    mask,  # (sequences, time) or (time,) uint8, or None
    cu_seqlens,  # (sequences + 1,) int64, or None
    bootstrap,  # (sequences,), or None
    advantages,  # (sequences, time) or (time,), or None
    returns,  # (sequences, time) or (time,)
    time,
    reward_stride,
    value_stride,
    gamma: tl.float64,
    decay: tl.float64,  # gamma lam
    blend: tl.float64,  # gamma (1 - lam)
    HAS_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
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
    decay = tl.full([], decay, acc)
    blend = tl.full([], blend, acc)
    carry = tl.full([], 0.0, acc)
    if HAS_BOOTSTRAP:
        carry = tl.load(bootstrap + sequence) * tl.full([], gamma, acc)
    lanes = tl.arange(0, BLOCK)
    for block in range(0, tl.cdiv(length, BLOCK)):
        start = length - (block + 1) * BLOCK
        # The maps stand one step early, so that the scan gives every step what its successor hands to it.
        after = start + lanes + 1
        exists = (after >= 0) & (after < length)
        if HAS_MASK:
            exists = exists & (tl.load(mask + begin + after, mask=exists, other=0) != 0)
        shift = decay * tl.load(rewards + reward_begin + after, mask=exists, other=0.0).to(acc)
        if HAS_VALUES:
            shift += blend * tl.load(values + value_begin + after, mask=exists, other=0.0).to(acc)
        scale = tl.where(exists, decay, 1.0)
        scale, shift = tl.associative_scan((scale, tl.where(exists, shift, 0.0)), 0, _compose, reverse=True)
        handed = scale * carry + shift
        carry = tl.sum(tl.where(lanes == 0, handed, 0.0), 0)

        steps = start + lanes
        inside = steps >= 0
        counts = inside
        if HAS_MASK:
            counts = inside & (tl.load(mask + begin + steps, mask=inside, other=0) != 0)
        result = tl.load(rewards + reward_begin + steps, mask=counts, other=0.0).to(acc) + handed
        tl.store(returns + begin + steps, tl.where(counts, result, 0.0), mask=inside)
        if HAS_VALUES:
            result -= tl.load(values + value_begin + steps, mask=counts, other=0.0).to(acc)
            tl.store(advantages + begin + steps, tl.where(counts, result, 0.0), mask=inside)


def gae(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [advantages, returns], or [returns] without values (then lam must be 1)."""
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else rewards.shape[0]
    time = rewards.shape[-1]
    if sequences * time == 0:
        return
    _gae_kernel[(sequences,)](
        rewards, values, mask, cu_seqlens, bootstrap, None if values is None else outputs[0], outputs[-1],
        time, rewards.stride(0), 0 if values is None else values.stride(0), gamma, gamma * lam, gamma * (1 - lam),
        HAS_VALUES=values is not None, HAS_MASK=mask is not None, PACKED=packed,
        HAS_BOOTSTRAP=bootstrap is not None, BLOCK=min(BLOCK, triton.next_power_of_2(time)), num_warps=4,
    )  # fmt: skip
