"""Groups of rewards: consecutive ones, as many in each, or those of equal ids in any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.core import check


class Groups(NamedTuple):
    """The groups of N rewards as kernels take them: consecutive ones of `size`, or order[offsets[g] : offsets[g + 1]].

    There are as many offsets as there could be groups, since the device alone knows their number; the last ones are
    empty.
    """

    order: Tensor | None  # (N,) int64
    offsets: Tensor | None  # (N + 1,) int64
    size: int  # 0 where there are offsets

    @classmethod
    def of(cls, group_size: int | None, group_ids: Tensor | None) -> Groups:
        """The groups of arguments that `check_groups` has taken."""
        if group_ids is None:
            return cls(None, None, group_size or 1)
        order, group = in_order(check.ids("group_ids", group_ids))
        return cls(order, torch.searchsorted(group, torch.arange(len(order) + 1, device=order.device)), 0)

    def count(self, rewards: Tensor) -> int:
        """How many groups there could be."""
        return rewards.shape[0] // self.size if self.offsets is None else self.offsets.shape[0] - 1


def in_order(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(order that brings equal ids together, the group of each of ids[order]: 0, 1, ...), (N,) each."""
    ids, order = ids.sort(stable=True)
    return order, torch.cat([ids.new_zeros(min(1, ids.shape[0])), (ids[1:] != ids[:-1]).cumsum(0)])


def check_groups(rewards: tuple[str, Tensor], group_size: int | None, group_ids: Tensor | None) -> None:
    """ValueError or TypeError where neither or both are given, or they do not fit the rewards (N, ...)."""
    count = rewards[1].shape[0]
    if (group_size is None) == (group_ids is None):
        shape = None if group_ids is None else tuple(group_ids.shape)
        raise ValueError(
            f"exactly one of group_size and group_ids is needed, got group_size={group_size} and group_ids={shape}"
        )
    if group_ids is not None:
        check.shaped("group_ids", group_ids, (count,), "(N,)")
        check.same_device(rewards, ("group_ids", group_ids))
        check.ids("group_ids", group_ids)
    if group_size is not None and (group_size < 1 or count % group_size != 0):
        raise ValueError(f"group_size must be >= 1 and divide the {count} {rewards[0]}, got {group_size}")


def ids_of(rewards: Tensor, group_size: int | None, group_ids: Tensor | None) -> Tensor:
    """(N,): the ids, or those of consecutive groups."""
    if group_ids is not None:
        return group_ids
    return torch.arange(rewards.shape[0], device=rewards.device) // (group_size or 1)
