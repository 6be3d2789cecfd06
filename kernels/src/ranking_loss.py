"""Losses of ranked answers; formulas in rlhf_fast/ops/rewards/ranking_loss.py.

One program per group, tiles of pairs [i, j]. In the second kernel, as what pulls answer i comes from every j, whose
sums the first one has left.
"""

from __future__ import annotations

import triton
import triton.language as tl
from rlhf_fast.kernels.launch import launch
from rlhf_fast.kernels.scalar import log1p, sigmoid, softplus
from torch import Tensor

BLOCK = 32


@triton.jit
def efron(place, size):
    return 1.0 - place / size


@triton.jit
def breslow(place, size):
    return place * 0.0 + 1.0


# What a tied answer still counts when the `place`-th of its tie is drawn; None: every pair by itself.
TIES = {"plackett_luce": efron, "breslow": breslow, "pairwise": None}


@triton.jit
def _group(offsets, group_size, ORDERED: tl.constexpr):
    """(begin, end) of this program's group."""
    group = tl.program_id(0).to(tl.int64)
    if ORDERED:
        return tl.load(offsets + group), tl.load(offsets + group + 1)
    return group * group_size, (group + 1) * group_size


@triton.jit
def _answers(rewards, ranks, order, at, end, ORDERED: tl.constexpr, acc: tl.constexpr):
    """(inside, position, reward, rank) of the answers at `at`; outside of the group both are 0."""
    inside = at < end
    position = at
    if ORDERED:
        position = tl.load(order + at, mask=inside, other=0)
    reward = tl.load(rewards + position, mask=inside, other=0.0).to(acc)
    return inside, position, reward, tl.load(ranks + position, mask=inside, other=0)


@triton.jit
def _apart(x, y):
    """x - y, 0 for equal numbers, -inf among them."""
    return tl.where(x == y, 0.0, x - y)


