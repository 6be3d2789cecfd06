"""Answers of the data with what they are paid: the column `rating`, or what the run's reward says of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.data.batches import pad_batch
from rlhf_fast.data.encoded import Encoded
from rlhf_fast.data.encoding import Encoder, Example, Prompt
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.rollout import Rollout
from rlhf_fast.training import ranks
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import penalties, score
from rlhf_fast.training.job import Job
from rlhf_fast.training.pairs import number


@dataclass(frozen=True)
class Paid(Example):
    """prompt: of the completion, with the row's columns. reward: what it is paid; None: not said."""

    prompt: Prompt | None = None
    reward: float | None = None


def encode_paid(encoder: Encoder, row: Row) -> Paid:
    example = encoder.completion(row)
    prompt = Prompt(row.where, example.ids[: example.start], "", row.values)
    return Paid(example.ids, example.start, example.mask, prompt, number(row, "rating"))


def paid(job: Job, config: SamplingConfig, examples: Encoded[Paid]) -> Encoded[Paid]:
    """With what `reward` says of those that the data does not pay."""
    if not np.isnan(examples.numbers("paid", lambda example: example.reward)).any():
        return examples
    if job.rewards is None:
        raise UserError(f"{config.algorithm} needs a column rating, or a reward that judges the data's answers")
    judged: list[float] = []
    for start in range(0, len(examples), config.batch_size):
        part = examples[start : start + config.batch_size]
        texts = [str(job.encoder.tokenizer.decode(e.ids[e.start :], skip_special_tokens=True)) for e in part]
        batch = pad_batch(part, job.encoder.pad_id).to(job.device)
        rollout = Rollout([e.prompt for e in part if e.prompt], batch, texts, torch.ones(len(part), dtype=torch.bool))
        judged += rewards_of(job, config, rollout).tolist()
    rewards = ranks.from_first(lambda: judged)  # a judge may say something else to each process
    rows = zip(examples.rows, rewards, strict=True)
    return examples.of([Row(row.where, {**row.values, "rating": reward}) for row, reward in rows])


@torch.no_grad()
def rewards_of(job: Job, config: SamplingConfig, rollout: Rollout) -> Tensor:
    """(B,): what the job's rewards pay; the model is asked only where one of them is its adapter."""
    assert job.rewards is not None
    states: tuple[Tensor | None, ...] = ()
    if job.rewards.adapter is not None:
        scores = score(job, config, rollout, policy=False)[1]
        states = scores.scores, scores.features
    columns = rollout.columns() | {"completion_ids": rollout.completion_ids()}
    asked = [prompt.columns["prompt"] for prompt in rollout.prompts], rollout.completions, columns
    return job.rewards(*asked, *states).total - penalties(config, rollout)


def standardised(train: Encoded[Paid], held_out: Encoded[Paid]) -> tuple[Encoded[Paid], Encoded[Paid]]:
    """Rewards less the mean of the training data, over its deviation."""
    rewards = torch.from_numpy(train.numbers("paid", lambda example: example.reward))
    mean, std = float(rewards.mean()), float(rewards.std(correction=0))
    if not std:
        raise UserError(f"all {len(train)} answers are paid {mean:g}: there is nothing to tell them apart")

    def scaled(example: Paid) -> Paid:
        return replace(example, reward=((example.reward or 0.0) - mean) / std)

    return train.map(scaled), held_out.map(scaled)
