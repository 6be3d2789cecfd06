"""PPO: sample completions, score them, and take a few clipped steps on policy and critic.

Per token the reward is -kl_coef * KL to the reference (k1), plus the score at the last token; advantages come from
GAE with a learned critic (`advantage: gae`) or from the other completions of the prompt (`advantage: group`).
Sources: Schulman et al. 2017 (1707.06347); Ziegler et al. 2019 (1909.08593) for the KL controller.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.advantages.gae import gae
from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.advantages.whiten import whiten
from rlhf_fast.ops.policy.policy_loss import policy_loss
from rlhf_fast.ops.rewards.kl_controller import AdaptiveKLController
from rlhf_fast.ops.rewards.shaped_rewards import shaped_rewards
from rlhf_fast.ops.values.value_loss import value_loss
from rlhf_fast.rewards import write_stats
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import (
    Experience,
    collect,
    evaluate_policy,
    minibatches,
    move_reference,
    prompts_of_step,
    rollout_metrics,
    samples_of,
    sum_metrics,
)
from rlhf_fast.training.job import Job, dropout_seed
from rlhf_fast.training.optim import adamw, learning_rate, set_learning_rates, update
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
    job.counters["kl_coef"] = config.kl_coef
    return job


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, estimate advantages, update; repeat."""
    for step in run.steps():
        rates = {"policy": learning_rate(config, step)}
        if "critic" in job.optimizers:
            rates["critic"] = learning_rate(config, step, peak=config.critic_learning_rate)
        set_learning_rates(job, rates)
        # One minibatch has all rows before any step: its log-probabilities are the old ones. A penalty needs them now.
        # With dropout, a minibatch's are not those of the policy that sampled.
        score_policy = config.num_minibatches > 1 or config.kl_coef > 0 or config.lora_dropout > 0
        prompts = prompts_of_step(job, config, step)
        experience = collect(job, config, prompts, score_policy=score_policy, compare_sampler=step == run.start)
        advantages, returns, old_values = estimate(job, config, experience)
        metrics = improve(job, config, experience, advantages, returns, old_values)
        adapt_kl(job, config, float(experience.kl.sum(1).mean()))
        move_reference(job, config, step)
        metrics |= {**rollout_metrics(experience), "kl_coef": job.counters["kl_coef"], "learning_rate": rates["policy"]}
        run.samples(step, samples_of(experience, 2))
        run.log(step, metrics, tokens=int(experience.rollout.batch.attention_mask.sum()))


