"""token_advantages: advantages of tokens from a group of answers, without a critic.

optimal_token_baseline: with G_t the rewards to go of an answer, p_t the probability of its token, q_t the sum of the
squared probabilities over the vocabulary, and sums over the answers of a group that have a token t,

    w_t = 1 - 2 p_t + q_t,   W_t = w_1 + ... + w_t,   A_t = G_t - sum W_t G_t / (sum W_t + eps)

w_t is the squared norm of the gradient of log p_t by the logits, so that W_t stands for that of the answer up to t, and
the baseline is the one of least variance. Where only one answer of the group goes on it has no baseline.

process_advantages: with r the rewards of the steps of all answers of a group, m and s their mean and standard deviation
(n - 1), and sums over the steps of an answer that end at token t or later,

    A_t = sum (r - m) / (s + eps)

With min_temperature T the rewards of an answer are weighed first, r <- r softmax(-r / T) over its steps: their sum is
then close to the smallest one, and more steps pay nothing.

Float32, float64 for float64; constants of a loss, plain PyTorch. Cost: a few reads and writes of B x T numbers.

Sources: Li et al. 2026, The Optimal Token Baseline (arXiv 2602.07078), with the rule for the last answer of verl 0.9.1;
DeepSeekMath (arXiv 2402.03300), section 4.1.3; Cheng et al. 2025, PURE (arXiv 2504.15275), whose transform is here as
remembered (T 0.1) and whose own baseline is the mean of the group's others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.core import check

OPS: dict[str, tuple[str, ...]] = {}  # plain PyTorch: nothing for a backend to run


def optimal_token_baseline(
    returns: Tensor, logprobs: Tensor, sum_p_squared: Tensor, *, mask: Tensor, group_size: int, eps: float = 1e-8
) -> Tensor:
    """A_t, (B, T), 0 behind the mask, detached.

    returns: (B, T), rewards to go; logprobs: (B, T), nats, of the policy that sampled; sum_p_squared: (B, T); mask:
    (B, T), nonzero counts. Consecutive answers make a group; their tokens stand at the same t.
    Raises ValueError for shapes that do not fit.
    """
    counts = _in_groups(check.shaped("mask", mask, returns.shape, "(B, T)") != 0, group_size)
    logprobs = check.shaped("logprobs", logprobs, returns.shape, "(B, T)").detach()
    norms = 1 - 2 * logprobs.exp() + check.shaped("sum_p_squared", sum_p_squared, returns.shape, "(B, T)").detach()
    energy = torch.where(counts, _in_groups(norms, group_size), 0).cumsum(2) * counts
    to_go = _in_groups(returns.detach(), group_size)
    baseline = (energy * to_go).sum(1, keepdim=True) / (energy.sum(1, keepdim=True) + eps)
    shared = counts.sum(1, keepdim=True) > 1
    advantages = torch.where(counts, to_go - torch.where(shared, baseline, 0), 0)
    return advantages.view(returns.shape)


def process_advantages(
    rewards: Tensor, ends: Tensor, *, mask: Tensor, group_size: int, min_temperature: float | None = None,
    eps: float = 1e-4,
) -> Tensor:  # fmt: skip
    """A_t, (B, T), 0 behind the mask, detached.

    rewards: (B, T), of the steps, read at their last tokens, which are those where `ends` (B, T) is nonzero. mask:
    (B, T), nonzero counts. Consecutive answers make a group. min_temperature: T > 0. Equal rewards give 0.
    Raises ValueError for shapes and values that do not fit.
    """
    ended = check.shaped("ends", ends, rewards.shape, "(B, T)") != 0
    counts = check.shaped("mask", mask, rewards.shape, "(B, T)") != 0
    rewards = torch.where(ended, rewards.detach().to(check.compute_dtype(rewards.dtype)), 0)
    if min_temperature is not None:
        scores = torch.where(ended, -rewards / check.positive("min_temperature", min_temperature), -torch.inf)
        rewards = torch.where(ended, rewards * scores.softmax(1), 0)
    steps, of_group = _in_groups(ended, group_size), _in_groups(rewards, group_size)
    count = steps.sum((1, 2), keepdim=True)
    lowest = torch.where(steps, of_group, torch.inf).amin((1, 2), keepdim=True)
    apart = torch.where(steps, of_group - lowest, 0)  # nothing cancels, equal rewards are exactly 0 apart
    distance = torch.where(steps, apart - apart.sum((1, 2), keepdim=True) / count.clamp(min=1), 0)
    std = (distance.square().sum((1, 2), keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    normed = (distance / (std + eps)).view(rewards.shape)
    return torch.where(counts, normed.flip(1).cumsum(1).flip(1), 0)


def _in_groups(x: Tensor, group_size: int) -> Tensor:
    """(B, T) -> (groups, group_size, T)."""
    if group_size < 1 or x.shape[0] % group_size:
        raise ValueError(f"group_size {group_size} must divide the {x.shape[0]} answers")
    return x.view(-1, group_size, x.shape[1])
