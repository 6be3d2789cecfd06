"""Which rows a loss from hidden states takes together, and how many of them fit its scratch budget.

A loss couples rows: its derivative by the log-probability of a row depends on that row alone ("token"), on the rows of
its sequence ("sequence"), on those of its pair of sequences ("pair"), or on all of them ("batch"). Such rows are a
unit. A group is whole units whose logits are in the budget at once, in one tile, or one unit that is too long for
that, in several tiles. Where all rows of a sequence have one derivative, a unit that is too long can also be summed:
taken sequence by sequence, each in tiles of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.head.tiles import chunks, counted_rows


class Plan(NamedTuple):
    """order: indices of the rows to take, unit by unit (None: all rows as they stand); groups: tiles of that order.

    summed: the units to sum, as the tiles of each of their sequences. masked: whether rows behind the mask may be among
    those that are taken.
    """

    order: Tensor | None
    groups: list[list[slice]]
    summed: list[list[list[slice]]]
    masked: bool

    def rows(self, tile: slice) -> slice | Tensor:
        """What picks the rows of `tile` out of a tensor over all rows."""
        return tile if self.order is None else self.order[tile]

    @property
    def height(self) -> int:
        """The rows of the highest tile."""
        groups = [*self.groups, *(tiles for unit in self.summed for tiles in unit)]
        return max((tile.stop - tile.start for group in groups for tile in group), default=0)


def make(coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None, device: torch.device,
         tile_rows: int, held_rows: int, summed_rows: int = 0, mask_count: int | None = None) -> Plan:  # fmt: skip
    """The plan for rows of `shape` (B, T) or (N,): tiles of `tile_rows`, of up to `held_rows` where a unit needs it.

    summed_rows: the rows in a tile of units of sequences or pairs that are too long; 0: they are not summed.
    A pair is sequences b and b + B / 2. On the CPU rows behind the mask are left out. On another device neither mask
    nor cu_seqlens can be read without waiting: packed sequences are one unit, and all rows are taken, or with
    `mask_count`, an upper bound of those that count, so many of them with these first.
    """
    count = int(torch.Size(shape).numel())
    if device.type == "cpu":
        order, ends, cuts = _units_by_value(coupling, shape, cu_seqlens, mask)
    else:
        counted = counted_rows(None if mask is None else mask.view(-1), mask_count)
        order, ends, cuts = _units_by_shape(coupling, shape, cu_seqlens, counted, device)
    count = count if order is None else order.shape[0]
    masked = device.type != "cpu" and mask is not None
    if coupling == "token":
        return Plan(order, [[tile] for tile in chunks(count, tile_rows)], [], masked)
    groups, summed = [], []
    for start, stop in _joined([count] if ends is None else ends, tile_rows):
        if stop - start <= held_rows or not summed_rows or cuts is None:
            groups.append(_tiles(start, stop, held_rows))
        else:
            bounds = [start, *(cut for cut in cuts if start < cut < stop), stop]
            summed.append([_tiles(a, b, summed_rows) for a, b in pairwise(bounds)])
    return Plan(order, groups, summed, masked)


# Order, where each unit ends in it (None: all rows are one), where each sequence ends in it (None: not known).
_Units = tuple[Tensor | None, Sequence[int] | None, Sequence[int] | None]


def _units_by_value(coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None) -> _Units:
    """Of the rows that count."""
    if coupling in ("token", "batch"):
        return None if mask is None else mask.view(-1).nonzero()[:, 0], None, None
    lengths = torch.full((shape[0],), shape[-1]) if cu_seqlens is None else cu_seqlens.diff()
    sequence = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    unit = sequence % max(1, lengths.shape[0] // 2) if coupling == "pair" else sequence
    order = unit.argsort(stable=True)
    if mask is not None:
        order = order[mask.view(-1)[order] != 0]
    cuts = sequence[order].unique_consecutive(return_counts=True)[1].cumsum(0)
    return order, unit[order].bincount().cumsum(0).tolist(), cuts.tolist()


def _units_by_shape(
    coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, counted: Tensor | None, device: torch.device
) -> _Units:
    """Of the rows `counted` as one unit, or of all rows (None).

    Where sequences end among the counted rows is not known, and one unit that is too long costs up to 4P, sequences 3P:
    with known sequences all rows are taken unless fewer than three quarters count.
    """
    count = int(torch.Size(shape).numel())
    if coupling in ("token", "batch") or cu_seqlens is not None:
        return counted, None, None
    if counted is not None and 4 * counted.shape[0] < 3 * count:
        return counted, None, None
    cuts = range(shape[1], count + 1, shape[1])
    if coupling == "sequence":
        return None, cuts, cuts
    order = torch.arange(count, device=device).view(2, -1, shape[1]).transpose(0, 1).reshape(-1)
    return order, range(2 * shape[1], count + 1, 2 * shape[1]), cuts


def _tiles(start: int, stop: int, rows: int) -> list[slice]:
    return [slice(start + c.start, start + c.stop) for c in chunks(stop - start, rows)]


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
