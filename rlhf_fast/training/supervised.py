"""Learning from examples as they are: the loop of batches, and what a method's loss is given of one.

A method brings `loss(rows) -> (loss, metrics)`. Both are sums over the rows, divided by the numbers of the whole batch
(`Rows.examples`, `Rows.tokens`), so that micro-batches change nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.data.batches import Batch, pad_batch, shuffled_indices
from rlhf_fast.data.encoded import Encoded
from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.reading import Row
from rlhf_fast.training import halving, ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.halving import Parts
from rlhf_fast.training.job import Job, dropout_seed
from rlhf_fast.training.kept import Kept
from rlhf_fast.training.optim import Loss, accumulate, as_numbers, learning_rate, set_learning_rates, update
from rlhf_fast.training.pairs import Pair
from rlhf_fast.training.rankings import Ranking
from rlhf_fast.training.reward_data import Judgement
from rlhf_fast.training.run import Run

LAYOUTS = [("prompt", "completion"), ("messages",), ("text",)]  # of columns that are one sequence


class Rows(NamedTuple):
    """A micro-batch.

    indices: its examples. batch: their sequences, padded; of pairs first every chosen one, then every rejected one.
    examples, tokens: how many examples, and tokens to learn, the whole batch has. idle: see ranks.Part.
    """

    indices: list[int]
    batch: Batch
    examples: int
    tokens: int
    idle: bool = False


def encode(encoder: Encoder, row: Row) -> Example:
    """The tokens of a row of one of the LAYOUTS, and which are learnt: its completion, its answers, all of a text."""
    if {"prompt", "completion"} <= row.values.keys():
        return encoder.completion(row)
    return encoder.conversation(row) if "messages" in row.values else encoder.text(row)


def train(job: Job, config: Config, run: Run, loss: Loss[Rows]) -> None:
    """Batches of the training examples in shuffled order; one update per step."""
    for step, indices in batches(job, config, run):
        learn(job, config, run, step, indices, loss)


def batches(job: Job, config: Config, run: Run) -> Iterator[tuple[int, list[int]]]:
    """For each step, with the learning rates set, the training examples of its batch; those of the next one are encoded
    meanwhile."""

    def of(step: int) -> list[int]:
        return shuffled_indices(len(job.train), config.order_seed, step * config.batch_size, config.batch_size)

    for step in run.steps():
        set_learning_rates(job, config, step)
        if isinstance(job.train, Encoded) and step + 1 < config.steps:
            job.train.ahead(of(step + 1))
        yield step, of(step)


def learn(job: Job, config: Config, run: Run, step: int, indices: Sequence[int], loss: Loss[Rows]) -> dict[str, float]:
    """The update on one batch, recorded; its metrics."""
    parts = micro_batches(job, job.train, indices, config.micro_batch_size, whole=config.compares_rows, kept=job.kept)
    metrics = accumulate(loss, parts, job.kept)
    numbers = {**as_numbers(metrics), **update(job, config, metrics["loss"])}
    tokens = sum(len(sequence.ids) for sequence in sequences_of([job.train[i] for i in indices]))
    run.log(step, {**numbers, "learning_rate": learning_rate(config, step)}, tokens=tokens)
    return numbers


@torch.no_grad()
def held_out_metrics(job: Job, config: Config, loss: Loss[Rows]) -> dict[str, float]:
    """The loss and its metrics over all held-out examples, as one batch in parts."""
    size, totals = config.micro_batch_size or config.batch_size, defaultdict[str, float](float)

    def judged(rows: Rows) -> dict[str, float]:
        part, metrics = loss(rows)
        return {n: 0.0 if rows.idle else m for n, m in as_numbers({"loss": part, **metrics}).items()}

    parts = micro_batches(job, job.held_out, range(len(job.held_out)), size, whole=config.compares_rows)
    for made in halving.each(parts, judged):
        for name, value in (made or {}).items():
            totals[name] += value
    return dict(zip(totals, ranks.all_sum(torch.tensor([*totals.values()], dtype=torch.float64)).tolist(), strict=True))


def micro_batches(
    job: Job, data: Sequence[Any], indices: Sequence[int], size: int | None, *, whole: bool = False,
    kept: Kept | None = None,
) -> Parts[list[int], Rows]:  # fmt: skip
    """One batch, the examples `indices` of `data`: those of this process in parts of at most `size` examples.

    whole: the parts are those of one process, each in one of the processes. kept: what has done some of them before.
    """
    examples = [data[i] for i in indices]
    tokens = sum(sum(sequence.learnt[1:]) for sequence in sequences_of(examples))

    def make(places: list[int], idle: bool) -> Rows:
        part = [indices[place] for place in places]
        return Rows(part, padded(job, [data[i] for i in part]), len(indices), max(1, tokens), idle)

    return Parts(
        job, "update" if torch.is_grad_enabled() else "evaluation",
        lambda: shared_out(examples, size, together=(size or len(indices)) if whole else 1), make, whole=whole,
        before=None if kept is None else kept.before,
    )  # fmt: skip


def shared_out(examples: Sequence[Any], size: int | None, *, together: int = 1) -> list[ranks.Part]:
    """`ranks.share` of examples by their tokens."""
    costs = [sum(len(sequence.ids) for sequence in sequences_of([example])) for example in examples]
    return ranks.share(costs, size=size, together=together)


def padded(job: Job, examples: Sequence[Any]) -> Batch:
    """The sequences of the examples as one rectangle on the job's device."""
    return pad_batch(sequences_of(examples), job.encoder.pad_id).to(job.device)


def sequences_of(examples: Sequence[Any]) -> list[Example]:
    """What of the examples is a sequence of tokens; of pairs first every chosen one, then every rejected one; of judged
    answers the rows that they stand in; of rankings the answers of one behind those of the other."""
    if isinstance(examples[0], Judgement):
        return [row for one in examples for row in one.rows]
    if isinstance(examples[0], Ranking):
        return [answer for ranking in examples for answer in ranking.answers]
    if not isinstance(examples[0], Pair):
        return list(examples)
    return [*(pair.chosen for pair in examples), *(pair.rejected for pair in examples)]


def hidden_of(job: Job, config: Config, role: str | None, batch: Batch) -> Tensor:
    """(B, T, D): last hidden states of a role; in a pass that trains, with its dropout."""
    seed = dropout_seed(job, config)
    return job.backbone.hidden(batch.input_ids, batch.attention_mask, [role], dropout_seed=seed)[role]


def logprobs_of(job: Job, config: Config, role: str | None, batch: Batch) -> Tensor:
    """(B, T): log-probabilities of the tokens that count, under a role."""
    hidden = hidden_of(job, config, role, batch)
    return job.backbone.logprobs(hidden, batch.input_ids, batch.mask, mask_count=batch.count)


def answer_logprobs(job: Job, config: Config, role: str | None, batch: Batch) -> Tensor:
    """(B,): the log-probability of every sequence's tokens that count, together, in nats."""
    return logprobs_of(job, config, role, batch).sum(1)
