"""PPO: sample completions, score them, and take a few clipped steps on policy and critic.

Per token the reward is -kl_coef * KL to the reference (k1), plus the score at the last token; advantages come from
GAE with a learned critic (`advantage: gae`) or from the other completions of the prompt (`advantage: group`).
Sources: Schulman et al. 2017 (1707.06347); Ziegler et al. 2019 (1909.08593) for the KL controller.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.ops.advantages.gae import gae
from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.advantages.kl_controller import AdaptiveKLController, FixedKLController
from rlhf_fast.ops.advantages.shaped_rewards import shaped_rewards
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.ops.policy.policy_loss import policy_loss
from rlhf_fast.ops.values.value_loss import value_loss
from rlhf_fast.rewards import write_stats
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import prepare_rollouts


class AlgorithmConfig(RolloutConfig):
    """PPO's keys."""

    advantage: Literal["gae", "group"] = Field("gae", description="group: no critic; needs num_generations > 1")
    kl_coef: float = Field(0.05, ge=0, description="weight of the KL penalty in the reward")
    kl_target: float | None = Field(None, gt=0, description="adapt kl_coef to this KL, in nats per completion")
    kl_horizon: float = Field(10_000, gt=0, description="completions over which kl_coef adapts")
    reward_clip: float | None = Field(None, gt=0, description="bound on the absolute score of a completion")
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    value_clip_eps: float | None = Field(0.2, gt=0)
    critic_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")
    entropy_coef: float = Field(0.0, ge=0)

    def peak_rate(self, role: str) -> float:
        own = self.critic_learning_rate if role == "critic" else None
        return self.learning_rate if own is None else own

    @property
    def scores_policy(self) -> bool:
        return super().scores_policy or self.kl_coef > 0  # a penalty needs its log-probabilities before the update


def prepare(config: AlgorithmConfig) -> Job:
    """Policy, reference, reward and (for gae) the critic, which starts as the reward role where there is one."""
    if config.advantage == "group" and config.num_generations < 2:
        raise UserError(f"advantage: group compares completions: num_generations is {config.num_generations}, needs 2")
    job = prepare_rollouts(config)
    backbone = job.backbone
    if config.advantage == "gae":
        start = "reward" if "reward" in backbone.adapters else None
        backbone.add_adapter(
            "critic", rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
            top_layers=config.top_layers, copy_of=start, seed=config.seed + 1, use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )  # fmt: skip
        backbone.set_dropout("critic", config.lora_dropout)
        backbone.add_head("critic", copy_of=start)
        job.optimizers["critic"] = adamw(backbone.parameters_of("critic"), config)
    job.kl_controller = (
        FixedKLController(config.kl_coef)
        if config.kl_target is None
        else AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    )
    return job


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, estimate advantages, update; repeat."""
    for step, experience in experiences(job, config, run):
        estimates = estimate(job, config, experience)
        metrics = improve(job, config, experience, loss_of(job, config, estimates))
        if estimates.returns is not None:
            metrics["explained_variance"] = explained_variance(experience, estimates)
        finish_step(job, config, run, step, experience, metrics)


class Estimates(NamedTuple):
    """advantages, returns, values: (B, T) each, or advantages (B, 1) alone with `advantage: group`."""

    advantages: Tensor
    returns: Tensor | None = None
    values: Tensor | None = None


def estimate(job: Job, config: AlgorithmConfig, experience: Experience) -> Estimates:
    """Advantages of the tokens, and what the critic is to learn."""
    assert job.kl_controller is not None
    mask, kl_coef = experience.batch.mask, job.kl_controller.coefficient
    kl = experience.kl if kl_coef else torch.zeros_like(experience.scores.ref_logprobs)
    if config.advantage == "group":
        scores = experience.rewards
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        totals = scores - kl_coef * kl.sum(1)
        return Estimates(group_advantages(totals, group_size=config.num_generations)[:, None])
    assert experience.scores.values is not None
    values = reward_units(job, experience.scores.values) * mask
    rewards = shaped_rewards(experience.rewards, kl, mask=mask, kl_coef=kl_coef, clip=config.reward_clip)
    advantages, returns = gae(rewards, values, mask=mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Estimates(advantages, returns, values)


def loss_of(job: Job, config: AlgorithmConfig, estimates: Estimates) -> Loss[Rows]:
    """The policy's loss, and the critic's where there is one: they share a backward, but no parameter."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = policy_loss(
            rows.logprobs, rows.old_logprobs, estimates.advantages[rows.indices], objective=config.objective,
            mask=rows.mask, denominator=rows.tokens, sequences=rows.sequences,
        )  # fmt: skip
        entropy = rows.entropy.sum() / rows.tokens
        metrics |= {"policy_loss": loss, "entropy": entropy}
        # Its gradient makes the head's products a second time: asked for only where it has a weight.
        total = loss - config.entropy_coef * entropy if config.entropy_coef else loss
        if estimates.returns is not None and estimates.values is not None:
            values = reward_units(job, job.backbone.values("critic", rows.hidden["critic"]))
            metrics["value_loss"], _ = value_loss(
                values, estimates.values[rows.indices], estimates.returns[rows.indices], mask=rows.mask,
                clip_eps=config.value_clip_eps, denominator=rows.tokens,
            )  # fmt: skip
            total = total + metrics["value_loss"]
        return total, metrics

    return loss


def explained_variance(experience: Experience, estimates: Estimates) -> float:
    """Share of the spread of the returns that the critic foresaw: 1 is perfect, 0 no better than a constant."""
    assert estimates.returns is not None
    assert estimates.values is not None
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
            if role in job.backbone.adapters:
                write_stats(folder / role, job.rewards.adapter.mean, job.rewards.adapter.std)
