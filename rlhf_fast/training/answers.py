"""Single answers that are liked or not: rows with a label, or pairs taken apart; and the answers of other prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.layouts import JUDGEMENTS, changed_rows
from rlhf_fast.data.messages import split_pair
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError
from rlhf_fast.ops.preference.unpaired_preference_loss import mismatched_kl
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.job import Job
from rlhf_fast.training.setup import load_rows
from rlhf_fast.training.supervised import padded, shared_out

LAYOUTS = [*JUDGEMENTS["likes"], *JUDGEMENTS["pairs"]]


@dataclass(frozen=True)
class Answer(Example):
    """An example with its label."""

    desirable: bool = True


def load_answer_rows(config: Config) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held-out) rows with the columns prompt, completion and label; a pair becomes two of them."""

    def split(rows: list[Row]) -> list[Row]:
        if "label" in rows[0].values:
            return rows
        pairs = changed_rows(rows, split_pair, skip=config.bad_rows == "skip")
        return [_half(row, name) for row in pairs for name in ("chosen", "rejected")]

    return load_rows(config, LAYOUTS, split)


def _half(row: Row, name: str) -> Row:
    others = {key: value for key, value in row.values.items() if key not in ("chosen", "rejected")}
    answer = {"prompt": row.values.get("prompt", ""), "completion": row.values[name], "label": name == "chosen"}
    return Row(f"{row.where} {name}", {**others, **answer})


def encode_answer(encoder: Encoder, row: Row) -> Answer:
    """The answer of a row. UserError for a label that is neither true nor false."""
    label = row.values["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise UserError(f"{row.where}: label must be true or false, got {shown(label)}")
    example = encoder.completion(row)
    return Answer(example.ids, example.start, example.mask, desirable=bool(label))


def mismatched(answers: Sequence[Example]) -> list[Example]:
    """Every prompt with the answer to another one: that of the row `shift` places before it.

    shift: from 1 on, the first for which no prompt, or else the fewest, meets an answer to itself. No answer where
    there is but one row.
    """
    prompts = [tuple(answer.ids[: answer.start]) for answer in answers]

    def own(shift: int) -> int:
        return sum(prompt == prompts[i - shift] for i, prompt in enumerate(prompts))

    if len(answers) < 2:
        return []
    shift = min(range(1, len(answers)), key=own)
    return [_joined(answer, answers[i - shift]) for i, answer in enumerate(answers)]


def _joined(prompt: Example, answer: Example) -> Example:
    ids = [*prompt.ids[: prompt.start], *answer.ids[answer.start :]]
    return Example(ids, prompt.start, [0] * prompt.start + answer.learnt[answer.start :])


@torch.no_grad()
def batch_kl(job: Job, config: Config, answers: Sequence[Answer]) -> Tensor:
    """(): KTO's z of a whole batch, in nats."""
    others, size = mismatched(answers), config.micro_batch_size or config.batch_size
    sums = [(list[int](), torch.zeros(0, 2, device=job.device))]
    for rows, idle in shared_out(others, size):
        batch = padded(job, [others[row] for row in rows])
        hidden = job.backbone.hidden(batch.input_ids, batch.attention_mask, ["policy", "reference"])
        logprobs = [
            job.backbone.logprobs(states, batch.input_ids, batch.mask, mask_count=batch.count).sum(1)
            for states in hidden.values()
        ]
        sums += [] if idle else [(rows, torch.stack(logprobs, dim=1))]
    return mismatched_kl(*ranks.in_order(sums).to(job.device).unbind(1))
