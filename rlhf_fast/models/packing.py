"""Rows of tokens as one row without padding, in which what several rows begin with alike stands once.

Linear layers, norms, adapters and the head work on every token by itself, so that they need no rows at all; attention
is told by a `Layout` which tokens each one reads. transformers' layers find it by its name, as any other attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf_fast_packed"
# What models hand to their attention that changes nothing in eval mode and without a cache.
HARMLESS = {
    "is_causal", "position_ids", "position_embeddings", "cache", "past_key_values", "past_key_value", "cache_position",
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "training",
    "dropout",
}  # fmt: skip
SHORTEST = 4  # tokens that rows must have in common
WORTHWHILE = 0.95  # of the tokens may be left: gathering the others is not free
NOWHERE = 1 << 40  # a position that nothing reads

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Sequences of about the same length, whose attention is one call; the shorter ones are padded on the right.

    queries: (b, q), the places of their tokens in the packed row. prefixes: (g, p), those of what the b / g sequences
    of each of g groups have before them, and starts: (g,), how much that is; None where they have nothing before them.
    """

    queries: Tensor
    prefixes: Tensor | None = None
    starts: Tensor | None = None
    _masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """(C, N, heads, D), (C, N, key heads, D), (C, N, key heads, E) -> (C, b x q, heads, E)."""
        copies = len(query)
        if (window, copies) not in self._masks:
            self._masks[window, copies] = self._mask(window, copies)
        mask = self._masks[window, copies]
        states = _attention(_taken(query, self.queries).flatten(0, 1), self._read(key), self._read(value), mask, **how)
        return states.reshape(copies, -1, *states.shape[2:])

    def _mask(self, window: int | None, copies: int) -> Tensor | None:
        """Which keys each query reads, (1 or C x b, 1, q, k) bool; None: those up to its own place."""
        own = torch.arange(self.queries.shape[1], device=self.queries.device)
        ours = theirs = own[None]
        if self.prefixes is not None and self.starts is not None:
            length = self.prefixes.shape[1]
            starts = self.starts[:1] if bool((self.starts == length).all()) else self.starts
            before = torch.arange(length, device=own.device).expand(len(starts), -1)
            ours = starts[:, None] + own
            theirs = torch.cat([before.masked_fill(before >= starts[:, None], NOWHERE), ours], 1)
        elif window is None or window >= len(own):
            return None
        distance = ours[:, :, None] - theirs[:, None, :]
        read = (distance >= 0) & (distance < (window or NOWHERE))
        if len(read) > 1:
            read = read.repeat_interleave(len(self.queries) // len(read), 0).repeat(copies, 1, 1)
        return read[:, None]

    def _read(self, x: Tensor) -> Tensor:
        """(C, N, heads, D) -> (C x b, k, heads, D)."""
        own = _taken(x, self.queries)
        if self.prefixes is None:
            return own.flatten(0, 1)
        own = own.unflatten(1, (len(self.prefixes), -1))
        # Expanded, not taken once for each sequence: then their gradients are added up in an order.
        before = _taken(x, self.prefixes)[:, :, None].expand(-1, -1, own.shape[2], -1, -1, -1)
        return torch.cat([before, own], 3).flatten(0, 2)


@dataclass(frozen=True)
class Layout:
    """sources: (N,), the place of every packed token in the flattened rows. places: (B, T), where in the packed row the
    token of each row stands; that of padding is any. position_ids: (1, N). order: (N,), the place of every packed token
    in the queries of all blocks, one behind the other. segments: for flash-attn the places of what each sequence has
    before it and of its own tokens, in the order of the packed row.

    masked, told: the windows that the model asks masks for, and those that its layers tell their attention.
    """

    sources: Tensor
    places: Tensor
    position_ids: Tensor
    blocks: list[Block]
    order: Tensor
    segments: list[tuple[Places, Places]]
    masked: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)

    def pack(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return rows.flatten(0, 1).index_select(0, self.sources)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, N, D) -> (B, T, D); padding gets the state of some token."""
        return packed[0][self.places]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, **how: Any) -> Tensor:
        """(C, heads, N, D), (C, key heads, N, D), (C, key heads, N, E) -> (C, N, heads, E)."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        parts = [block.attend(query, key, value, window, **how) for block in self.blocks]
        return torch.cat(parts, 1).index_select(1, self.order)

    def attend_by_flash(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, *, scaling: float | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """`attend` by the kernels of flash-attn, whose causal attention ends at the last key of every sequence."""
        from flash_attn import flash_attn_varlen_func

        copies, places = len(query), self._flash_places
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        states = flash_attn_varlen_func(
            query.flatten(0, 1), *(x.index_select(1, places.keys).flatten(0, 1) for x in (key, value)),
            *(torch.cat([ends.new_zeros(1), *(ends + i * ends[-1] for i in range(copies))])
              for ends in (places.query_ends, places.key_ends)),
            places.longest_query, places.longest_key, softmax_scale=scaling, causal=True, softcap=softcap or 0.0,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )  # fmt: skip
        return states.unflatten(0, (copies, -1))

    @cached_property
    def _flash_places(self) -> FlashPlaces:
        keys = [np.concatenate(segment) for segment in self.segments]
        own, read = [len(own) for _, own in self.segments], list(map(len, keys))
        device = self.order.device
        query_ends, key_ends = (torch.tensor(lengths, device=device).cumsum(0).int() for lengths in (own, read))
        return FlashPlaces(torch.from_numpy(np.concatenate(keys)).to(device), query_ends, key_ends, max(own), max(read))


class FlashPlaces(NamedTuple):
    """keys: (K,), the places of what each sequence reads, one behind the other. query_ends, key_ends: (sequences,)
    int32, where those of each sequence end."""

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """(C, N, ...), (a, b) -> (C, a, b, ...)."""
    return x.index_select(1, places.flatten()).unflatten(1, places.shape)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """(b, q, heads, D), (b, k, key heads, D), (b, k, key heads, E) -> (b, q, heads, E)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if softcap is None:
        states = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        return states.transpose(1, 2)
    each = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = (softcap * (scores / softcap).tanh()).masked_fill(~mask, float("-inf"))
    return (scores.float().softmax(-1).to(value.dtype) @ value).transpose(1, 2)


class Unit(NamedTuple):
    """Places in the packed row: of what one or more sequences have before them, if anything, and of each of these."""

    prefix: Places
    own: list[Places]

    def resembles(self, other: Unit) -> bool:
        """Whether one call for both has little padding."""

        def near(ours: int, theirs: int) -> bool:
            return min(ours, theirs) >= 0.75 * max(ours, theirs) - 16

        if len(self.own) != len(other.own) or (len(self.prefix) > 0) != (len(other.prefix) > 0):
            return False
        return near(len(self.prefix), len(other.prefix)) and near(self.width, other.width)

    @property
    def width(self) -> int:
        return max(map(len, self.own))


def layout_of(input_ids: Tensor, attention_mask: Tensor) -> Layout | None:
    """The layout of rows with padding anywhere, (B, T) each; None where it would leave little out, or a row is empty.

    It reads the tokens: on a GPU this waits for them.
    """
    ids, real = input_ids.cpu().numpy(), attention_mask.cpu().numpy() != 0
    columns = [row.nonzero()[0] for row in real]
    rows = [row[own] for row, own in zip(ids, columns, strict=True)]
    groups = groups_of(rows)
    count = sum(map(len, rows)) - sum(shared * (len(members) - 1) for members, shared in groups)
    if count > WORTHWHILE * ids.size or not all(map(len, rows)):
        return None
    sources, positions = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    places, at = np.zeros(ids.shape, dtype=np.int64), 0
    units: list[Unit] = []
    segments: list[tuple[Places, Places]] = []

    def placed(row: int, start: int, end: int) -> Places:
        nonlocal at
        taken = np.arange(at, at + end - start)
        sources[taken], positions[taken] = row * ids.shape[1] + columns[row][start:end], np.arange(start, end)
        at += end - start
        return taken

    for members, shared in groups:
        prefix = placed(members[0], 0, shared)
        own = [placed(row, shared, len(rows[row])) for row in members]
        for row, taken in zip(members, own, strict=True):
            places[row, columns[row]] = np.concatenate([prefix, taken])
        alike = alike_units([Unit(prefix, [taken]) for taken in own if len(taken)])
        units += [Unit(prefix, [unit.own[0] for unit in some]) for some in alike]
        units += [Unit(prefix[:0], [prefix])] if shared else []
        segments += [(prefix[:0], prefix)] if shared else []
        segments += [(prefix, taken) for taken in own if len(taken)]
    sets, device = alike_units(units), input_ids.device
    tables = [_table([own for unit in some for own in unit.own]) for some in sets]
    shown = np.concatenate([table.flatten() for table in tables])
    order = np.empty(count, dtype=np.int64)
    order[shown[shown >= 0]] = (shown >= 0).nonzero()[0]

    def moved(array: Places) -> Tensor:
        return torch.from_numpy(array).to(device)

    blocks = []
    for some, table in zip(sets, tables, strict=True):
        prefixes = [unit.prefix for unit in some]
        starts = np.array([len(prefix) for prefix in prefixes])
        before = (moved(_table(prefixes).clip(0)), moved(starts)) if starts.any() else (None, None)
        blocks.append(Block(moved(table.clip(0)), *before))
    return Layout(moved(sources), moved(places), moved(positions[None]), blocks, moved(order), segments)


def groups_of(rows: Sequence[Places]) -> list[tuple[list[int], int]]:
    """All rows in groups, and with how many equal tokens those of each begin, such that the fewest tokens are left.

    Rows that begin alike follow each other in the order of their tokens; from left to right, the best partition of the
    rows so far is that of all but its last group, and that group.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row].astype(">i8").tobytes())
    alike = np.array([_common(rows[i], rows[j]) for i, j in pairwise(order)], dtype=np.int64)
    saved, starts = np.zeros(len(order) + 1, dtype=np.int64), np.zeros(len(order) + 1, dtype=np.int64)
    shared: list[int] = [0]
    for end in range(1, len(order) + 1):
        least = np.minimum.accumulate(np.append(0, alike[: end - 1])[:0:-1])[::-1]  # of the rows from each place on
        least = np.append(np.where(least < SHORTEST, 0, least), 0)
        totals = saved[:end] + least * np.arange(end - 1, -1, -1)
        starts[end] = end - 1 - totals[::-1].argmax()  # of equals, the smallest group
        saved[end] = totals[starts[end]]
        shared.append(int(least[starts[end]]))
    groups, end = [], len(order)
    while end:
        groups.append((order[starts[end] : end], shared[end]))
        end = int(starts[end])
    return groups


