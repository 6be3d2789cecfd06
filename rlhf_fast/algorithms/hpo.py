"""HPO: DPO on pairs, and the likelihood of their answers weighted by their advantage in another reward.

    L = logistic(h) - auxiliary_weight (w_chosen log pi(chosen) + w_rejected log pi(rejected))
    w = min(exp((R - V(x)) / auxiliary_temperature), max_weight)
    L_V = |expectile - 1(R < V(x))| (R - V(x))^2, the mean over the answers

R is what `reward` pays for an answer of the data: something that nobody was asked to compare, such as being safe or
easy to read. It is asked once, before the first step. V, the value of a prompt, is a head on an adapter of its own,
'critic'; w has no gradient. All of the first line is ops/preference's variant hpo.
Source: Badrinath et al. 2024 (2405.17956, "Hybrid Preference Optimization", later "Unified ..."): DPO, a likelihood
weighted by advantages, and the expectile loss of implicit Q-learning (Kostrikov et al. 2021, 2110.06169, eq. 5). How
they are joined here, max_weight and the defaults are a reconstruction and not read from the paper.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.errors import UserError
from rlhf_fast.ops.preference.preference_loss import PreferenceObjective, preference_loss
from rlhf_fast.training import supervised
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.job import Job, dropout_seed, save_roles
from rlhf_fast.training.judged_pairs import encode_judged, rewards_of
from rlhf_fast.training.offline import OfflineJob, evaluate_offline, prepare_offline
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.pairs import load_pair_rows
from rlhf_fast.training.reference_cache import reference_logprobs, references_of_run
from rlhf_fast.training.run import Run
from rlhf_fast.training.supervised import Rows


class AlgorithmConfig(SamplingConfig):
    """HPO's keys; batch_size counts pairs. `reward` pays the data's answers, and samples before and after."""

    family = "dpo"
    counted = False

    objective: PreferenceObjective = Field(
        "hpo", validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )
    expectile: float = Field(0.7, gt=0, lt=1, description="of rewards that the value of a prompt is")
    max_weight: float = Field(20.0, ge=1, description="bound on the weight of an answer's likelihood")
    critic_learning_rate: float | None = Field(None, gt=0, description="default: learning_rate")

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> PreferenceObjective:
        objective = PreferenceObjective.of(value, variant="hpo")
        if not objective.looks_at("advantages"):
            raise ValueError(f"objective must be hpo for algorithm hpo, got {objective.name} (algorithm dpo has it)")
        return objective

    def peak_rate(self, role: str) -> float:
        own = self.critic_learning_rate if role == "critic" else None
        return self.learning_rate if own is None else own


@dataclass
class HybridJob(OfflineJob):
    """held_out_rewards: (pairs, 2), what the held-out answers are paid, once that was asked."""

    held_out_rewards: Tensor | None = None


def prepare(config: AlgorithmConfig) -> HybridJob:
    job = HybridJob(**vars(prepare_offline(config, load_pair_rows(config), encode_judged, Encoder.pair_prompt)))
    if job.rewards is None:
        raise UserError(f"missing key 'reward' ({SamplingConfig.model_fields['reward'].description})")
    job.backbone.add_adapter(
        "critic", rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets,
        top_layers=config.top_layers, seed=config.seed + 1, use_rslora=config.use_rslora, use_dora=config.use_dora,
        dropout=config.lora_dropout,
    )  # fmt: skip
    job.backbone.add_head("critic")
    job.optimizers["critic"] = adamw(job.backbone.parameters_of("critic"), config)
    return job


def train(job: HybridJob, config: AlgorithmConfig, run: Run) -> None:
    """The reference and the rewards once; then batches of pairs in shuffled order."""
    references = references_of_run(job, config, run, partial(reference_logprobs, job, config))
    supervised.train(job, config, run, loss_of(job, config, references, rewards_of(job, config, job.train)))


def loss_of(job: Job, config: AlgorithmConfig, references: Tensor, rewards: Tensor) -> Loss[Rows]:
    """The mean over a batch's pairs. references, rewards: (pairs, 2), of chosen and rejected."""
    highest = config.objective.auxiliary_temperature * math.log(config.max_weight)

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        batch, paid = rows.batch, rewards[rows.indices].T.flatten()
        hidden = job.backbone.hidden(
            batch.input_ids, batch.attention_mask, ["policy", "critic"], dropout_seed=dropout_seed(job, config)
        )
        logprobs = job.backbone.logprobs(hidden["policy"], batch.input_ids, batch.mask, mask_count=batch.count).sum(1)
        first = batch.mask.argmax(1, keepdim=True)  # the value before the first token of an answer is the prompt's
        surprises = paid - job.backbone.values("critic", hidden["critic"]).gather(1, first).squeeze(1)
        sides = torch.where(surprises < 0, 1 - config.expectile, config.expectile)
        value_loss = (sides * surprises.square()).sum() / (2 * rows.examples)
        chosen_advantages, rejected_advantages = surprises.detach().clamp(max=highest).chunk(2)
        pair_loss, metrics = preference_loss(
            *logprobs.chunk(2), *references[rows.indices].unbind(1), objective=config.objective,
            chosen_advantages=chosen_advantages, rejected_advantages=rejected_advantages, denominator=rows.examples,
        )  # fmt: skip
        capped = (surprises > highest).sum() / (2 * rows.examples)
        return pair_loss + value_loss, {
            **metrics, "policy_loss": pair_loss, "value_loss": value_loss, "capped_weights": capped
        }  # fmt: skip

    return loss


@torch.no_grad()
def evaluate(job: HybridJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Losses, accuracy and margin on the held-out pairs, and samples for their prompts."""
    if job.held_out_references is None or job.held_out_rewards is None:
        job.held_out_references = reference_logprobs(job, config, job.held_out)
        job.held_out_rewards = rewards_of(job, config, job.held_out)
    return evaluate_offline(job, config, loss_of(job, config, job.held_out_references, job.held_out_rewards))


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the critic, and the reference where it is an adapter, beside it."""
    save_roles(job, folder, "reference", "critic")
