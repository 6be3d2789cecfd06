"""Reward models: an adapter and a head whose score at the last token tells how good an answer is.

What people said of answers may have any form of data/layouts.JUDGEMENTS, known by the columns; LOSSES has the loss of
each. The run folder is the reward adapter, with the mean and standard deviation of its scores on reference answers
beside it, so that policies are paid in scores of zero mean and unit spread; an ensemble has its other members there.
Sources: pairs and rankings, Ouyang et al. 2022 (2203.02155, eq. 1); margins, Touvron et al. 2023 (2307.09288, eq. 2);
Plackett-Luce, Zhu et al. 2023 (2301.11270); steps, Lightman et al. 2023 (2305.20050).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf_fast.ops.core.loss import Loss as OpLoss
from rlhf_fast.ops.rewards.ranking_loss import ranking_loss
from rlhf_fast.ops.rewards.reward_loss import reward_loss
from rlhf_fast.ops.rewards.step_reward_loss import step_reward_loss
from rlhf_fast.training import supervised
from rlhf_fast.training.config import Config
from rlhf_fast.training.ensemble import RewardJob, add_members, all_scores, member_scores, save_members
from rlhf_fast.training.optim import Loss, adamw
from rlhf_fast.training.reward_data import Judgement, load_judged, targets_of
from rlhf_fast.training.reward_report import measures, write_report
from rlhf_fast.training.run import Run
from rlhf_fast.training.setup import build_encoder, build_model
from rlhf_fast.training.supervised import Rows


class AlgorithmConfig(Config):
    """The reward model's keys; batch_size counts judgements: pairs, rankings, ratings ..."""

    family = "reward_model"

    form: Literal["auto", "pairs", "rankings", "ratings", "likes", "steps"] = Field(
        "auto", description="of the judgements; auto: by the columns"
    )
    ranking: Literal["pairwise", "plackett_luce", "breslow"] = Field(
        "pairwise", description="loss of rankings: all pairs of a prompt as one element, or the ranking's likelihood"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="chance that the label of a pair is wrong")
    centring: float = Field(0.0, ge=0, description="of pairs: weight of (r_chosen + r_rejected)^2 in the loss")
    criterion_weights: dict[str, float] | None = Field(
        None, description="{criterion: weight}: learn the weighted sum of `ratings`; default: an output for each"
    )
    step_separator: str = Field("\n", min_length=1, description="closes every step; its last token has the score")
    ensemble: int = Field(1, ge=1, le=256, description="members, trained together in one traversal")
    ensemble_of: Literal["adapters", "heads"] = Field("adapters", description="heads share one adapter")
    bound: bool = Field(False, description="keep what the bound of reward_combine for one model needs, (D, D)")
    bound_ridge: float = Field(1.0, gt=0, description="lambda of Sigma = lambda I + sum over the training pairs")
    center_on: str = Field("train", description="answers of mean score 0: train, held_out, or data with completions")


def prepare(config: AlgorithmConfig) -> RewardJob:
    """The roles of the members, each a fresh adapter, or one that starts from a saved adapter, and a head."""
    backbone, tokenizer, saved = build_model(config)
    encoder = build_encoder(config, backbone, tokenizer)
    data = load_judged(config, encoder)
    outputs = add_members(backbone, config, saved, data.outputs)
    backbone.enable_checkpointing(bool(config.gradient_checkpointing))
    optimizers = {role: adamw(backbone.parameters_of(role), config) for role in backbone.reward_roles}
    return RewardJob(backbone, encoder, data.train, data.held_out, optimizers, outputs=outputs, data=data)


def train(job: RewardJob, config: AlgorithmConfig, run: Run) -> None:
    supervised.train(job, config, run, loss_of(job, config))


def loss_of(job: RewardJob, config: AlgorithmConfig) -> Loss[Rows]:
    """The mean over a batch's judgements and a head's outputs; the adapters of an ensemble add up, and so learn as each
    would alone."""

    def loss(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        judged = [job.train[i] for i in rows.indices]
        scores, _ = member_scores(job, config, rows.batch, judged)
        mean, metrics = LOSSES[judged[0].form](config, scores, judged, rows.examples, rows.tokens)
        return mean * len(job.optimizers), {**metrics, "loss": mean}

    return loss


def pairs(config: AlgorithmConfig, scores: Tensor, judged: Sequence[Judgement], pairs: int, ends: int) -> OpLoss:
    """Bradley-Terry. scores: (S, M), S the ends of `judged`, as in every function here; ends, pairs: how many the
    whole batch has."""
    outputs = scores.shape[1]
    margins, chances = targets_of(judged, scores).unbind(1)
    return reward_loss(
        scores[::2].flatten(), scores[1::2].flatten(), margin=margins.repeat_interleave(outputs),
        preferences=chances.repeat_interleave(outputs), label_smoothing=config.label_smoothing,
        centring=config.centring, denominator=pairs * outputs,
    )  # fmt: skip


def rankings(config: AlgorithmConfig, scores: Tensor, judged: Sequence[Judgement], prompts: int, ends: int) -> OpLoss:
    outputs = scores.shape[1]
    ranks = torch.tensor([int(rank) for one in judged for rank in one.targets], device=scores.device)
    prompt = torch.tensor([i for i, one in enumerate(judged) for _ in one.ends], device=scores.device)
    groups = prompt[:, None] * outputs + torch.arange(outputs, device=scores.device)
    return ranking_loss(
        scores.flatten(), ranks.repeat_interleave(outputs), group_ids=groups.flatten(), variant=config.ranking,
        denominator=prompts * outputs,
    )  # fmt: skip


def ratings(config: AlgorithmConfig, scores: Tensor, judged: Sequence[Judgement], answers: int, ends: int) -> OpLoss:
    """Half the squared error to the standardised ratings, one criterion an output."""
    errors = scores - targets_of(judged, scores)
    return OpLoss(errors.square().sum() / (2 * answers * scores.shape[1]), {})


def labels(config: AlgorithmConfig, scores: Tensor, judged: Sequence[Judgement], examples: int, ends: int) -> OpLoss:
    """Binary cross-entropy, for likes and steps alike; the score is the logit."""
    said = torch.tensor([label for one in judged for label in one.targets], device=scores.device)
    return step_reward_loss(scores, said[:, None].expand(scores.shape), denominator=ends * scores.shape[1])


LOSSES = {"pairs": pairs, "rankings": rankings, "ratings": ratings, "likes": labels, "steps": labels}


def evaluate(job: RewardJob, config: AlgorithmConfig) -> dict[str, Any]:
    """Loss, accuracy, calibration and what else the judgements tell, on those held out; see reward_report."""
    scores = all_scores(job, config, job.held_out)
    loss, _ = LOSSES[job.held_out[0].form](config, scores, job.held_out, len(job.held_out), len(scores))
    return {"metrics": {"loss": float(loss), **measures(job.judged(scores), job.held_out)[0]}, "samples": []}


def save(job: RewardJob, config: AlgorithmConfig, folder: Path) -> None:
    """The members, their statistics and what the bound needs; the report on the held-out judgements."""
    save_members(job, config, folder)
    write_report(folder, measures(job.judged(all_scores(job, config, job.held_out)), job.held_out)[1])
