"""Per-token rewards out of scores and KL estimates; formula in rlhf_fast/ops/advantages/shaped_rewards.py.

One program per row, which walks over time from the end, so that the last valid token is the first it meets.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import product
from torch import Tensor

BLOCK = 1024


@triton.jit
def _shaped_rewards_kernel(
    scores,  # (batch,)
    kl,  # (batch, time), last stride 1
    mask,  # (batch, time) uint8
    rewards,  # (batch, time)
    time,
    kl_stride,
    kl_coef: tl.float64,
    clip: tl.float64,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    acc = rewards.dtype.element_ty
    kl_coef = tl.full([], kl_coef, acc)
    clip = tl.full([], clip, acc)
    score = tl.load(scores + row)
    score = tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))  # NaN stays NaN
    pending = True  # the last valid token is still to come
    for block in range(0, tl.cdiv(time, BLOCK)):
        steps = time - (block + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = steps >= 0
        counts = inside & (tl.load(mask + row * time + steps, mask=inside, other=0) != 0)
        value = product(-kl_coef, tl.load(kl + row * kl_stride + steps, mask=counts, other=0.0).to(acc))
        last = tl.max(tl.where(counts, steps, -1), 0)
        value = tl.where(counts & pending & (steps == last), value + score, value)
        pending = pending & (last < 0)
        tl.store(rewards + row * time + steps, tl.where(counts, value, 0.0), mask=inside)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, clip: float, rewards: Tensor) -> None:
    """Fills rewards; clip is infinity for none."""
    batch, time = kl.shape
    if batch * time == 0:
        return
    launch(
        _shaped_rewards_kernel, (batch,),
        scores, kl, mask, rewards, time, kl.stride(0), kl_coef, clip,
        BLOCK=min(BLOCK, triton.next_power_of_2(time)), num_warps=4,
    )  # fmt: skip
