"""Answers of the data with what they are paid: the column `rating`, or what the run's reward says of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.data.encoded import Encoded
from rlhf_fast.data.encoding import Encoder, Example, Prompt
from rlhf_fast.data.reading import Row
from rlhf_fast.errors import UserError
from rlhf_fast.rollout import Rollout
from rlhf_fast.training import ranks
from rlhf_fast.training.config import SamplingConfig
from rlhf_fast.training.experience import everyone_alike, penalties, score
from rlhf_fast.training.job import Job
from rlhf_fast.training.pairs import number
from rlhf_fast.training.supervised import padded, shared_out


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
    judged = []
    with everyone_alike(job):
        for numbers, idle in shared_out(examples, config.batch_size):
            part = [examples[number] for number in numbers]
            texts = [str(job.encoder.tokenizer.decode(e.ids[e.start :], skip_special_tokens=True)) for e in part]
            finished = torch.ones(len(part), dtype=torch.bool)
            rollout = Rollout([e.prompt for e in part if e.prompt], padded(job, part), texts, finished)
            rewards = rewards_of(job, config, rollout, idle=idle)
            judged += [] if idle else [(numbers, rewards)]
    rows = zip(examples.rows, ranks.in_order(judged).tolist(), strict=True)
    return examples.of([Row(row.where, {**row.values, "rating": reward}) for row, reward in rows])


@torch.no_grad()
def rewards_of(job: Job, config: SamplingConfig, rollout: Rollout, *, idle: bool = False) -> Tensor:
    """(B,): what the job's rewards pay; the model is asked only where one of them is its adapter. idle: it alone."""
    assert job.rewards is not None
    states: tuple[Tensor | None, ...] = ()
    if job.rewards.adapter is not None:
        scores = score(job, config, rollout, policy=False)[1]
        states = scores.scores, scores.features
    if idle:
        return torch.zeros(0)
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
