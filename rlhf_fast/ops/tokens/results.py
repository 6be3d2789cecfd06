"""What token_logprobs and linear_logprobs return: log-probabilities, and what was asked for with them, in one order."""

# ruff: noqa: UP014 (a line for each)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of softmax(z) per row, each (...) in the type of the log-probabilities, without gradient."""

    lse: Tensor  # log sum_j exp(z_j), nats
    max: Tensor  # the greatest z
    p_max: Tensor  # the greatest probability
    sum_p_squared: Tensor  # sum_j p_j^2: the collision probability, 1 / the effective number of tokens


WithEntropy = NamedTuple("WithEntropy", [("logprobs", Tensor), ("entropy", Tensor)])
WithLse = NamedTuple("WithLse", [("logprobs", Tensor), ("lse", Tensor)])
WithStats = NamedTuple("WithStats", [("logprobs", Tensor), ("stats", RowStats)])
WithEntropyLse = NamedTuple("WithEntropyLse", [("logprobs", Tensor), ("entropy", Tensor), ("lse", Tensor)])
WithEntropyStats = NamedTuple("WithEntropyStats", [("logprobs", Tensor), ("entropy", Tensor), ("stats", RowStats)])
WithLseStats = NamedTuple("WithLseStats", [("logprobs", Tensor), ("lse", Tensor), ("stats", RowStats)])
WithAll = NamedTuple(
    "WithAll", [("logprobs", Tensor), ("entropy", Tensor), ("lse", Tensor), ("stats", RowStats)]
)  # fmt: skip
Scored = (
    Tensor | WithEntropy | WithLse | WithStats | WithEntropyLse | WithEntropyStats | WithLseStats | WithAll
)  # fmt: skip


def scored(logprobs: Tensor, entropy: Tensor | None, lse: Tensor | None, stats: RowStats | None) -> Scored:
    """`logprobs`, or a NamedTuple of it and of what is not None."""
    if entropy is None and lse is None:
        return logprobs if stats is None else WithStats(logprobs, stats)
    if entropy is None and lse is not None:
        return WithLse(logprobs, lse) if stats is None else WithLseStats(logprobs, lse, stats)
    assert entropy is not None
    if lse is None:
        return WithEntropy(logprobs, entropy) if stats is None else WithEntropyStats(logprobs, entropy, stats)
    return WithEntropyLse(logprobs, entropy, lse) if stats is None else WithAll(logprobs, entropy, lse, stats)


def row_stats(row_max: Tensor, row_logsum: Tensor, sum_p_squared: Tensor, mask: Tensor | None) -> RowStats:
    """RowStats of what the row kernels make."""
    p_max = torch.exp(-row_logsum)
    if mask is not None:
        p_max = torch.where(mask != 0, p_max, torch.zeros_like(p_max))
    # The backward pass reads what is copied here: callers may write into their statistics.
    return RowStats(row_max + row_logsum, row_max.clone(), p_max, sum_p_squared.clone())
