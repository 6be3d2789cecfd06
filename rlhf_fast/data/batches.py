"""Which examples a step takes, and how rows of different length become one rectangle."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_fast.data.encoding import Example

_ROUNDS = 12  # of the network: with four, the orders of five rows are not equally frequent


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

    def packed(self) -> "Batch":
        """In int32 and bool: 6 bytes for a token in the place of 24."""
        return Batch(self.input_ids.int(), self.attention_mask.bool(), self.mask.bool(), self.counts)

    def unpacked(self) -> "Batch":
        """What was packed."""
        return Batch(self.input_ids.long(), self.attention_mask.long(), self.mask.long(), self.counts)

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


def held_out_indices(keys: Sequence[str] | NDArray[np.uint64], size: int, seed: int) -> list[int]:
    """At most `size` of the indices of `keys`, in order, drawn by `seed`; equal keys are drawn together or not at all.

    Where every group of equal keys is larger than `size`, it is the smallest group. A pure function of its arguments.
    """
    _, first, group, sizes = np.unique(np.asarray(keys), return_index=True, return_inverse=True, return_counts=True)
    appearing = first.argsort()
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = appearing[order]
    drawn, left = [], size
    for number, count in zip(shuffled.tolist(), sizes[shuffled].tolist(), strict=True):
        if count <= left:
            drawn.append(number)
            left -= count
        if not left:
            break
    return np.flatnonzero(np.isin(group, drawn or shuffled[sizes[shuffled].argmin()])).tolist()


def shuffled_indices(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries `start` to `start + count` of an endless order in which every epoch is a fresh permutation.

    A pure function of its arguments, in time O(count): a resumed run continues mid-epoch by passing how many it has
    taken.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        places = np.arange(offset, min(size, offset + count - len(indices)), dtype=np.uint64)
        indices += permuted(places, size, f"{seed} {epoch}").tolist()
    return indices


def permuted(places: NDArray[np.uint64], size: int, key: str) -> NDArray[np.uint64]:
    """Where the permutation of range(size) that `key` names takes `places`.

    A Feistel network on the smallest grid that holds `size` cells; what leaves the range walks on along its cycle.
    Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
    """
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    columns, rows = np.uint64(width), np.uint64(height)
    digest = hashlib.shake_128(f"{key} {size}".encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    moved, outside = places.copy(), np.ones(len(places), dtype=bool)
    while outside.any():
        row, column = np.divmod(moved[outside], columns)
        for one, other in zip(keys[::2], keys[1::2], strict=True):
            column = (column + _mixed(row ^ one)) % columns
            row = (row + _mixed(column ^ other)) % rows
        moved[outside] = row * columns + column
        outside = moved >= size
    return moved


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 bits that each depend on all bits of the value: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), less
    its top byte, so that sums with a place do not overflow."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (values ^ (values >> np.uint64(31))) >> np.uint64(8)
