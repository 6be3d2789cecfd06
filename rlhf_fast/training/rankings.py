"""Several answers to one prompt in an order of preference, and the loss of their implicit rewards.

DPO from rankings: the log-likelihood of the ranking under Plackett-Luce, with beta (log pi - log ref) of each answer as
its reward. Source: Rafailov et al. 2023 (2305.18290), appendix A.3; ties and
other variants: ops/rewards/ranking_loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.encoding import Encoder, Example
from rlhf_fast.data.layouts import JUDGEMENTS
from rlhf_fast.data.reading import Row, shown
from rlhf_fast.errors import UserError
from rlhf_fast.ops.core.loss import Loss
from rlhf_fast.ops.rewards.ranking_loss import ranking_loss
from rlhf_fast.training.config import Config
from rlhf_fast.training.setup import load_rows


@dataclass(frozen=True)
class Ranking:
    """answers: to one prompt. ranks: of each, 1 the best, equal ones a tie."""

    answers: tuple[Example, ...]
    ranks: tuple[int, ...]


def load_ranking_rows(config: Config) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training, held-out) rows with the columns prompt, completions, and ranks or scores."""
    return load_rows(config, JUDGEMENTS["rankings"])


def encode_ranking(encoder: Encoder, row: Row) -> Ranking:
    """The row's answers that have a rank or a score; UserError where these tell no two apart."""
    column = "ranks" if "ranks" in row.values else "scores"
    texts, said = row.values["completions"], row.values[column]
    if not isinstance(texts, list) or not isinstance(said, list) or len(texts) != len(said):
        raise UserError(f"{row.where}: completions and {column} must be lists of one length, got {shown(said)}")
    kept = [(text, _order(row, column, value)) for text, value in zip(texts, said, strict=True) if value is not None]
    orders = [order for _, order in kept]
    if len(set(orders)) < 2:
        raise UserError(f"{row.where}: {column} {shown(said)} tell no two answers apart")
    answers = encoder.answers(Row(row.where, {**row.values, "completions": [text for text, _ in kept]}))
    return Ranking(tuple(answers), tuple(1 + sum(other < order for other in orders) for order in orders))


def _order(row: Row, column: str, value: Any) -> float:
    """Smaller is better."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{row.where}: {column} must be finite numbers or null, got {shown(value)}")
    return float(value) if column == "ranks" else -float(value)


def padded_rows(values: Tensor, rankings: Sequence[Ranking], width: int) -> Tensor:
    """(N,), a number for each answer of all rankings in order -> (rankings, width), 0 behind each one's answers."""
    rows = values.split([len(ranking.answers) for ranking in rankings])
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


def implicit_ranking_loss(
    logprobs: Tensor, ref_logprobs: Tensor, rankings: Sequence[Ranking], *, beta: float, variant: str,
    denominator: float,
) -> Loss:  # fmt: skip
    """The sum over the rankings, over `denominator`.

    logprobs: (N,), of all answers in order, in nats. ref_logprobs: (rankings, K), each one's answers first.
    """
    sizes = torch.tensor([len(ranking.answers) for ranking in rankings])
    ids = torch.arange(len(rankings)).repeat_interleave(sizes).to(logprobs.device)
    ranks = torch.tensor([rank for ranking in rankings for rank in ranking.ranks], device=logprobs.device)
    references = torch.cat([row[:size] for row, size in zip(ref_logprobs, sizes.tolist(), strict=True)])
    rewards = beta * (logprobs - references)
    return ranking_loss(rewards, ranks, group_ids=ids, variant=variant, denominator=denominator)
