"""A vocabulary split over the ranks of a process group: each holds the head's rows of consecutive ids, in rank order.

The row statistics of the shards merge without cancellation. With m_r, rest_r, H_r those of rank r's ids alone,
m = max_r m_r, S_r = exp(m_r - m) (1 + rest_r) and w one rank with m_w = m:

    rest    = rest_w + sum_{r != w} S_r                 P_r = S_r / (1 + rest), the probability of the shard
    logprob = (z_y - m) - log1p(rest)                   z_y - m = 0 for the maximal element, exactly
    entropy = sum_r P_r (H_r - log P_r)                 the chain rule of entropy: all terms are positive
    sum p^2 = sum_r P_r^2 (sum p^2)_r

Source: Megatron-LM's vocabulary-parallel cross entropy, Shoeybi et al. 2019 (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.core import check


class Shards(NamedTuple):
    """The ranks among which a vocabulary is split; `group` is the name of their process group, "" for a whole head."""

    group: str = ""
    ranks: int = 1
    rank: int = 0

    def local_ids(self, targets: Tensor, mask: Tensor | None, vocabulary: int) -> Tensor:
        """Ids counted from the first of this rank's `vocabulary`; those of other ranks are outside [0, vocabulary)."""
        per_row = targets.shape[1] if targets.dim() > 1 else 1
        if not self.group:
            check.targets_inside(targets, mask, vocabulary, per_row)
            return targets
        sizes = self.gather(targets.new_tensor([vocabulary]))[:, 0]
        if check.looks_at_values(targets.device):
            check.targets_inside(targets, mask, int(sizes.sum()), per_row)
        return targets - sizes[: self.rank].sum()

    def gather(self, x: Tensor) -> Tensor:
        """(ranks, *x.shape): x of every rank."""
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x, self.ranks, self.group)
        return torch.ops._c10d_functional.wait_tensor(gathered).view(self.ranks, *x.shape)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in the same order on each."""
        if not self.group:
            return x
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", self.group))

    def merged(self, stats: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        """[logprobs, entropy, row_max, row_logsum, sum_p_squared] over all ids, from those over this rank's ids.

        One all_gather of 4 + K numbers per row, K targets per row. mask: of these rows, elsewhere the results are 0.
        """
        logprobs, entropy, row_max, row_logsum, squares = stats
        planes = [row_max, row_logsum, *(x if x.numel() else torch.zeros_like(row_max) for x in (entropy, squares))]
        targets = logprobs.reshape(*row_max.shape, -1).movedim(-1, 0)  # (K, 1, n), NaN where y is another rank's
        # z_y - m_r; for the maximal element it is 0, where logprob + logsum might be rounded
        below = torch.where(targets == -row_logsum, 0, targets + row_logsum)
        maxes, logsums, entropies, sums, *belows = self.gather(torch.cat([torch.stack(planes), below])).unbind(1)
        top, winner = maxes.max(0)
        is_winner = torch.arange(self.ranks, device=top.device).view(-1, 1, 1) == winner
        rests = torch.expm1(logsums)
        logsum = torch.log1p(torch.where(is_winner, rests, torch.exp(maxes - top) * (1 + rests)).sum(0))
        log_share = (maxes - top) + (logsums - logsum)
        share = torch.exp(log_share)  # 0 of a shard whose tokens are all forbidden, and that has no statistics else
        merged = [
            torch.stack([_of_owner(b + (maxes - top)) - logsum for b in belows], -1).view(logprobs.shape),
            torch.where(share > 0, share * (entropies - log_share), 0).sum(0) if entropy.numel() else entropy,
            top,
            logsum,
            torch.where(share > 0, share.square() * sums, 0).sum(0) if squares.numel() else squares,
        ]
        return merged if mask is None else [_unmasked(x, mask) for x in merged]


def _of_owner(below: Tensor) -> Tensor:
    """(1, n): of (ranks, 1, n) the one that is not NaN; NaN where all are."""
    absent = below.isnan()
    return torch.where(absent.all(0), torch.nan, torch.where(absent, 0, below).sum(0))


def _unmasked(x: Tensor, mask: Tensor) -> Tensor:
    return x if x.numel() == 0 else torch.where(mask.view(*mask.shape, *[1] * (x.dim() - 2)) != 0, x, 0)