@triton.jit
def _ranking_kernel(
    rewards,  # (N,)
    ranks,  # (N,) int64
    order,  # (N,) int64: positions sorted by group, or None
    offsets,  # (groups + 1,) int64 into order, or None
    losses,  # (groups,)
    accuracies,  # (groups,)
    gradient,  # (N,): what the answers pull, without what pulls them
    scratch,  # (3, N): greatest reward, sum of the exponentials, what a tie is multiplied by; pairwise: -, pairs, -
    N,
    group_size,
    TIES: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = gradient.dtype.element_ty
    begin, end = _group(offsets, group_size, ORDERED)
    lanes = tl.arange(0, BLOCK)
    pairs = tl.full([], 0.0, acc)
    right = tl.full([], 0.0, acc)
    for first_j in range(begin, end, BLOCK):
        inside_j, _at_j, reward_j, rank_j = _answers(rewards, ranks, order, first_j + lanes, end, ORDERED, acc)
        for first_i in range(begin, end, BLOCK):
            inside_i, _at_i, reward_i, rank_i = _answers(rewards, ranks, order, first_i + lanes, end, ORDERED, acc)
            worse = (rank_i[:, None] > rank_j[None, :]) & inside_i[:, None] & inside_j[None, :]
            pairs += tl.sum(tl.sum(tl.where(worse, 1.0, 0.0).to(acc), 0), 0)
            better = worse & (reward_i[:, None] < reward_j[None, :])
            right += tl.sum(tl.sum(tl.where(better, 1.0, 0.0).to(acc), 0), 0)
    pairs = tl.where(pairs == 0, 1.0, pairs)
    loss = tl.full([], 0.0, acc)
    for first_j in range(begin, end, BLOCK):
        j = first_j + lanes
        inside_j, at_j, reward_j, rank_j = _answers(rewards, ranks, order, j, end, ORDERED, acc)
        greatest = reward_j
        size = tl.zeros([BLOCK], acc)
        place = tl.zeros([BLOCK], acc)
        if TIES is not None:
            for first_i in range(begin, end, BLOCK):
                i = first_i + lanes
                inside_i, _at_i, reward_i, rank_i = _answers(rewards, ranks, order, i, end, ORDERED, acc)
                drawn_from = (rank_i[:, None] >= rank_j[None, :]) & inside_i[:, None]
                here = tl.max(tl.where(drawn_from, reward_i[:, None], float("-inf")), 0)
                greatest = tl.where(here > greatest, here, greatest)
                tied = (rank_i[:, None] == rank_j[None, :]) & inside_i[:, None]
                size += tl.sum(tl.where(tied, 1.0, 0.0).to(acc), 0)
                place += tl.sum(tl.where(tied & (i[:, None] < j[None, :]), 1.0, 0.0).to(acc), 0)
            left = tl.where(inside_j, TIES(place, tl.where(inside_j, size, 1.0)), 1.0)
        others = tl.zeros([BLOCK], acc)
        terms = tl.zeros([BLOCK], acc)
        for first_i in range(begin, end, BLOCK):
            i = first_i + lanes
            inside_i, _at_i, reward_i, rank_i = _answers(rewards, ranks, order, i, end, ORDERED, acc)
            worse = (rank_i[:, None] > rank_j[None, :]) & inside_i[:, None] & inside_j[None, :]
            if TIES is None:
                gap = tl.where(worse, _apart(reward_i[:, None], reward_j[None, :]), 0.0)
                terms += tl.sum(tl.where(worse, softplus(gap), 0.0), 0)
                others += tl.sum(tl.where(worse, sigmoid(gap), 0.0), 0)
            else:
                tied = (rank_i[:, None] == rank_j[None, :]) & (i[:, None] != j[None, :])
                tied = tied & inside_i[:, None] & inside_j[None, :]
                weight = tl.where(worse, 1.0, tl.where(tied, left[None, :], 0.0))
                below = tl.where(worse | tied, _apart(reward_i[:, None], greatest[None, :]), 0.0)
                others += tl.sum(weight * tl.exp(below), 0)
        if TIES is None:
            loss += tl.sum(terms, 0) / pairs
            total = tl.zeros([BLOCK], acc) + pairs
            left = total
        else:
            behind = tl.where(inside_j, _apart(greatest, reward_j), 0.0)
            total = left * tl.exp(-behind) + others
            drawn = tl.where(behind == 0, log1p((left - 1) + others), behind + tl.log(total))
            loss += tl.sum(tl.where(inside_j, drawn, 0.0), 0)
        tl.store(gradient + at_j, -others / total, mask=inside_j)
        tl.store(scratch + at_j, greatest, mask=inside_j)
        tl.store(scratch + N + at_j, total, mask=inside_j)
        tl.store(scratch + 2 * N + at_j, left, mask=inside_j)
    group = tl.program_id(0).to(tl.int64)
    tl.store(losses + group, loss)
    tl.store(accuracies + group, right / pairs)


@triton.jit
def _pull_kernel(
    rewards,  # (N,)
    ranks,  # (N,) int64
    order,  # (N,) int64, or None
    offsets,  # (groups + 1,) int64, or None
    gradient,  # (N,)
    scratch,  # (3, N), see above
    N,
    group_size,
    TIES: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = gradient.dtype.element_ty
    begin, end = _group(offsets, group_size, ORDERED)
    lanes = tl.arange(0, BLOCK)
    for first_i in range(begin, end, BLOCK):
        i = first_i + lanes
        inside_i, at_i, reward_i, rank_i = _answers(rewards, ranks, order, i, end, ORDERED, acc)
        pulled = tl.load(gradient + at_i, mask=inside_i, other=0.0)
        for first_j in range(begin, end, BLOCK):
            j = first_j + lanes
            inside_j, at_j, reward_j, rank_j = _answers(rewards, ranks, order, j, end, ORDERED, acc)
            both = inside_i[:, None] & inside_j[None, :]
            worse = (rank_i[:, None] > rank_j[None, :]) & both
            total = tl.load(scratch + N + at_j, mask=inside_j, other=1.0)
            if TIES is None:
                gap = tl.where(worse, _apart(reward_i[:, None], reward_j[None, :]), 0.0)
                pull = tl.where(worse, sigmoid(gap), 0.0)
            else:
                greatest = tl.load(scratch + at_j, mask=inside_j, other=0.0)
                left = tl.load(scratch + 2 * N + at_j, mask=inside_j, other=0.0)
                tied = (rank_i[:, None] == rank_j[None, :]) & (i[:, None] != j[None, :]) & both
                weight = tl.where(worse, 1.0, tl.where(tied, left[None, :], 0.0))
                pull = weight * tl.exp(tl.where(worse | tied, _apart(reward_i[:, None], greatest[None, :]), 0.0))
            pulled += tl.sum(pull / total[None, :], 1)
        tl.store(gradient + at_i, pulled, mask=inside_i)


def ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    variant: str,
    outputs: list[Tensor],
) -> None:
    """Fills outputs = [loss and accuracy of every group (groups,), gradient (N,)]."""
    losses, accuracies, gradient = outputs
    n, groups = rewards.shape[0], losses.shape[0]
    if groups == 0:
        return
    scratch = gradient.new_empty(3, n)
    block = BLOCK if offsets is not None else min(BLOCK, triton.next_power_of_2(group_size))
    options = {"TIES": TIES[variant], "ORDERED": offsets is not None, "BLOCK": block}
    launch(
        _ranking_kernel, (groups,), rewards, ranks, order, offsets, losses, accuracies, gradient, scratch, n,
        group_size, **options,
    )  # fmt: skip
    launch(_pull_kernel, (groups,), rewards, ranks, order, offsets, gradient, scratch, n, group_size, **options)
