"""PPO: sample completions, score them, and take a few clipped steps on policy and critic.

Per token the reward is -kl_coef * KL to the reference, plus what a step that ends there is paid, plus the score at the
last token; advantages come from GAE with a learned critic. kl_variant says which KL: an estimate from the sampled token
or, exact, the one over the whole vocabulary, which varies less. Weighted with the gradient of its own token's
log-probability only k1 gives the gradient of the KL (an exact one gives 0), so a token's own KL counts as k1 in its own
advantage, whatever the tokens before it and the critic see. What compares completions, without a critic, is grpo.py.
Sources: Schulman et al. 2017 (1707.06347); Ziegler et al. 2019 (1909.08593) for the KL controller; for the lambdas
ops/advantages/gae.py.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.ops.advantages.gae import gae, length_adaptive_lambda
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.rewards import write_stats
from rlhf_fast.training.critic import (
    CriticConfig,
    add_critic,
    critic_term,
    critic_values,
    explained_variance,
    reads,
    save_critic,
)
from rlhf_fast.training.experience import Experience, evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve, policy_term, reward_kl
from rlhf_fast.training.optim import Term, Terms
from rlhf_fast.training.ptx import PtxConfig, add_ptx, ptx_term
from rlhf_fast.training.reward_scale import RewardScaleConfig, follow_rewards, token_rewards
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import prepare_rollouts


class AlgorithmConfig(CriticConfig, RewardScaleConfig, PtxConfig):
    """PPO's keys."""

    family = "ppo"

    kl_coef: float = Field(0.05, ge=0, description="weight of the KL penalty in the reward")
    kl_variant: Literal["k1", "k2", "k3", "exact"] = Field("k1", description="how that KL is estimated, see ppo.py")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE")
    critic_lam: float | None = Field(None, ge=0, le=1, description="lambda of what the critic learns; default: lam")
    length_adaptive_alpha: float | None = Field(
        None, gt=0, description="in place of lam: 1 - 1 / (alpha times the completion's length), VAPO's 0.05"
    )
    whiten_advantages: bool = True

    @model_validator(mode="after")
    def _has_one_scale(self) -> "AlgorithmConfig":
        if self.whiten_rewards and self.kl_variant != "k1":
            raise ValueError(f"whiten_rewards is for kl_variant k1, got {self.kl_variant}")
        return self


def prepare(config: AlgorithmConfig) -> Job:
    """Policy, reference, reward, the critic, and what is learnt beside."""
    job = prepare_rollouts(config)
    add_critic(job, config)
    add_ptx(job, config)
    return job


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, estimate advantages, update; repeat."""
    beside = partial(ptx_term, job, config) if job.pretraining else None
    exact_kl = config.kl_variant == "exact" and config.kl_coef > 0
    for step, experience in experiences(job, config, run, exact_kl=exact_kl):
        warming = step < config.critic_warmup_steps
        if config.normalize_rewards is not None:
            follow_rewards(job, experience.rewards)
        estimates = estimate(job, config, experience)
        loss = loss_of(job, config, estimates, warming=warming)
        metrics = improve(job, config, experience, loss, beside=None if warming else beside)
        metrics["explained_variance"] = explained_variance(*estimates[1:], experience.batch.mask)
        finish_step(job, config, run, step, experience, metrics, moved=not warming)


class Estimates(NamedTuple):
    """(B, T) each; values are those of the critic before the update."""

    advantages: Tensor
    returns: Tensor
    values: Tensor


def estimate(job: Job, config: AlgorithmConfig, experience: Experience) -> Estimates:
    """Advantages of the tokens, and what the critic is to learn."""
    assert experience.scores.values is not None
    mask, (kl_coef, kl) = experience.batch.mask, reward_kl(job, experience, config.kl_variant)
    values = critic_values(job, config, experience.scores.values) * mask
    rewards = token_rewards(job, config, experience, kl_coef, kl)
    alpha = config.length_adaptive_alpha
    lam = config.lam if alpha is None else length_adaptive_lambda(mask.sum(1), alpha)
    advantages, returns = gae(rewards, values, mask=mask, gamma=config.gamma, lam=lam, value_lam=config.critic_lam)
    advantages = advantages + kl_coef * (kl - reward_kl(job, experience)[1])
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Estimates(advantages, returns, values)


def loss_of(job: Job, config: AlgorithmConfig, estimates: Estimates, *, warming: bool = False) -> Terms[Rows]:
    """The policy's loss and the critic's, one after the other where each has a pass of its own. warming: the critic
    alone learns."""
    together = reads(config) == "policy" or job.backbone.shards is not None

    def loss(rows: Rows) -> Iterator[Term]:
        advantages, returns, old_values = (x[rows.indices] for x in estimates)
        policy_loss, metrics = policy_term(config, rows, advantages)
        metrics = {**metrics, "policy_loss": policy_loss.detach()}
        policy_loss = policy_loss.detach() if warming else policy_loss
        if not together:
            yield policy_loss, metrics
        critic_loss, found = critic_term(job, config, rows, old_values, returns, alone=warming)
        yield (policy_loss + critic_loss, {**metrics, **found}) if together else (critic_loss, found)

    return loss


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the other roles beside it."""
    save_roles(job, folder, "reference", "reward")
    if job.rewards is not None and job.rewards.adapter is not None:
        adapter = job.rewards.adapter
        write_stats(folder / "reward", adapter.mean, adapter.std, adapter.outputs_of_first(job.backbone))
    save_critic(job, config, folder)
