"""What tokens are paid, on one scale throughout a run: by the mean and the deviation of all rewards so far.

Source: the reward scaling and normalisation of PPO-max, Zheng et al. 2023 (2307.04964), section 5.3.1, whose code takes
a batch into the statistics before it divides by them.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from rlhf_fast.ops.advantages.shaped_rewards import shaped_rewards
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience
from rlhf_fast.training.job import Job
from rlhf_fast.training.on_policy import clipped


class RewardScaleConfig(RolloutConfig):
    """The keys of it; reward_clip comes after normalize_rewards, whiten_rewards after both."""

    normalize_rewards: Literal["scale", "standardize"] | None = Field(
        None, description="scale: rewards over their running std; standardize: less their running mean too"
    )
    whiten_rewards: bool = Field(False, description="rewards of tokens, KL included, over their std in the batch")


def follow_rewards(job: Job, rewards: Tensor) -> None:
    """Take the rewards of a batch of completions, (B,), into the statistics, which are among the counters."""
    count, mean, m2 = (job.counters.get(f"reward_{name}", 0.0) for name in ("count", "mean", "m2"))
    added = rewards.double()
    distance, total = float(added.mean()) - mean, count + len(added)
    m2 += float((added - added.mean()).square().sum()) + distance**2 * count * len(added) / total
    mean += distance * len(added) / total
    job.counters.update(reward_count=total, reward_mean=mean, reward_m2=m2)


def reward_scale(job: Job, config: RewardScaleConfig) -> tuple[float, float]:
    """(shift, scale): a completion's reward r counts as (r - shift) / scale. A deviation of 0 counts as 1."""
    if config.normalize_rewards is None:
        return 0.0, 1.0
    count, mean, m2 = (job.counters[f"reward_{name}"] for name in ("count", "mean", "m2"))
    return mean if config.normalize_rewards == "standardize" else 0.0, (m2 / (count - 1)) ** 0.5 if m2 > 0 else 1.0


def token_rewards(job: Job, config: RewardScaleConfig, experience: Experience, kl_coef: float, kl: Tensor) -> Tensor:
    """(B, T): -kl_coef kl, what a step that ends at the token is paid, and at the last token the rest."""
    shift, scale = reward_scale(job, config)
    final, mask = (experience.final_rewards - shift) / scale, experience.batch.mask
    rewards = shaped_rewards(final, kl, mask=mask, kl_coef=kl_coef, clip=config.reward_clip)
    if experience.steps is not None:
        rewards = rewards + clipped(config, experience.steps.rewards / scale)
    return whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
