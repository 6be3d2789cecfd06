"""DPO and its family: raise the chosen completion's log-probability over the rejected one's, relative to the reference.

The reference's log-probabilities never change, so they are computed once, for the pairs that the run uses, before the
first step, and kept in the run folder. `objective` is any loss of ops/preference that needs no data besides the pairs.
aot, aot_unpaired and bco_pair compare the pairs of a micro-batch.
Sources: Rafailov et al. 2023 (2305.18290); the others in ops/preference_loss.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlhf_fast.data.encoding import Prompt, encode_rows
from rlhf_fast.ops.preference.preference_loss import PreferenceObjective, preference_loss
from rlhf_fast.training import supervised
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import evaluate_policy
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.optim import Loss, adamw, as_numbers
from rlhf_fast.training.pairs import Pair, encode_pairs, load_pair_rows
from rlhf_fast.training.reference_cache import references_of_run
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import add_policy, add_rewards, build_encoder, build_model, try_rewards
from rlhf_fast.training.supervised import Rows, logprobs_of, micro_batches, padded


class AlgorithmConfig(SamplingConfig):
    """DPO's keys; batch_size counts pairs. `reward` only judges held-out samples before and after."""

    family = "dpo"

    objective: PreferenceObjective = Field(
        "sigmoid", validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> PreferenceObjective:
        objective = PreferenceObjective.of(value)
        if objective.looks_at("advantages"):
            raise ValueError(f"objective {objective.variant} needs advantages, which no column holds")
        return objective

    @property
    def needs_reference(self) -> bool:
        return self.objective.looks_at("reference") and not self.objective.reference_free


@dataclass
class PreferenceJob(Job):
    """held_out_prompts: prompts to sample for the reward, when there is one. held_out_references: (pairs, 2), the
    reference's log-probabilities, once they were needed.
    """

    held_out_prompts: list[Prompt] = field(default_factory=list)
    held_out_references: Tensor | None = None


def prepare(config: AlgorithmConfig) -> PreferenceJob:
    train_rows, held_out_rows = load_pair_rows(config)
    backbone, tokenizer, saved = build_model(config)
    add_policy(backbone, config, saved)
    backbone.enable_checkpointing(config.gradient_checkpointing)
    rewards = add_rewards(backbone, config, columns=list(train_rows[0].values))
    encoder = build_encoder(config, backbone, tokenizer)
    train, held_out = encode_pairs(encoder, train_rows, held_out_rows)
    optimizers = {"policy": adamw(backbone.parameters_of("policy"), config)}
    job = PreferenceJob(backbone, encoder, train, held_out, optimizers, rewards)
    if rewards is not None:
        prompts = build_encoder(config, backbone, tokenizer, new_tokens=config.max_new_tokens)
        job.held_out_prompts = encode_rows(prompts, held_out_rows, prompts.pair_prompt, "held-out prompts")
        try_rewards(job, config, job.held_out_prompts)
    return job


def train(job: PreferenceJob, config: AlgorithmConfig, run: Run) -> None:
    """The reference's log-probabilities once, if at all; then batches of pairs in shuffled order."""
    references = None
    if config.needs_reference:
        references = references_of_run(job, config, run, partial(reference_logprobs, job, config))
    supervised.train(job, config, run, loss_of(job, config, references))


def loss_of(job: Job, config: AlgorithmConfig, references: Tensor | None) -> Loss[Rows]:
    """The mean over a batch's pairs. references: (pairs, 2), the reference's log-probabilities of chosen and rejected,
    of all pairs that `rows.indices` count; None where the objective looks at none."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = logprobs_of(job, config, "policy", rows.batch).sum(1).chunk(2)
        ref_chosen, ref_rejected = (None, None) if references is None else references[rows.indices].unbind(1)
        chosen_lengths, rejected_lengths = rows.batch.mask.sum(1).chunk(2)
        return preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, objective=config.objective, chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths, denominator=rows.examples,
        )  # fmt: skip

    return loss


@torch.no_grad()
def reference_logprobs(job: Job, config: AlgorithmConfig, pairs: list[Pair]) -> Tensor:
    """(pairs, 2): the reference's log-probabilities of chosen and rejected."""
    size = config.micro_batch_size or config.batch_size
    batches = [padded(job, pairs[start : start + size]) for start in range(0, len(pairs), size)]
    sums = [logprobs_of(job, config, "reference", batch).sum(1) for batch in batches]
    return torch.cat([torch.stack(part.chunk(2), dim=1) for part in sums])


@torch.no_grad()
def evaluate(job: PreferenceJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Loss, accuracy and margin on the held-out pairs; with a reward, also samples for the held-out prompts."""
    if config.needs_reference and job.held_out_references is None:
        job.held_out_references = reference_logprobs(job, config, job.held_out)
    size = config.micro_batch_size or config.batch_size
    pair_loss, totals = loss_of(job, config, job.held_out_references), defaultdict[str, float](float)
    for start in range(0, len(job.held_out), size):
        part = range(len(job.held_out))[start : start + size]
        (rows,) = micro_batches(job, job.held_out, part, None)
        loss, metrics = pair_loss(rows)
        for name, value in as_numbers({"loss": loss, **metrics}).items():
            totals[name] += value * len(part) / len(job.held_out)
    if job.rewards is None:
        return {"metrics": totals, "samples": []}
    sampled = evaluate_policy(job, config, job.held_out_prompts)
    return {"metrics": {**totals, **sampled["metrics"]}, "samples": sampled["samples"]}


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
