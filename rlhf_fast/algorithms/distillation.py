"""Distillation: at each token of its own completions, or the data's, the policy is drawn to what a teacher says.

    learn: divergence   the mean over tokens of the generalised Jensen-Shannon divergence over the whole vocabulary
                        (ops/tokens/token_kl): js_weight 0 is KL(teacher || policy), 1 is KL(policy || teacher); where
                        is_clip is given, times min(policy / policy that sampled, is_clip), a constant
    learn: advantage    policy_loss with the advantage log teacher - log policy of each token, without a discount: the
                        gradient of js_weight 1, estimated from the sampled tokens alone

All at `temperature`. Who the teacher is, and what it reads: training/teachers. Logits exist a tile at a time.
Presets. gkd: Agarwal et al. 2024 (2306.13649), with TRL's numbers. on_policy_distillation: own samples and the reverse
KL, the defaults of TRL 1.16. policy_gradient_distillation: Thinking Machines Lab 2025, "On-Policy Distillation". sdpo:
training/teachers, with TRL's numbers.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_fast.data.batches import Batch
from rlhf_fast.errors import UserError
from rlhf_fast.training import ranks
from rlhf_fast.training.divergence import DivergenceConfig, divergence_of, parts_of
from rlhf_fast.training.experience import Experience, collect, evaluate_policy, separate_randomness
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve, policy_term
from rlhf_fast.training.run import Run
from rlhf_fast.training.teachers import SELF, TaughtJob, mixed, prepare_taught, shown, teacher_logprobs


class AlgorithmConfig(DivergenceConfig):
    """Distillation's keys; batch_size counts completions. `objective` is that of learn: advantage."""

    family = "grpo"
    counted = False

    learn: Literal["divergence", "advantage"] = Field("divergence", description="the form of the loss")

    @model_validator(mode="after")
    def _compares(self) -> "AlgorithmConfig":
        for name in ("early_stop_kl", "sampler_correction"):
            if self.learn == "divergence" and getattr(self, name):
                raise ValueError(f"{name} is of learn: advantage, got {getattr(self, name)}")
        return self


def prepare(config: AlgorithmConfig) -> TaughtJob:
    return prepare_taught(config)


def train(job: TaughtJob, config: AlgorithmConfig, run: Run) -> None:
    """Sample, show the teacher, learn; the rows that the teacher can say nothing of teach nothing."""
    for step, experience in experiences(job, config, run, sample=mixed):
        taught, read = shown(job, config, experience)
        metrics = {"taught": len(taught.rewards) / len(experience.rewards)}
        if len(taught.rewards):
            metrics |= learn(job, config, taught, read)
        if config.teacher == SELF:
            job.backbone.lerp_adapter("teacher", "policy", config.teacher_ema)
        finish_step(job, config, run, step, experience, metrics)
    if not job.counters.get("updates"):
        raise UserError(f"the teacher was shown nothing in {config.steps} steps: no reward reached {config.success}")


def learn(job: TaughtJob, config: AlgorithmConfig, taught: Experience, read: Batch) -> dict[str, float]:
    if config.learn == "advantage":
        advantages = advantages_of(job, config, taught, read)
        return improve(job, config, taught, partial(surprise, config, advantages))
    return improve(job, config, taught, divergence_of(job, config), rows_of=partial(parts_of, read=read))


def advantages_of(job: TaughtJob, config: AlgorithmConfig, taught: Experience, read: Batch) -> Tensor:
    """(M, T): log teacher - log policy of each token."""
    assert taught.scores.logprobs is not None  # scores_policy
    return teacher_logprobs(job, config, taught, read) - taught.scores.logprobs


def surprise(config: AlgorithmConfig, advantages: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """policy_loss of the advantages (M, T)."""
    loss, metrics = policy_term(config, rows, advantages[rows.indices])
    return loss, {**metrics, "divergence": -advantages[rows.indices].sum() / rows.tokens}


@torch.no_grad()
def evaluate(job: TaughtJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Also the divergence on the samples, as loss, where the teacher reads what the policy does."""
    result = evaluate_policy(job, config, job.held_out)
    if config.teacher != SELF:
        with separate_randomness(config.seed + 1):
            experience = collect(job, config, job.held_out)
            whole = torch.arange(len(job.held_out)).split(config.micro_batch_size or len(job.held_out))
            parts = parts_of(job, config, experience, whole, read=experience.batch)
            loss = divergence_of(job, config)
            means = [0.0 if part.idle else float(loss(part)[1]["divergence"]) for part in parts]
            result["metrics"]["loss"] = float(ranks.all_sum(torch.tensor(sum(means), dtype=torch.float64)))
    return result


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference and a teacher that moved beside it."""
    save_roles(job, folder, "reference", *(["teacher"] if config.teacher == SELF else []))
