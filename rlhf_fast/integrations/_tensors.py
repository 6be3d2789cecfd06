"""Computations on tensors that several integrations share."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import token_logprobs


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def entropy_of_logits(logits: Tensor) -> Tensor:
    """Entropy (...) of softmax(logits), in nats; float32 (float64 for float64 logits)."""
    any_id = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, any_id, return_entropy=True)[1]


def moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean, variance over n - 1), () float64 each, of what the mask counts; the variance of fewer than two is 0."""
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool().expand_as(x)
    number, exact = counts.sum(), torch.where(counts, x, 0).double()
    mean = exact.sum() / number
    squares = torch.where(counts, exact - mean, 0).square().sum()
    return mean, squares / (number - 1).clamp(min=1)
