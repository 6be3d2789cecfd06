"""KTO, BCO and APO on answers that are liked or not, each by itself: no pairs are needed.

loss = unpaired_preference_loss(objective), relative to the reference, whose log-probabilities are computed once. KTO
compares each reward with z, an estimate of the KL to the reference, from the batch's prompts with one another's
answers: one number for all of the batch, whatever its micro-batches, without a gradient. They take a pass of policy and
reference without backward. BCO compares with a moving average of rewards.
Sources: Ethayarajh et al. 2024 (2402.01306); Jung et al. 2024 (2404.04656); the others at the op.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.notes import say
from rlhf_fast.errors import UserError
from rlhf_fast.ops.preference.unpaired_preference_loss import (
    VARIANTS,
    UnpairedPreferenceObjective,
    running_reward_shift,
    unpaired_preference_loss,
)
from rlhf_fast.training import supervised
from rlhf_fast.training.answers import Answer, batch_kl, encode_answer, load_answer_rows
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.offline import OfflineJob, evaluate_offline, prepare_offline
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.reference_cache import reference_logprobs, references_of_run
from rlhf_fast.training.run import Run
from rlhf_fast.training.supervised import Rows, answer_logprobs


class AlgorithmConfig(SamplingConfig):
    """KTO's keys; batch_size counts answers. `reward` only judges held-out samples before and after."""

    family = "kto"

    objective: UnpairedPreferenceObjective = Field(
        "kto", validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )
    reward_shift_decay: float = Field(0.99, ge=0, lt=1, description="of bco's moving average of rewards, per step")

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> UnpairedPreferenceObjective:
        return UnpairedPreferenceObjective.of(value)

    @model_validator(mode="after")
    def _has_others(self) -> "AlgorithmConfig":
        if self.compares_with == "kl" and self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 for {self.objective.variant}, whose KL comes from the "
                             f"answers of other prompts, got {self.batch_size}")  # fmt: skip
        return self

    @property
    def compares_with(self) -> str | None:
        """What the objective takes off a reward."""
        return VARIANTS[self.objective.variant].shift


def prepare(config: AlgorithmConfig) -> OfflineJob:
    job = prepare_offline(config, load_answer_rows(config), encode_answer, Encoder.prompt)
    good = int(job.train.numbers("desirable", lambda answer: answer.desirable).sum())
    if good in (0, len(job.train)):
        raise UserError(f"all {len(job.train)} answers have the label {bool(good)}: {config.algorithm} needs both")
    if config.compares_with == "kl":
        tell_balance(config.objective, good, len(job.train) - good)
    return job


def tell_balance(objective: UnpairedPreferenceObjective, good: int, bad: int) -> None:
    """KTO's authors weigh the classes so that desirable to undesirable is between 1 and 4/3 (section 4.2)."""
    one = objective.undesirable_weight * bad / good
    if not one * 0.999 <= objective.desirable_weight <= one * 4 / 3 * 1.001:
        say(f"warning: {good} answers are desirable, {bad} are not; objective.desirable_weight is "
            f"{objective.desirable_weight:g}, balanced it is from {one:.3g} to {one * 4 / 3:.3g}")  # fmt: skip


def train(job: OfflineJob, config: AlgorithmConfig, run: Run) -> None:
    """The reference's log-probabilities once; then batches of answers in shuffled order."""
    references = references_of_run(job, config, run, partial(reference_logprobs, job, config))
    for step, indices in supervised.batches(job, config, run):
        loss = loss_of(job, config, job.train, references, indices)
        metrics = supervised.learn(job, config, run, step, indices, loss)
        if 0 < sum(job.train[i].desirable for i in indices) < len(indices):
            follow_rewards(job, config, metrics)


def loss_of(
    job: Job, config: AlgorithmConfig, answers: Sequence[Answer], references: Tensor, indices: Sequence[int]
) -> Loss[Rows]:
    """The mean over the batch `indices` of `answers`. references: (answers, 1), the reference's log-probabilities."""
    batch = [answers[i] for i in indices]
    sizes = {"desirable": sum(answer.desirable for answer in batch)}
    sizes["undesirable"] = len(batch) - sizes["desirable"]
    kl = batch_kl(job, config, batch) if config.compares_with == "kl" else None
    reward_shift = torch.tensor(job.counters.get("reward_shift", 0.0), device=job.device)

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs = answer_logprobs(job, config, "policy", rows.batch)
        good = torch.tensor([answers[i].desirable for i in rows.indices], device=job.device)
        loss, means = unpaired_preference_loss(
            logprobs, references[rows.indices, 0], good, objective=config.objective, kl=kl, reward_shift=reward_shift,
            denominator=rows.examples,
        )  # fmt: skip
        metrics = {} if kl is None else {"kl": kl * len(rows.indices) / rows.examples}
        for name, here in {"desirable": good.sum(), "undesirable": (~good).sum()}.items():
            metrics[f"{name}_reward"] = means[f"{name}_reward"] * here / max(1, sizes[name])
        return loss, {**metrics, "margin": metrics["desirable_reward"] - metrics["undesirable_reward"]}

    return loss


def follow_rewards(job: Job, config: AlgorithmConfig, metrics: dict[str, float]) -> None:
    """BCO's moving average, after a batch that had both classes."""
    rewards = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    shift = torch.tensor(job.counters.get("reward_shift", 0.0), dtype=torch.float64)
    job.counters["reward_shift"] = float(running_reward_shift(shift, rewards, decay=config.reward_shift_decay))


@torch.no_grad()
def evaluate(job: OfflineJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Loss, mean rewards of both classes and their margin on the held-out answers, and samples with a reward."""
    if job.held_out_references is None:
        job.held_out_references = reference_logprobs(job, config, job.held_out)
    loss = loss_of(job, config, job.held_out, job.held_out_references, range(len(job.held_out)))
    return evaluate_offline(job, config, loss)


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
