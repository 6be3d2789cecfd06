"""DPO and its family: raise the chosen completion's log-probability over the rejected one's, relative to the reference.

The reference's log-probabilities never change, so they are computed once, for the pairs that the run uses, before the
first step, and kept in the run folder. `objective` is any loss of ops/preference that needs no data besides the pairs,
or weights of several: {variant: {sigmoid: 0.8, bco_pair: 0.2, sft: 1}}. aot, aot_unpaired and bco_pair compare the
pairs of a micro-batch. The columns `margin` and `preference` are those of training/pair_loss. With `ranking`, the data
are several answers to each prompt with `ranks` or `scores`, and the loss is that of training/rankings.
Sources: Rafailov et al. 2023 (2305.18290); the others in ops/preference; MPO: Wang et al. 2024 (2411.10442); RPO:
Pang et al. 2024 (2404.19733).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.rows import unlike
from rlhf_fast.ops.preference.preference_loss import PreferenceObjective
from rlhf_fast.ops.rewards.ranking_loss import VARIANTS as RANKINGS
from rlhf_fast.training import supervised
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.job import Job, save_roles
from rlhf_fast.training.offline import OfflineJob, evaluate_offline, prepare_offline
from rlhf_fast.training.optim import Loss
from rlhf_fast.training.pair_loss import answer_logprobs, check_labels, pair_loss
from rlhf_fast.training.pairs import Pair, encode_pair, load_pair_rows
from rlhf_fast.training.rankings import encode_ranking, implicit_ranking_loss, load_ranking_rows, padded_rows
from rlhf_fast.training.reference_cache import reference_logprobs, references_of_run
from rlhf_fast.training.run import Run
from rlhf_fast.training.supervised import Rows


class AlgorithmConfig(SamplingConfig):
    """DPO's keys; batch_size counts pairs. `reward` only judges held-out samples before and after."""

    family = "dpo"

    objective: PreferenceObjective = Field(
        "sigmoid", validate_default=True, description="the loss: its name, or a mapping of its numbers"
    )
    wpo: bool = Field(False, description="weigh each pair by how likely the policy is to give its answers")
    ranking: Literal[tuple(RANKINGS)] | None = Field(None, description="learn from rankings, by this likelihood")  # type: ignore
    ld_alpha: float = Field(1.0, ge=0, le=1, description="weight of the tokens that only the longer answer has")

    @field_validator("objective", mode="before")
    @classmethod
    def _objective(cls, value: Any) -> PreferenceObjective:
        objective = PreferenceObjective.of(value)
        if objective.looks_at("advantages"):
            raise ValueError(f"objective {objective.variant} needs advantages, which algorithm hpo makes")
        return objective

    @model_validator(mode="after")
    def _weighs(self) -> "AlgorithmConfig":
        if self.wpo and self.objective.looks_at("ranks"):
            raise ValueError(f"wpo weighs pairs, but objective {self.objective.name} takes them apart")
        alone = PreferenceObjective(beta=self.objective.beta)
        if self.ranking and (self.objective != alone or self.wpo or self.ld_alpha < 1):
            raise ValueError(f"ranking {self.ranking} takes of the objective its beta alone, without wpo and ld_alpha")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.objective.looks_at("reference") and not self.objective.reference_free


def prepare(config: AlgorithmConfig) -> OfflineJob:
    if config.ranking:
        job = prepare_offline(config, load_ranking_rows(config), encode_ranking, Encoder.prompt)
        widths = (rows.numbers("answers", lambda ranking: len(ranking.answers)) for rows in (job.train, job.held_out))
        job.widest = int(max(width.max() for width in widths))
        return job
    job = prepare_offline(config, load_pair_rows(config), encode_pair, Encoder.pair_prompt)
    pairs: list[Pair] = []
    for examples in (job.train, job.held_out):
        pairs += examples.outlines(unlike(examples.rows))
    check_labels(pairs, config.objective)
    return job


def train(job: OfflineJob, config: AlgorithmConfig, run: Run) -> None:
    """The reference's log-probabilities once, if at all; then batches of pairs in shuffled order."""
    references = None
    if config.needs_reference:
        kind = f"ld_alpha {config.ld_alpha}"
        references = references_of_run(job, config, run, partial(references_of, job, config), kind=kind)
    supervised.train(job, config, run, loss_of(job, config, job.train, references))


def loss_of(job: Job, config: AlgorithmConfig, pairs: Sequence[Any], references: Tensor | None) -> Loss[Rows]:
    """The mean over a batch's pairs, or rankings. references: (pairs, 2), the reference's log-probabilities of chosen
    and rejected, of all `pairs`, which `rows.indices` count; None where the objective looks at none."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, weights = answer_logprobs(job, config, "policy", rows.batch)
        if config.ranking:
            assert references is not None
            return implicit_ranking_loss(
                logprobs, references[rows.indices], [pairs[i] for i in rows.indices], beta=config.objective.beta,
                variant=config.ranking, denominator=rows.examples,
            )  # fmt: skip
        return pair_loss(
            config.objective, logprobs, None if references is None else references[rows.indices].T.flatten(),
            pairs=[pairs[i] for i in rows.indices], lengths=rows.batch.mask.sum(1), weights=weights,
            denominator=rows.examples,
        )  # fmt: skip

    return loss


def references_of(job: OfflineJob, config: AlgorithmConfig, pairs: Sequence[Any]) -> Tensor:
    """(pairs, 2): the reference's log-probabilities of chosen and rejected; of rankings, of each answer."""
    if config.ranking:
        answers = [answer for ranking in pairs for answer in ranking.answers]
        return padded_rows(reference_logprobs(job, config, answers)[:, 0], pairs, job.widest)
    return reference_logprobs(job, config, pairs, lambda *given: answer_logprobs(*given)[0])


@torch.no_grad()
def evaluate(job: OfflineJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Loss, accuracy and margin on the held-out pairs; with a reward, also samples for the held-out prompts."""
    if config.needs_reference and job.held_out_references is None:
        job.held_out_references = references_of(job, config, job.held_out)
    return evaluate_offline(job, config, loss_of(job, config, job.held_out, job.held_out_references))


def save(job: Job, config: AlgorithmConfig, folder: Path) -> None:
    """The policy at the top of `folder`; the reference beside it where it is an adapter."""
    save_roles(job, folder, "reference")
