"""Mean and variance of what a mask counts, for the peers that whiten what it does not count as well."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean, variance over n - 1), () float64 each, of what the mask counts; the variance of fewer than two is 0."""
    counts = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool().expand_as(x)
    number, exact = counts.sum(), torch.where(counts, x, 0).double()
    mean = exact.sum() / number
    squares = torch.where(counts, exact - mean, 0).square().sum()
    return mean, squares / (number - 1).clamp(min=1)
