"""Which rows a loss from hidden states takes together, and how many of them fit its scratch budget.

A loss couples rows: its derivative by the log-probability of a row depends on that row alone ("token"), on the rows of
its sequence ("sequence"), on those of its pair of sequences ("pair"), or on all of them ("batch"). Such rows are a
unit. A group is whole units whose logits are in the budget at once, in one tile, or one unit that is too long for
that, in several tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops._head import chunks


class Plan(NamedTuple):
    """order: indices of the rows to take, unit by unit (None: all rows as they stand); groups: tiles of that order."""

    order: Tensor | None
    groups: list[list[slice]]

    def rows(self, tile: slice) -> slice | Tensor:
        """What picks the rows of `tile` out of a tensor over all rows."""
        return tile if self.order is None else self.order[tile]


def make(coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None, device: torch.device,
         tile_rows: int, held_rows: int) -> Plan:  # fmt: skip
    """The plan for rows of `shape` (B, T) or (N,): tiles of `tile_rows`, of up to `held_rows` where a unit needs it.

    A pair is sequences b and b + B / 2. On the CPU rows behind the mask are left out. On another device neither mask
    nor cu_seqlens can be read without waiting: all rows are taken, and packed sequences are one unit.
    """
    count = int(torch.Size(shape).numel())
    if device.type == "cpu":
        order, ends = _units_by_value(coupling, shape, cu_seqlens, mask)
    else:
        order, ends = _units_by_shape(coupling, shape, cu_seqlens, device)
    count = count if order is None else order.shape[0]
    if coupling == "token":
        groups = [[tile] for tile in chunks(count, tile_rows)]
    else:
        spans = _joined([count] if ends is None else ends, tile_rows)
        groups = [
            [slice(start + c.start, start + c.stop) for c in chunks(stop - start, held_rows)] for start, stop in spans
        ]
    return Plan(order, groups)


def _units_by_value(
    coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Sequence[int] | None]:
    """(order, where each unit ends in it or None for all rows as one), of the rows that count."""
    if coupling in ("token", "batch"):
        return None if mask is None else mask.view(-1).nonzero()[:, 0], None
    lengths = torch.full((shape[0],), shape[-1]) if cu_seqlens is None else cu_seqlens.diff()
    unit = torch.arange(lengths.shape[0])
    if coupling == "pair":
        unit %= max(1, lengths.shape[0] // 2)
    unit = unit.repeat_interleave(lengths)
    order = unit.argsort(stable=True)
    if mask is not None:
        order = order[mask.view(-1)[order] != 0]
    return order, unit[order].bincount().cumsum(0).tolist()


def _units_by_shape(
    coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor | None, Sequence[int] | None]:
    """(order, where each unit ends in it or None for all rows as one), of all rows."""
    count = int(torch.Size(shape).numel())
    if coupling in ("token", "batch") or cu_seqlens is not None:
        return None, None
    if coupling == "sequence":
        return None, range(shape[1], count + 1, shape[1])
    order = torch.arange(count, device=device).view(2, -1, shape[1]).transpose(0, 1).reshape(-1)
    return order, range(2 * shape[1], count + 1, 2 * shape[1])


def _joined(ends: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of as many units at a time as `rows` hold, at least one; `ends` says where each unit ends."""
    start = stop = 0
    for end in ends:
        if end - start > rows and stop > start:
            yield start, stop
            start = stop
        stop = end
    if stop > start:
        yield start, stop
