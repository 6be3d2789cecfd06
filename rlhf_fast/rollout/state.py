"""What one step of decoding begins with, and leaves to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class State:
    """What a step reads and advances, at fixed addresses: of each slot its last token, the place of that in its row,
    the row's number and that of its next token, (B,) int64 each; and the column that the token goes to, (1,)."""

    ids: Tensor
    places: Tensor
    numbers: Tensor
    steps: Tensor
    column: Tensor

    @classmethod
    def empty(cls, slots: int, device: torch.device) -> State:
        ids, places, numbers, steps = torch.zeros(4, slots, dtype=torch.int64, device=device)
        return cls(ids, places, numbers, steps, torch.zeros(1, dtype=torch.int64, device=device))

    def take(self, slots: Tensor) -> State:
        return State(self.ids[slots], self.places[slots], self.numbers[slots], self.steps[slots], self.column)

    def copy(self) -> State:
        return State(*(values.clone() for values in vars(self).values()))

    def become(self, other: State) -> None:
        for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            ours.copy_(theirs)

    def put(self, slots: Tensor, **values: Tensor) -> None:
        for name, of_slots in values.items():
            getattr(self, name)[slots] = of_slots

    def advance(self, ids: Tensor) -> None:
        self.ids.copy_(ids)
        for values in (self.places, self.steps, self.column):
            values += 1
