"""Preference optimisation on the policy's own samples: sample, judge, pair, learn, and again.

    learn: pairs             preference_loss of the pairs that `pick` makes of a prompt's completions
    learn: win_rate          mean of (rho - (P - 1/2) / beta)^2
    learn: policy_gradient   -mean of sg(P - 1/2 - beta rho) log pi

rho = log pi - log ref of a completion, at `temperature`, as everything on this core; P the chance that it beats its
rivals, from Bradley-Terry on the rewards; sg stops the gradient. What a completion meets, and the pairs, are those of
training/duels. The reference is the base model, or a copy of the policy, refreshed every reference_refresh_every steps:
the iterate before. optimism adds its part of log pi of the rivals that the policy did not sample.

Presets. online_dpo: Guo et al. 2024 (2402.04792). iterative_dpo: Xiong et al. 2024 (2312.11456). rs_dpo: Khaki et al.
2024 (2402.10038), from memory. spin: Chen et al. 2024 (2401.01335), from memory. sppo_online: Wu et al. 2024
(2405.00675, eq. 4.4), from memory. nash_md: Munos et al. 2023 (2312.00886, section 7), with the KL of whole
completions. xpo: Xie et al. 2024 (2405.21046, algorithm 1).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.ops.preference.preference_loss import PreferenceObjective, preference_loss
from rlhf_fast.training.duels import DuelConfig, Duels, duels_of, learn_units, prepare_duels
from rlhf_fast.training.experience import evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.run import Run


class AlgorithmConfig(DuelConfig):
    """Online DPO's keys; batch_size counts the policy's completions."""

    family = "grpo"

    temperature: float = Field(0.9, gt=0)
    objective: PreferenceObjective = Field(  # type: ignore[assignment]
        "sigmoid", validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )
    learn: Literal["pairs", "win_rate", "policy_gradient"] = Field("pairs", description="the form of the loss")
    optimism: float = Field(0.0, ge=0, description="weight of the rivals' log-probability in the loss of pairs")

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any, info: ValidationInfo) -> PreferenceObjective:  # type: ignore[override]
        objective = PreferenceObjective.of(value)
        if objective.looks_at("advantages"):
            raise ValueError(f"objective {objective.variant} needs advantages, which algorithm hpo makes")
        return objective

    @model_validator(mode="after")
    def _can_learn(self) -> "AlgorithmConfig":
        wanted = {"win_rate": "samples", "policy_gradient": "mixture"}.get(self.learn, self.rival)
        updates = self.ppo_epochs * self.num_minibatches
        if self.rival != wanted:
            raise ValueError(f"learn {self.learn} is for rival: {wanted}, got {self.rival}")
        if self.learn != "pairs" and self.objective != PreferenceObjective(beta=self.objective.beta):
            raise ValueError(f"learn {self.learn} takes of the objective its beta alone, got {self.objective}")
        if self.learn == "policy_gradient" and updates > 1:
            raise ValueError(f"learn policy_gradient takes one update of a rollout, ppo_epochs x num_minibatches is "
                             f"{updates}")  # fmt: skip
        if self.optimism and (self.learn, self.rival) != ("pairs", "mixture"):
            raise ValueError(f"optimism is of learn: pairs and rival: mixture, got {self.learn} and {self.rival}")
        return self


def prepare(config: AlgorithmConfig) -> Job:
    return prepare_duels(config)


def train(job: Job, config: AlgorithmConfig, run: Run) -> None:
    """Sample, judge, pair, learn; a step whose completions make no pair teaches nothing."""
    for step, experience in experiences(job, config, run):
        duels = duels_of(job, config, experience)
        metrics = {"pairs": float(len(duels.pairs))}
        units = duels.pairs if config.learn == "pairs" else torch.arange(duels.samples)[:, None]
        if len(units):
            metrics |= learn_units(job, config, duels.everyone, units, loss_of(config, duels))
        finish_step(job, config, run, step, experience, metrics)
    if not job.counters.get("updates"):
        raise UserError(f"no two completions of a prompt made a pair in {config.steps} steps (pick: {config.pick})")


def loss_of(config: AlgorithmConfig, duels: Duels) -> Loss[Rows]:
    """The mean over a minibatch's pairs, or samples."""

    def of_pairs(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, pairs = rows.logprobs.sum(1), rows.sequences / 2
        chosen_lengths, rejected_lengths = rows.mask.sum(1).chunk(2)
        loss, metrics = preference_loss(
            *logprobs.chunk(2), *rows.ref_logprobs.sum(1).chunk(2), objective=config.objective,
            chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, denominator=pairs,
        )  # fmt: skip
        if config.optimism:
            of_rivals = (logprobs * (rows.indices >= duels.samples).to(logprobs)).sum() / pairs
            loss, metrics = loss + config.optimism * of_rivals, {**metrics, "rival_logprob": of_rivals}
        return loss, metrics

    def of_samples(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        beta, logprobs = config.objective.beta, rows.logprobs.sum(1)
        chances, log_ratios = duels.chances[rows.indices].to(logprobs), logprobs - rows.ref_logprobs.sum(1)
        if config.learn == "win_rate":
            losses = (log_ratios - (chances - 0.5) / beta).square()
        else:
            losses = -(chances - 0.5 - beta * log_ratios).detach() * logprobs
        return losses.sum() / rows.sequences, {"win_rate": chances.sum() / rows.sequences}

    return of_pairs if config.learn == "pairs" else of_samples


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
