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

from rlhf_fast.ops.head.tiles import Order, chunks, counted_rows


class Plan(NamedTuple):
    """Groups of tiles of an order that goes unit by unit.

    summed: the units to sum, as the tiles of each of their sequences.
    """

    order: Order
    groups: list[list[slice]]
    summed: list[list[list[slice]]]

    @property
    def slices(self) -> list[slice]:
        """All tiles."""
        groups = [*self.groups, *(tiles for unit in self.summed for tiles in unit)]
        return [tile for group in groups for tile in group]


def make(coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None, device: torch.device,
         tile_rows: int, held_rows: int, summed_rows: int = 0, mask_count: int | None = None) -> Plan:  # fmt: skip
    """The plan for rows of `shape` (B, T) or (N,): tiles of `tile_rows`, of up to `held_rows` where a unit needs it.

    summed_rows: the rows in a tile of units of sequences or pairs that are too long; 0: they are not summed.
    A pair is sequences b and b + B / 2. On the CPU rows behind the mask are left out. On another device neither mask
    nor cu_seqlens can be read without waiting: packed sequences are one unit, and all rows are taken, or with
    `mask_count`, an upper bound of those that count, so many of them with these first.
    """
    mask = None if mask is None else mask.view(-1)
    by_value = device.type == "cpu"
    units = _units_by_value if by_value else _units_by_shape
    index, ends, cuts = units(coupling, shape, cu_seqlens, mask, mask_count, device)
    count = int(torch.Size(shape).numel()) if index is None else index.shape[0]
    order = Order(index, count, masked=not by_value and mask is not None)
    if coupling == "token":
        return Plan(order, [[tile] for tile in chunks(count, tile_rows)], [])
    groups, summed = [], []
    for start, stop in _joined([count] if ends is None else ends, tile_rows):
        if stop - start <= held_rows or not summed_rows or cuts is None:
            groups.append(chunks(stop - start, held_rows, start))
        else:
            bounds = [start, *(cut for cut in cuts if start < cut < stop), stop]
            summed.append([chunks(b - a, summed_rows, a) for a, b in pairwise(bounds)])
    return Plan(order, groups, summed)


# Index of the order, where each unit ends in it (None: all rows are one), where each sequence does (None: not known).
_Units = tuple[Tensor | None, Sequence[int] | None, Sequence[int] | None]


def _units_by_value(
    coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None, mask_count: int | None,
    device: torch.device,
) -> _Units:  # fmt: skip
    """Of the rows that count."""
    if coupling in ("token", "batch"):
        return None if mask is None else mask.nonzero()[:, 0], None, None
    lengths = torch.full((shape[0],), shape[-1]) if cu_seqlens is None else cu_seqlens.diff()
    sequence = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    unit = sequence % max(1, lengths.shape[0] // 2) if coupling == "pair" else sequence
    index = unit.argsort(stable=True)
    if mask is not None:
        index = index[mask[index] != 0]
    cuts = sequence[index].unique_consecutive(return_counts=True)[1].cumsum(0)
    return index, unit[index].bincount().cumsum(0).tolist(), cuts.tolist()


def _units_by_shape(
    coupling: str, shape: Sequence[int], cu_seqlens: Tensor | None, mask: Tensor | None, mask_count: int | None,
    device: torch.device,
) -> _Units:  # fmt: skip
    """Of the rows that `mask_count` leaves as one unit, or of all rows.

    Where sequences end among fewer rows is not known, and one unit that is too long costs up to 4P, sequences 3P: with
    known sequences all rows are taken unless fewer than three quarters count.
    """
    count = int(torch.Size(shape).numel())
    counted = counted_rows(count, mask, mask_count).rows
    if coupling in ("token", "batch") or cu_seqlens is not None:
        return counted, None, None
    if counted is not None and 4 * counted.shape[0] < 3 * count:
        return counted, None, None
    cuts = range(shape[1], count + 1, shape[1])
    if coupling == "sequence":
        return None, cuts, cuts
    index = torch.arange(count, device=device).view(2, -1, shape[1]).transpose(0, 1).reshape(-1)
    return index, range(2 * shape[1], count + 1, 2 * shape[1]), cuts


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
