"""PPO: sample completions, score them, and take a few clipped steps on policy and critic.

Per token the reward is -kl_coef * KL to the reference (k1), plus the score at the last token; advantages come from
GAE with a learned critic. What compares completions instead, without a critic, is grpo.py.
Sources: Schulman et al. 2017 (1707.06347); Ziegler et al. 2019 (1909.08593) for the KL controller.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from torch import Tensor

from rlhf_fast.ops.advantages.gae import gae
from rlhf_fast.ops.advantages.shaped_rewards import shaped_rewards
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.ops.values.value_loss import value_loss
from rlhf_fast.rewards import write_stats
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, clipped, experiences, finish_step, improve, policy_term, reward_kl
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import prepare_rollouts


class AlgorithmConfig(RolloutConfig):
    """PPO's keys."""

    family = "ppo"

    kl_coef: float = Field(0.05, ge=0, description="weight of the KL penalty in the reward")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of GAE")
    whiten_advantages: bool = True
    value_clip_eps: float | None = Field(0.2, gt=0, description="how far the critic may move from its old values")
    critic_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")

    def peak_rate(self, role: str) -> float:
        own = self.critic_learning_rate if role == "critic" else None
        return self.learning_rate if own is None else own


def prepare(config: AlgorithmConfig) -> Job:
    """Policy, reference, reward and the critic, which starts as the reward role where there is one."""
    job = prepare_rollouts(config)
    backbone = job.backbone
    start = "reward" if "reward" in backbone.adapters else None
    backbone.add_adapter(
        "critic", rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
        top_layers=config.top_layers, copy_of=start, seed=config.seed + 1, use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )  # fmt: skip
    backbone.set_dropout("critic", config.lora_dropout)
    backbone.add_head("critic", copy_of=start)
    job.optimizers["critic"] = adamw(backbone.parameters_of("critic"), config)
    return job


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, estimate advantages, update; repeat."""
    for step, experience in experiences(job, config, run):
        estimates = estimate(job, config, experience)
        metrics = improve(job, config, experience, loss_of(job, config, estimates))
        metrics["explained_variance"] = explained_variance(experience, estimates)
        finish_step(job, config, run, step, experience, metrics)


class Estimates(NamedTuple):
    """(B, T) each; values are those of the critic before the update."""

    advantages: Tensor
    returns: Tensor
    values: Tensor


def estimate(job: Job, config: AlgorithmConfig, experience: Experience) -> Estimates:
    """Advantages of the tokens, and what the critic is to learn."""
    assert experience.scores.values is not None
    mask, (kl_coef, kl) = experience.batch.mask, reward_kl(job, experience)
    values = reward_units(job, experience.scores.values) * mask
    rewards = shaped_rewards(experience.final_rewards, kl, mask=mask, kl_coef=kl_coef, clip=config.reward_clip)
    if experience.steps is not None:
        rewards = rewards + clipped(config, experience.steps.rewards)
    advantages, returns = gae(rewards, values, mask=mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Estimates(advantages, returns, values)


def loss_of(job: Job, config: AlgorithmConfig, estimates: Estimates) -> Loss[Rows]:
    """The policy's loss and the critic's: they share a backward, but no parameter."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        advantages, returns, old_values = (x[rows.indices] for x in estimates)
        loss, metrics = policy_term(config, rows, advantages)
        values = reward_units(job, job.backbone.values("critic", rows.hidden["critic"]))
        critic_loss, _ = value_loss(
            values, old_values, returns, mask=rows.mask, clip_eps=config.value_clip_eps, denominator=rows.tokens
        )
        return loss + critic_loss, {**metrics, "policy_loss": loss, "value_loss": critic_loss}

    return loss


def explained_variance(experience: Experience, estimates: Estimates) -> float:
    """Share of the spread of the returns that the critic foresaw: 1 is perfect, 0 no better than a constant."""
    mask = experience.batch.mask.bool()
    residual, spread = (estimates.returns - estimates.values)[mask].var(), estimates.returns[mask].var()
    return float(1 - residual / spread.clamp(min=1e-12))


def reward_units(job: Job, values: Tensor) -> Tensor:
    """A critic that started as the reward role predicts raw scores; put them on the scale that PPO is paid in."""
    if job.rewards is None or job.rewards.adapter is None:
        return values
    return (values - job.rewards.adapter.mean) / job.rewards.adapter.std


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the other roles beside it."""
    save_roles(job, folder, "reference", "critic", "reward")
    if job.rewards is not None and job.rewards.adapter is not None:
        for role in ("critic", "reward"):
            write_stats(folder / role, job.rewards.adapter.mean, job.rewards.adapter.std)
