"""Which examples a step takes, and how rows of different length become one rectangle."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.data.encoding import Example


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. input_ids, attention_mask, mask: (B, T) int64; mask 1 marks the tokens that count.

    counts: (B,) int64, how many tokens of each row count; on the CPU, so that asking waits for no GPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def count(self) -> int:
        """How many tokens count."""
        return int(self.counts.sum())

    def rows(self, index: Tensor | slice) -> "Batch":
        """The chosen rows, padding unchanged. index: on the CPU."""
        return Batch(self.input_ids[index], self.attention_mask[index], self.mask[index], self.counts[index])

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.mask.to(device), self.counts)


def pad_batch(sequences: Sequence[Example], pad: int) -> Batch:
    """(B, T) rectangle of `sequences`, T the longest. The mask marks what is learnt; t = 0 has no
    prediction and never counts."""
    shape = (len(sequences), max(len(s.ids) for s in sequences))
    input_ids = torch.full(shape, pad)
    attention_mask, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        input_ids[i, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention_mask[i, : len(sequence.ids)] = 1
        mask[i, : len(sequence.ids)] = torch.tensor(sequence.learnt)
    mask[:, 0] = 0
    return Batch(input_ids, attention_mask, mask, mask.sum(1))


def held_out_indices(keys: Sequence[str], size: int, seed: int) -> list[int]:
    """At most `size` of the indices of `keys`, in order, drawn by `seed`; equal keys are drawn together or not at all.

    Where every group of equal keys is larger than `size`, it is the smallest group. A pure function of its arguments.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    values = list(groups.values())
    shuffled = [values[i] for i in order]
    drawn: list[int] = []
    for group in shuffled:
        if len(drawn) + len(group) <= size:
            drawn += group
    return sorted(drawn or min(shuffled, key=len))


def shuffled_indices(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries `start` to `start + count` of an endless order in which every epoch is a fresh permutation.

    A pure function of its arguments: a resumed run continues mid-epoch by passing how many it has taken.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        indices += order[offset : offset + count - len(indices)]
    return indices
