"""GRPO and its relatives: each completion is judged against others, those of its prompt or the batch; no critic.

loss = policy_loss(advantages, objective). `advantage` is how completions are compared: a variant of
ops/advantages/group_advantages, of the rewards less kl_coef times the KL to the reference (k1, summed over the
completion), or token by token as training/comparisons.py says. A KL in the loss is `objective.kl_coef`. The presets are
rows of the table in rlhf_fast/algorithms.
Source: Shao et al. 2024 (2402.03300); the others at these ops; GPG's factor, Chu et al. 2025 (2504.02546), section 3.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.algorithms import ALGORITHMS
from rlhf_fast.data.notes import say
from rlhf_fast.ops.advantages.group_advantages import VARIANTS, group_advantages
from rlhf_fast.training.comparisons import OF_TOKENS
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import Experience, evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve, net_rewards, policy_term
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.resampling import judged_alike
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import prepare_rollouts


class AlgorithmConfig(RolloutConfig):
    """GRPO's keys."""

    family = "grpo"

    num_generations: int = Field(8, ge=1, description="completions per prompt; batch_size counts completions")
    advantage: Literal[tuple({**VARIANTS, **OF_TOKENS})] = Field("grpo", description="how completions are compared")  # type: ignore
    pass_k: int | None = Field(None, ge=1, description="the k of advantage: pass_at_k")
    min_temperature: float | None = Field(
        None,
        gt=0,
        description="advantage: process weighs the steps of a completion by softmax(-reward / this); PURE: 0.1",
    )
    correct_equal_groups: bool = Field(
        False, description="advantages times batch_size over the completions of groups that are told apart, as in GPG"
    )

    @model_validator(mode="after")
    def _can_be_compared(self) -> "AlgorithmConfig":
        variant = VARIANTS.get(self.advantage)
        if (variant is None or variant.grouped) and self.num_generations < 2:
            raise ValueError(f"advantage {self.advantage} compares the completions of a prompt: num_generations is "
                             f"{self.num_generations}, needs 2")  # fmt: skip
        if self.advantage == "pass_at_k" and not 1 <= (self.pass_k or 0) <= self.num_generations:
            raise ValueError(f"advantage pass_at_k needs pass_k from 1 to num_generations, got {self.pass_k} and "
                             f"{self.num_generations}")  # fmt: skip
        if self.min_temperature is not None and self.advantage != "process":
            raise ValueError(f"min_temperature {self.min_temperature} is of advantage process, got {self.advantage}")
        for name in ("kl_coef", "missing_eos_penalty", "overlong_buffer", "reward_clip", "cost", "reward_floors"):
            if self.advantage == "gdpo" and getattr(self, name):
                raise ValueError(f"advantage gdpo compares every reward by itself: there is no sum for {name}, got "
                                 f"{getattr(self, name)}")  # fmt: skip
        return self

    @property
    def scores_policy(self) -> bool:
        return super().scores_policy or self.needs_collisions

    @property
    def needs_collisions(self) -> bool:
        return self.advantage == "optimal_token_baseline"


def prepare(config: AlgorithmConfig) -> Job:
    if config.kl_coef and "kl_coef" not in ALGORITHMS[config.algorithm].defaults:
        say(f"{config.algorithm}: kl_coef {config.kl_coef} is a penalty in the reward; the KL in the loss is "
            "objective.kl_coef")  # fmt: skip
    return prepare_rollouts(config)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Roll out, score, compare, update; repeat."""
    for step, experience in experiences(job, config, run):
        metrics = improve(job, config, experience, loss_of(config, advantages_of(job, config, experience)))
        if config.num_generations > 1:
            # They teach nothing; many of them mean that the task is too easy or too hard.
            metrics["equal_groups"] = float(judged_alike(job, config, experience).float().mean())
        finish_step(job, config, run, step, experience, metrics)


def advantages_of(job: Job, config: AlgorithmConfig, experience: Experience) -> Tensor:
    """(B,), one for each completion, or (B, T), one for each token."""
    if config.advantage in OF_TOKENS:
        given = {"min_temperature": config.min_temperature} if config.advantage == "process" else {}
        advantages = OF_TOKENS[config.advantage](job, config, experience, **given)
    else:
        advantages = of_completions(job, config, experience)
    if config.correct_equal_groups:
        alike = judged_alike(job, config, experience)
        advantages = advantages * (len(alike) / max(1, int((~alike).sum())))
    return advantages


def of_completions(job: Job, config: AlgorithmConfig, experience: Experience) -> Tensor:
    rewards, variant = net_rewards(job, config, experience), VARIANTS[config.advantage]
    given: dict[str, Any] = {}
    if variant.grouped:
        given["group_size"] = config.num_generations
    if variant.columns:
        assert job.rewards is not None
        rewards = torch.stack([part.to(job.device) for part in experience.parts.values()], dim=1)
        given["reward_weights"] = [job.rewards.weights[name] for name in experience.parts]
    if variant.needs == "k":
        given["k"] = config.pass_k
    if variant.needs == "lengths":
        given["lengths"] = experience.batch.mask.sum(1)
    return group_advantages(rewards, variant=config.advantage, **given)


def loss_of(config: AlgorithmConfig, advantages: Tensor) -> Loss[Rows]:
    """advantages: (B,) or (B, T), of the completions or tokens of the experience."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_term(config, rows, advantages[rows.indices])

    return loss


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
