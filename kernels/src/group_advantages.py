"""Group-relative advantages; formulas in rlhf_fast/ops/advantages/group_advantages.py. One program per group."""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from torch import Tensor

BLOCK = 1024


@triton.jit
def _unit_divisor(count, mean, m2, parameter):
    return count * 0.0 + 1.0


@triton.jit
def _grpo_divisor(count, mean, m2, eps):
    return tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0)) + eps


@triton.jit
def _rloo_divisor(count, mean, m2, parameter):
    return tl.maximum(count - 1.0, 1.0) / tl.maximum(count, 1.0)


@triton.jit
def _pass_at_k_divisor(count, mean, m2, k):
    # Rewards 0 and 1; the probability that some of k drawn answers is right is summed up, since 1 - none would cancel.
    right = tl.floor(count * mean + 0.5)
    wrong = count - right
    none = count * 0.0 + 1.0
    some = count * 0.0
    for j in range(0, k.to(tl.int32)):
        left = tl.maximum(count - j, 1.0)
        some += none * right / left
        none *= tl.maximum(wrong - j, 0.0) / left
    possible = none > 0
    divisor = tl.sqrt(some / tl.where(possible, none, 1.0)) * wrong / tl.maximum(count, 1.0)
    return tl.where(possible, divisor, float("inf"))


DIVISORS = {
    "unit": _unit_divisor,
    "grpo": _grpo_divisor,
    "rloo": _rloo_divisor,
    "pass_at_k": _pass_at_k_divisor,
}


@triton.jit
def _load(rewards, order, at, inside, ORDERED: tl.constexpr, acc: tl.constexpr):
    if ORDERED:
        at = tl.load(order + at, mask=inside, other=0)
    return at, tl.load(rewards + at, mask=inside, other=0.0).to(acc)


@triton.jit
def _group_advantages_kernel(
    rewards,  # (count,)
    weights,  # (count,) of the mean, or None
    order,  # (count,) int64: positions sorted by group, or None
    offsets,  # (groups + 1,) int64 into order, or None
    advantages,  # (count,)
    group_size,
    parameter: tl.float64,
    DIVISOR: tl.constexpr,
    WEIGHTED: tl.constexpr,
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
    weight = tl.full([], 0.0, acc)
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        at, reward = _load(rewards, order, start + lanes, inside, ORDERED, acc)
        distance = tl.where(inside, reward - first, 0.0)
        if WEIGHTED:
            w = tl.load(weights + at, mask=inside, other=0.0)
            distance = distance * w
            weight += tl.sum(w, 0)
        total += tl.sum(distance, 0)
    if not WEIGHTED:
        weight = count
    mean = total / tl.where(weight == 0, 1.0, weight)
    m2 = tl.full([], 0.0, acc)
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        _, reward = _load(rewards, order, start + lanes, inside, ORDERED, acc)
        distance = tl.where(inside, (reward - first) - mean, 0.0)
        m2 += tl.sum(distance * distance, 0)
    divisor = DIVISOR(count, first + mean, m2, tl.full([], parameter, acc))
    divisor = tl.where(divisor == 0, 1.0, divisor)  # without eps, a group of equal rewards
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        at, reward = _load(rewards, order, start + lanes, inside, ORDERED, acc)
        distance = (reward - first) - mean
        tl.store(advantages + at, distance / divisor, mask=inside)


def group_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    divisor: str,
    parameter: float,
    advantages: Tensor,
) -> None:
    """Fills advantages; groups of group_size in order, or those of (order, offsets)."""
    groups = rewards.shape[0] // group_size if offsets is None else offsets.shape[0] - 1
    if groups == 0:
        return
    block = 128 if offsets is not None else min(BLOCK, triton.next_power_of_2(group_size))
    launch(
        _group_advantages_kernel, (groups,),
        rewards, weights, order, offsets, advantages, group_size, parameter, DIVISOR=DIVISORS[divisor],
        WEIGHTED=weights is not None, ORDERED=offsets is not None, BLOCK=block, num_warps=4 if block > 64 else 1,
    )  # fmt: skip
