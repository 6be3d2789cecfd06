"""GRPO: several completions per prompt; each is judged against the others, so there is no critic.

loss = policy_loss(advantages of the group) + kl_coef * k3 KL to the reference, both averaged over all tokens of the
minibatch. Source: Shao et al. 2024 (2402.03300); `advantage` also offers Dr. GRPO (2503.20783) and RLOO (2402.14740).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.models.peft_io import save_adapter
from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.policy.policy_loss import policy_loss
from rlhf_fast.ops.tokens.kl_estimate import kl_estimate
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
from rlhf_fast.training.optim import learning_rate, set_learning_rates, update
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import prepare_rollouts


class AlgorithmConfig(RolloutConfig):
    """GRPO's keys."""

    num_generations: int = Field(8, ge=2, description="completions per prompt; batch_size counts completions")
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the reference in the loss")


def prepare(config: AlgorithmConfig) -> Job:
    return prepare_rollouts(config)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, compare within each group, update; repeat."""
    for step in run.steps():
        rate = learning_rate(config, step)
        set_learning_rates(job, {"policy": rate})
        # One minibatch has all rows before any step: its log-probabilities are the old ones, unless it has dropout.
        prompts = prompts_of_step(job, config, step)
        score_policy = config.num_minibatches > 1 or config.lora_dropout > 0
        experience = collect(job, config, prompts, score_policy=score_policy, compare_sampler=step == run.start)
        advantages = group_advantages(experience.rewards, group_size=config.num_generations, kind=config.advantage)
        metrics = improve(job, config, experience, advantages)
        move_reference(job, config, step)
        groups = experience.rewards.view(-1, config.num_generations)
        metrics |= {**rollout_metrics(experience), "learning_rate": rate}
        # A group of equal rewards teaches nothing; many of them mean that the task is too easy or too hard.
        metrics["equal_groups"] = float((groups == groups[:, :1]).all(1).float().mean())
        run.samples(step, samples_of(experience, 2))
        run.log(step, metrics, tokens=int(experience.rollout.batch.attention_mask.sum()))


def improve(job: Job, config: AlgorithmConfig, experience: Experience, advantages: Tensor) -> dict[str, float]:
    """The epochs of minibatches; metrics averaged over them."""
    history = []
    for _ in range(config.ppo_epochs):
        for parts in minibatches(config, len(advantages)):
            losses = accumulate(job, config, experience, advantages, parts)
            norms = update(job, config, {"loss": losses["loss"]})
            history.append({**{name: float(value) for name, value in losses.items()}, **norms})
        if config.early_stop_kl is not None and history[-1]["approx_kl"] > config.early_stop_kl:
            break
    return {name: sum(m[name] for m in history) / len(history) for name in history[0]}


def accumulate(
    job: Job, config: AlgorithmConfig, experience: Experience, advantages: Tensor, parts: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Backward of one minibatch, micro-batch by micro-batch. Means are over the whole minibatch."""
    batch, backbone = experience.rollout.batch, job.backbone
    mask = batch.mask[torch.cat(parts)]
    count, sequences = mask.sum(), mask.any(1).sum()
    collected, made = [], []
    for rows in parts:
        part = batch.rows(rows)
        lower = None if experience.lower is None else experience.lower[rows]
        hidden = backbone.hidden(
            part.input_ids, part.attention_mask, ["policy"], lower=lower, dropout_seed=dropout_seed(job, config)
        )["policy"]
        logprobs, entropy = backbone.logprobs(
            hidden, part.input_ids, part.mask, temperature=config.temperature, return_entropy=True
        )
        loss, metrics = policy_loss(
            logprobs, experience.old_logprobs(rows), advantages[rows][:, None], mask=part.mask,
            variant=config.variant, fixed_length=config.max_new_tokens, clip_eps_low=config.clip_eps_low,
            clip_eps_high=config.clip_eps_high, dual_clip=config.dual_clip, denominator=count, sequences=sequences,
        )  # fmt: skip
        kl = kl_estimate(logprobs, experience.scores.ref_logprobs[rows], estimator="k3").sum() / count
        total = loss + config.kl_coef * kl
        total.backward()
        metrics |= {"loss": total, "policy_loss": loss, "kl_loss": kl, "entropy": entropy.sum() / count}
        collected.append(metrics)
        made.append(logprobs.detach())
    experience.keep_logprobs(parts, made)
    return sum_metrics(collected)


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_adapter(job.backbone, "policy", str(folder))
    if "reference" in job.backbone.adapters:
        save_adapter(job.backbone, "reference", str(folder / "reference"))
