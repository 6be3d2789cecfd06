"""The keys and values of rows that come and go: memory that is taken once, in which each row has a slot.

All slots are at the same column. A step writes its keys and values there, so that a row's tokens are the last ones
before the column, and what is left of them is masked: to a model this is a batch that is padded on the left, and what
can take that can take rows of any lengths, of which one leaves and another takes its slot.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class SlotCache(Cache):
    """column: where the next tokens go. first: the first column that a row still reads. width: columns in memory."""

    def __init__(self, sliding: Sequence[bool], width: int) -> None:
        """sliding: of `sliding_layers`."""
        self.width, self.column, self.first = width, 0, 0
        self.fixed: tuple[Tensor, int] | None = None  # of `at`
        self._blocks = [_Block(self, slides) for slides in sliding]
        super().__init__(layers=[*self._blocks])

    @property
    def _used(self) -> "list[_Block]":
        """Some models have layers that read the keys of another."""
        return [block for block in self._blocks if block.is_initialized]

    @contextmanager
    def at(self, column: Tensor, reach: int) -> Iterator[None]:
        """One token of each row goes to the column, (1,) on the device, and all columns below `reach` are handed on:
        the same shapes at every step, and no number that the host would have to know."""
        self.fixed = column, reach
        try:
            yield
        finally:
            self.fixed = None

    @property
    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer that has some, (slots, heads, width, head size): the memory itself."""
        return [block.held for block in self._used]

    @property
    def begun(self) -> bool:
        return bool(self._used)

    def begin(self, rows: int, like: "SlotCache") -> None:
        """Take the memory for so many slots, of the shapes of the other's."""
        for ours, theirs in zip(self._blocks, like._blocks, strict=True):
            if theirs.is_initialized:
                ours.begin(rows, *theirs.held)

    def put(self, slots: Tensor, other: "SlotCache", rows: Tensor) -> None:
        """Rows of another cache into slots, (n,) each, so that they end at the column; what is longer is cut."""
        columns = min(self.column, other.column)
        ours, theirs = slice(self.column - columns, self.column), slice(other.column - columns, other.column)
        for block, source in zip(self._used, other._used, strict=True):
            for held, theirs_held in zip(block.held, source.held, strict=True):
                held[slots, :, ours] = theirs_held[rows, :, theirs]

    def take(self, slots: Tensor) -> None:
        """Keep these slots, (n,), in this order, and give back the memory of the others."""
        for block in self._used:
            block.keys, block.values = (held[slots] for held in block.held)

    def shift(self, columns: int) -> None:
        """Move everything to the right by so many columns, or to the left, where nothing is read any more."""
        start, end = max(self.first, -columns), self.column
        for block in self._used:
            for held in block.held:
                held[:, :, start + columns : end + columns] = held[:, :, start:end].clone()
        self.column += columns
        self.first += columns


class _Block(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, width, head size)."""

    def __init__(self, cache: SlotCache, slides: bool) -> None:
        super().__init__()
        # Whoever lets go of the cache gets its memory back at once, and not when Python looks for cycles.
        self.cache, self.is_sliding = weakref.proxy(cache), slides

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def begin(self, rows: int, keys: Tensor, values: Tensor) -> None:
        """Zeros: what is masked is still multiplied."""
        self.keys, self.values = (
            like.new_zeros(rows, like.shape[1], self.cache.width, like.shape[3]) for like in (keys, values)
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.begin(len(key_states), key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.held
        if self.cache.fixed is not None:
            at, reach = self.cache.fixed
            keys.index_copy_(2, at, key_states)
            values.index_copy_(2, at, value_states)
            return keys[:, :, :reach], values[:, :, :reach]
        first, column = self.cache.first, self.cache.column
        end = column + key_states.shape[2]
        keys[:, :, column:end] = key_states
        values[:, :, column:end] = value_states
        return keys[:, :, first:end], values[:, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.column - self.cache.first

    def get_max_length(self) -> int:
        return -1


def why_no_slots(model: PreTrainedModel) -> str | None:
    """Why rows of the model cannot have slots; None where they can."""
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"its cache has a {type(layer).__name__}"
    return None


def sliding_layers(model: PreTrainedModel) -> list[bool]:
    """Of each layer that has a cache, whether it reads a window."""
    return [isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers]
