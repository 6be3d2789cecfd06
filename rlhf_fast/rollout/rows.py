"""Completions in the making."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.ops.tokens.sample_tokens import Samples


@dataclass
class Row:
    """number: what its draws are keyed by. ids: the prompt, and the tokens that it had before, which were `first` many.
    left: how many it may still have.

    tokens: those sampled since. logprobs, drawn: of each, as in SamplerView."""

    number: int
    ids: list[int]
    first: int
    left: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.ids)


def told(samples: Samples) -> Tensor:
    """(3, B) float64, what `give` reads: in one tensor, which is fetched from a GPU at once."""
    return torch.stack([x.double() for x in (samples.ids, samples.full_logprobs, samples.logprobs)])


def give(rows: Sequence[Row | None], told: Tensor, stops: frozenset[int]) -> list[int]:
    """A token to each row, (B,); None takes none. The places of those that this ends."""
    ended = []
    for place, (row, token, logprob, drawn) in enumerate(zip(rows, *told.tolist(), strict=True)):
        if row is None:
            continue
        if logprob != logprob:
            raise UserError("the policy's logits are not finite: a lower learning_rate, or a model without NaN")
        row.tokens.append(int(token))
        row.logprobs.append(logprob)
        row.drawn.append(drawn)
        if row.tokens[-1] in stops or len(row.tokens) == row.left:
            ended.append(place)
    return ended
