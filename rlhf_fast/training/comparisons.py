"""Advantages of tokens, (B, T), from completions that are compared with others.

What is paid at a token and later counts there: to_go_t = score - kl_coef sum over s >= t of KL_s.

    reinforce_pp            to_go of the rewards, whitened over the batch's tokens
    reinforce_baseline      the same of the rewards less their group's mean
    remax                   to_go of the rewards less that of the greedy completion of the same prompt
    optimal_token_baseline, process    ops/advantages/token_advantages

Sources: REINFORCE++ and its baseline form, Hu et al. 2025 (arXiv 2501.03262), whitened over tokens as in the code
of its authors (OpenRLHF) and in verl; ReMax, Li et al. 2023 (arXiv 2310.10505), algorithm 1 and its code.
"""

from collections.abc import Callable

from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.ops.advantages.gae import discounted_returns
from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.advantages.shaped_rewards import shaped_rewards
from rlhf_fast.ops.advantages.token_advantages import optimal_token_baseline, process_advantages
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, collect
from rlhf_fast.training.job import Job
from rlhf_fast.training.on_policy import clipped, paid, reward_kl


def to_go(job: Job, config: RolloutConfig, experience: Experience, scores: Tensor) -> Tensor:
    """(B, T): at each token, the scores (B,) less kl_coef times the KL of this and the later tokens."""
    mask, (kl_coef, kl) = experience.batch.mask, reward_kl(job, experience)
    return discounted_returns(shaped_rewards(scores, kl, mask=mask, kl_coef=kl_coef), mask=mask)


def reinforce_pp(job: Job, config: RolloutConfig, experience: Experience) -> Tensor:
    scores = clipped(config, experience.rewards)
    return whiten(to_go(job, config, experience, scores), experience.batch.mask)


def reinforce_baseline(job: Job, config: RolloutConfig, experience: Experience) -> Tensor:
    rewards = clipped(config, experience.rewards)
    scores = group_advantages(rewards, group_size=config.num_generations, variant="dr_grpo")
    return whiten(to_go(job, config, experience, scores), experience.batch.mask)


def remax(job: Job, config: RolloutConfig, experience: Experience) -> Tensor:
    """The baseline is what the greedy completion of the prompt is paid, without a KL."""
    prompts = experience.rollout.prompts[:: config.num_generations]
    greedy = paid(job, collect(job, config.model_copy(update={"top_k": 1}), prompts, score_policy=False))
    baseline = clipped(config, greedy.rewards).repeat_interleave(config.num_generations)
    scores = group_advantages(clipped(config, experience.rewards), variant="remax", baseline_rewards=baseline)
    return to_go(job, config, experience, scores)


def token_baseline(job: Job, config: RolloutConfig, experience: Experience) -> Tensor:
    assert experience.scores.logprobs is not None
    assert experience.scores.collisions is not None
    returns = to_go(job, config, experience, clipped(config, experience.final_rewards))
    if experience.steps is not None:
        returns = returns + discounted_returns(clipped(config, experience.steps.rewards), mask=experience.batch.mask)
    return optimal_token_baseline(
        returns, experience.scores.logprobs, experience.scores.collisions, mask=experience.batch.mask,
        group_size=config.num_generations,
    )  # fmt: skip


def process(job: Job, config: RolloutConfig, experience: Experience, *, min_temperature: float | None) -> Tensor:
    """Of the steps, and of what is paid at the end, each compared by itself."""
    if experience.steps is None:
        raise UserError("advantage process compares steps, and no reward pays any: it returns a list for a completion")
    weight, kl = reward_kl(job, experience)
    outcomes = clipped(config, experience.final_rewards) - weight * kl.sum(1)
    of_outcomes = group_advantages(outcomes, group_size=config.num_generations, variant="grpo")
    return of_outcomes[:, None] + process_advantages(
        experience.steps.rewards, experience.steps.ends, mask=experience.batch.mask,
        group_size=config.num_generations, min_temperature=min_temperature,
    )  # fmt: skip


OF_TOKENS: dict[str, Callable[..., Tensor]] = {
    "reinforce_pp": reinforce_pp, "reinforce_baseline": reinforce_baseline, "remax": remax,
    "optimal_token_baseline": token_baseline, "process": process,
}  # fmt: skip