def _common(ours: Places, theirs: Places) -> int:
    """With how many equal tokens two rows begin."""
    size = min(len(ours), len(theirs))
    different = (ours[:size] != theirs[:size]).nonzero()[0]
    return int(different[0]) if len(different) else size


def alike_units(units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in as many sets as it takes for those of a set to resemble each other."""
    sets: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: (len(unit.prefix), unit.width), reverse=True):
        alike = next((some for some in sets if some[0].resembles(unit)), None)
        if alike is None:
            sets.append([unit])
        else:
            alike.append(unit)
    return sets


def _table(rows: Sequence[Places]) -> Places:
    """The rows padded on the right with -1."""
    table = np.full((len(rows), max(map(len, rows))), -1)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


# What transformers' layers call

FLASH = "flash_attention_2"
# And the attention that the model has for rows as they are.
_LAYOUT: ContextVar[tuple[Layout | None, str | None]] = ContextVar("rlhf_fast_layout", default=(None, None))


class UnknownArgument(NotImplementedError):
    """The model hands its attention something that is not known here."""


def check_known(arguments: Mapping[str, Any]) -> None:
    """UnknownArgument for one that is there and may change what attention gives."""
    unknown = [name for name, given in arguments.items() if given is not None and name not in HARMLESS]
    if unknown:
        raise UnknownArgument(f"its attention takes {unknown[0]}")


@contextmanager
def packed(config: PretrainedConfig, layout: Layout | None) -> Iterator[None]:
    """The model of this config takes packed rows inside, by this layout; None changes nothing."""
    if layout is None:
        yield
        return
    before = config._attn_implementation
    token = _LAYOUT.set((layout, _LAYOUT.get()[1] if before == NAME else before))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _LAYOUT.reset(token)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    layout, attention = _LAYOUT.get()
    if layout is None:  # of another thread
        options: dict[str, Any] = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **others)
    check_known(others)
    layout.told.update(filter(None, [sliding_window]))
    attend = layout.attend_by_flash if attention == FLASH else layout.attend
    return attend(query, key, value, sliding_window, scaling=scaling, softcap=softcap), None


def _no_mask(*args: Any, **options: Any) -> Tensor | None:
    layout, _ = _LAYOUT.get()
    if layout is None:
        return sdpa_mask(*args, **options)
    layout.masked.update(filter(None, [options.get("local_size")]))
    return None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)
