"""Pairs with their own text, for a reward to judge the answers of the data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.conversations import plain
from rlhf_fast.data.encoding import Encoder
from rlhf_fast.data.reading import Row
from rlhf_fast.training import ranks
from rlhf_fast.training.config import Config
from rlhf_fast.training.experience import everyone_alike
from rlhf_fast.training.job import Job
from rlhf_fast.training.pairs import Pair, encode_pair
from rlhf_fast.training.supervised import hidden_of, padded, sequences_of, shared_out


@dataclass(frozen=True)
class JudgedPair(Pair):
    """columns: the row's, in which chosen and rejected are text or messages."""

    columns: dict[str, Any] = field(default_factory=dict)


def encode_judged(encoder: Encoder, row: Row) -> JudgedPair:
    return JudgedPair(**vars(encode_pair(encoder, row)), columns=row.values)


@torch.no_grad()
def rewards_of(job: Job, config: Config, pairs: Sequence[JudgedPair]) -> Tensor:
    """(pairs, 2) fp32: what the job's rewards pay for the chosen and the rejected answers."""
    assert job.rewards is not None
    own, scored = list[int](), []
    for rows, idle in shared_out(pairs, config.micro_batch_size or config.batch_size):
        if job.rewards.adapter is not None:
            batch = padded(job, [pairs[row] for row in rows])
            hidden = hidden_of(job, config, "reward", batch)
            of_rows = job.backbone.scores("reward", hidden, batch.attention_mask).view(2, -1)
            scored += [] if idle else [of_rows]
        own += [] if idle else rows
    scores = torch.cat(scored, dim=1).flatten() if scored else None
    with everyone_alike(job):
        made = [(own, _judged(job, [pairs[row] for row in own], scores))] if own else []
    return ranks.in_order(made).to(job.device)


def _judged(job: Job, pairs: Sequence[JudgedPair], scores: Tensor | None) -> Tensor:
    """(pairs, 2). scores: (2 pairs,), of the chosen ones, then of the rejected ones, by the job's reward adapter."""
    assert job.rewards is not None
    rows = [pair.columns for pair in pairs] * 2
    texts = [_text(pair.columns[name]) for name in ("chosen", "rejected") for pair in pairs]
    columns = {name: [row.get(name) for row in rows] for name in pairs[0].columns if name != "prompt"}
    columns["completion_ids"] = [example.ids[example.start :] for example in sequences_of(pairs)]
    return job.rewards([row.get("prompt", "") for row in rows], texts, columns, scores).total.view(2, -1).T


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "\n".join(plain(message.get("content")) for message in answer)
