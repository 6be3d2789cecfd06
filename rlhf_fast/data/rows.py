"""Sequences of rows that hold no row: some of others, in an order of their own."""

from collections.abc import Sequence
from typing import overload

from rlhf_fast.data.reading import Row


class Picked(Sequence[Row]):
    """The rows `places` of `rows`."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.rows[int(place)] for place in self.places[index]]
        return self.rows[int(self.places[index])]
