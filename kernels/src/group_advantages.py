"""Group-relative advantages; formulas in rlhf_fast/ops/group_advantages.py. One program per group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _grpo_divisor(count, m2, eps):
    return tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0)) + eps


@triton.jit
def _dr_grpo_divisor(count, m2, eps):
    return count * 0.0 + 1.0


@triton.jit
def _rloo_divisor(count, m2, eps):
    return tl.maximum(count - 1.0, 1.0) / tl.maximum(count, 1.0)


DIVISORS = {"grpo": _grpo_divisor, "dr_grpo": _dr_grpo_divisor, "rloo": _rloo_divisor}


@triton.jit
def _load(rewards, order, at, inside, ORDERED: tl.constexpr, acc: tl.constexpr):
    if ORDERED:
        at = tl.load(order + at, mask=inside, other=0)
    return at, tl.load(rewards + at, mask=inside, other=0.0).to(acc)


@triton.jit
def _group_advantages_kernel(
    rewards,  # (count,)
    order,  # (count,) int64: positions sorted by group, or None
    offsets,  # (groups + 1,) int64 into order, or None
    advantages,  # (count,)
    group_size,
    eps: tl.float64,
    DIVISOR: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    acc: tl.constexpr = advantages.dtype.element_ty
    if ORDERED:
        begin = tl.load(offsets + group)
        end = tl.load(offsets + group + 1)
    else:
        begin = group * group_size
        end = begin + group_size
    lanes = tl.arange(0, BLOCK)
    count = (end - begin).to(acc)
    # Distances from the group's first reward: those of equal rewards are exactly 0, and so is their mean.
    _first_at, first = _load(rewards, order, begin, begin < end, ORDERED, acc)
    total = tl.full([], 0.0, acc)
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        _, reward = _load(rewards, order, start + lanes, inside, ORDERED, acc)
        total += tl.sum(tl.where(inside, reward - first, 0.0), 0)
    mean = total / tl.maximum(count, 1.0)
    m2 = tl.full([], 0.0, acc)
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        _, reward = _load(rewards, order, start + lanes, inside, ORDERED, acc)
        distance = tl.where(inside, (reward - first) - mean, 0.0)
        m2 += tl.sum(distance * distance, 0)
    divisor = DIVISOR(count, m2, tl.full([], eps, acc))
    divisor = tl.where(divisor == 0, 1.0, divisor)  # without eps, a group of equal rewards
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        at, reward = _load(rewards, order, start + lanes, inside, ORDERED, acc)
        distance = (reward - first) - mean
        tl.store(advantages + at, distance / divisor, mask=inside)


def group_advantages(
    rewards: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    kind: str,
    eps: float,
    advantages: Tensor,
) -> None:
    """Fills advantages; groups of group_size in order, or those of (order, offsets)."""
    groups = rewards.shape[0] // group_size if offsets is None else offsets.shape[0] - 1
    if groups == 0:
        return
    block = 128 if offsets is not None else min(BLOCK, triton.next_power_of_2(group_size))
    _group_advantages_kernel[(groups,)](
        rewards, order, offsets, advantages, group_size, eps, DIVISOR=DIVISORS[kind],
        ORDERED=offsets is not None, BLOCK=block, num_warps=4 if block > 64 else 1,
    )  # fmt: skip
