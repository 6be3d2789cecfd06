"""GRPO and its relatives: each completion is judged against others, those of its prompt or the batch; no critic.

loss = policy_loss(advantages, objective). `advantage` is any variant of ops/advantages/group_advantages, of the
rewards less kl_coef times the KL to the reference (k1, summed over the completion); a KL in the loss is
`objective.kl_coef`. The presets are rows of the table in rlhf_fast/algorithms.
Source: Shao et al. 2024 (2402.03300); the others at these ops.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.ops.advantages.group_advantages import VARIANTS, group_advantages
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, collect, evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve, net_rewards, policy_term
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import prepare_rollouts


class AlgorithmConfig(RolloutConfig):
    """GRPO's keys."""

    family = "grpo"

    num_generations: int = Field(8, ge=1, description="completions per prompt; batch_size counts completions")
    advantage: Literal[tuple(VARIANTS)] = Field("grpo", description="how completions are compared")  # type: ignore
    pass_k: int | None = Field(None, ge=1, description="the k of advantage: pass_at_k")

    @model_validator(mode="after")
    def _can_be_compared(self) -> "AlgorithmConfig":
        if VARIANTS[self.advantage].grouped and self.num_generations < 2:
            raise ValueError(f"advantage {self.advantage} compares the completions of a prompt: num_generations is "
                             f"{self.num_generations}, needs 2")  # fmt: skip
        if self.advantage == "pass_at_k" and not 1 <= (self.pass_k or 0) <= self.num_generations:
            raise ValueError(f"advantage pass_at_k needs pass_k from 1 to num_generations, got {self.pass_k} and "
                             f"{self.num_generations}")  # fmt: skip
        for name in ("kl_coef", "missing_eos_penalty", "reward_clip"):
            if self.advantage == "gdpo" and getattr(self, name):
                raise ValueError(f"advantage gdpo compares every reward by itself: there is no sum for {name}, got "
                                 f"{getattr(self, name)}")  # fmt: skip
        return self


def prepare(config: AlgorithmConfig) -> Job:
    return prepare_rollouts(config)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, compare, update; repeat."""
    for step, experience in experiences(job, config, run):
        metrics = improve(job, config, experience, loss_of(config, advantages_of(job, config, experience)))
        if config.num_generations > 1:
            groups = experience.rewards.view(-1, config.num_generations)
            # A group of equal rewards teaches nothing; many of them mean that the task is too easy or too hard.
            metrics["equal_groups"] = float((groups == groups[:, :1]).all(1).float().mean())
        finish_step(job, config, run, step, experience, metrics)


def advantages_of(job: Job, config: AlgorithmConfig, experience: Experience) -> Tensor:
    """(B,): one for each completion."""
    rewards, variant = net_rewards(job, config, experience), VARIANTS[config.advantage]
    given: dict[str, Any] = {}
    if variant.grouped:
        given["group_size"] = config.num_generations
    if variant.columns:
        rewards = torch.stack([part.to(job.device) for part in experience.parts.values()], dim=1)
        given["reward_weights"] = config.reward_weights
    if variant.needs == "k":
        given["k"] = config.pass_k
    if variant.needs == "lengths":
        given["lengths"] = experience.batch.mask.sum(1)
    if variant.needs == "baseline_rewards":
        given["baseline_rewards"] = greedy_rewards(job, config, experience)
    return group_advantages(rewards, variant=config.advantage, **given)


def greedy_rewards(job: Job, config: AlgorithmConfig, experience: Experience) -> Tensor:
    """(B,): what the greedy completion of each one's prompt is paid."""
    prompts = experience.rollout.prompts[:: config.num_generations]
    greedy = collect(job, config.model_copy(update={"top_k": 1}), prompts, score_policy=config.kl_coef > 0)
    return net_rewards(job, config, greedy).repeat_interleave(config.num_generations)


def loss_of(config: AlgorithmConfig, advantages: Tensor) -> Loss[Rows]:
    """advantages: (B,), one for each completion of the experience."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_term(config, rows, advantages[rows.indices])

    return loss


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
