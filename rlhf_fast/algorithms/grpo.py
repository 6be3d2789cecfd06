"""GRPO: several completions per prompt; each is judged against the others, so there is no critic.

loss = policy_loss(advantages of the group) + kl_coef * k3 KL to the reference, both averaged over all tokens of the
minibatch. Source: Shao et al. 2024 (2402.03300); `advantage` also offers Dr. GRPO (2503.20783) and RLOO (2402.14740).
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlhf_fast.ops.advantages.group_advantages import group_advantages
from rlhf_fast.ops.policy.policy_loss import policy_loss
from rlhf_fast.ops.tokens.kl_estimate import kl_estimate
from rlhf_fast.training.config import RolloutConfig
from rlhf_fast.training.experience import evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.on_policy import Rows, experiences, finish_step, improve
from rlhf_fast.training.optim import Loss
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
    for step, experience in experiences(job, config, run):
        advantages = group_advantages(experience.rewards, group_size=config.num_generations, variant=config.advantage)
        metrics = improve(job, config, experience, loss_of(config, advantages))
        groups = experience.rewards.view(-1, config.num_generations)
        # A group of equal rewards teaches nothing; many of them mean that the task is too easy or too hard.
        metrics["equal_groups"] = float((groups == groups[:, :1]).all(1).float().mean())
        finish_step(job, config, run, step, experience, metrics)


def loss_of(config: AlgorithmConfig, advantages: Tensor) -> Loss[Rows]:
    """advantages: (B,), of each completion."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = policy_loss(
            rows.logprobs, rows.old_logprobs, advantages[rows.indices][:, None], objective=config.objective,
            mask=rows.mask, denominator=rows.tokens, sequences=rows.sequences,
        )  # fmt: skip
        kl = kl_estimate(rows.logprobs, rows.ref_logprobs, variant="k3").sum() / rows.tokens
        metrics |= {"policy_loss": loss, "kl_loss": kl, "entropy": rows.entropy.sum() / rows.tokens}
        return loss + config.kl_coef * kl, metrics

    return loss


def evaluate(job: Job, config: AlgorithmConfig) -> dict[str, Any]:
    return evaluate_policy(job, config, job.held_out)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