def estimate(job: Job, config: AlgorithmConfig, experience: Experience) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(advantages, returns, values): (B, T) each, or advantages (B, 1) alone with `advantage: group`."""
    mask, kl_coef = experience.rollout.batch.mask, job.counters["kl_coef"]
    kl = experience.kl if kl_coef else torch.zeros_like(experience.scores.ref_logprobs)
    if config.advantage == "group":
        scores = experience.rewards
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        totals = scores - kl_coef * kl.sum(1)
        return group_advantages(totals, group_size=config.num_generations)[:, None], None, None
    assert experience.scores.values is not None
    values = reward_units(job, experience.scores.values) * mask
    rewards = shaped_rewards(experience.rewards, kl, mask=mask, kl_coef=kl_coef, clip=config.reward_clip)
    advantages, returns = gae(rewards, values, mask=mask, gamma=config.gamma, lam=config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return advantages, returns, values


def improve(
    job: Job,
    config: AlgorithmConfig,
    experience: Experience,
    advantages: Tensor,
    returns: Tensor | None,
    old_values: Tensor | None,
) -> dict[str, float]:
    """The epochs of minibatches; metrics averaged over them."""
    history = []
    for _ in range(config.ppo_epochs):
        for parts in minibatches(config, len(advantages)):
            losses = accumulate(job, config, experience, advantages, returns, old_values, parts)
            norms = update(job, config, {name: losses[name] for name in losses if name.endswith("_loss")})
            history.append({**{name: float(value) for name, value in losses.items()}, **norms})
        if config.early_stop_kl is not None and history[-1]["approx_kl"] > config.early_stop_kl:
            break
    metrics = {name: sum(m[name] for m in history) / len(history) for name in history[0]}
    if returns is not None and old_values is not None:
        mask = experience.rollout.batch.mask.bool()
        # Spread of the returns that the critic foresaw: 1 is perfect, 0 no better than a constant.
        residual, spread = (returns - old_values)[mask].var(), returns[mask].var()
        metrics["explained_variance"] = float(1 - residual / spread.clamp(min=1e-12))
    return metrics


def accumulate(
    job: Job,
    config: AlgorithmConfig,
    experience: Experience,
    advantages: Tensor,
    returns: Tensor | None,
    old_values: Tensor | None,
    parts: tuple[Tensor, ...],
) -> dict[str, Tensor]:
    """Backward of one minibatch, micro-batch by micro-batch. Means are over the whole minibatch."""
    batch, backbone = experience.rollout.batch, job.backbone
    mask = batch.mask[torch.cat(parts)]
    count, sequences = mask.sum(), mask.any(1).sum()
    roles = list(job.optimizers)
    collected, made = [], []
    for rows in parts:
        part = batch.rows(rows)
        lower = None if experience.lower is None else experience.lower[rows]
        hidden = backbone.hidden(
            part.input_ids, part.attention_mask, roles, lower=lower, dropout_seed=dropout_seed(job, config)
        )
        logprobs, entropy = backbone.logprobs(
            hidden["policy"], part.input_ids, part.mask, temperature=config.temperature, return_entropy=True
        )
        loss, metrics = policy_loss(
            logprobs, experience.old_logprobs(rows), advantages[rows], mask=part.mask,
            variant=config.variant, fixed_length=config.max_new_tokens, clip_eps_low=config.clip_eps_low,
            clip_eps_high=config.clip_eps_high, dual_clip=config.dual_clip, denominator=count, sequences=sequences,
        )  # fmt: skip
        entropy = entropy.sum() / count
        metrics |= {"policy_loss": loss, "entropy": entropy}
        # Its gradient makes the head's products a second time: asked for only where it has a weight.
        total = loss - config.entropy_coef * entropy if config.entropy_coef else loss
        if returns is not None and old_values is not None:
            values = reward_units(job, backbone.values("critic", hidden["critic"]))
            critic_loss, _ = value_loss(
                values, old_values[rows], returns[rows], mask=part.mask, clip_eps=config.value_clip_eps,
                denominator=count,
            )  # fmt: skip
            metrics["value_loss"] = critic_loss
            # Separate adapters: one backward, yet neither loss touches the other's gradient.
            total = total + critic_loss
        total.backward()
        collected.append(metrics)
        made.append(logprobs.detach())
    experience.keep_logprobs(parts, made)
    return sum_metrics(collected)


def reward_units(job: Job, values: Tensor) -> Tensor:
    """A critic that started as the reward role predicts raw scores; put them on the scale that PPO is paid in."""
    if job.rewards is None or job.rewards.adapter is None:
        return values
    return (values - job.rewards.adapter.mean) / job.rewards.adapter.std


def adapt_kl(job: Job, config: AlgorithmConfig, kl: float) -> None:
    """Lead kl_coef by the mean `kl` of the step's completions. Checkpoints keep it among the job's counters."""
    if config.kl_target is not None:
        controller = AdaptiveKLController(job.counters["kl_coef"], config.kl_target, config.kl_horizon)
        job.counters["kl_coef"] = controller.update(kl, config.batch_size)


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the other roles beside it."""
    save_adapter(job.backbone, "policy", str(folder))
    for role in ("reference", "critic", "reward"):
        if role in job.backbone.adapters:
            save_adapter(job.backbone, role, str(folder / role))
    if job.rewards is not None and job.rewards.adapter is not None:
        for role in ("critic", "reward"):
            if role in job.backbone.adapters:
                write_stats(folder / role, job.rewards.adapter.mean, job.rewards.adapter.std)
