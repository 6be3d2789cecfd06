"""Rows as token ids, each made when it is asked for: a run over many rows starts at once, and holds few of them."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeVar, overload

from rich.markup import escape
from rich.progress import track

from rlhf_fast.data.conversations import Exchange
from rlhf_fast.data.encoding import Encoder, Example, Prompt, TooLong
from rlhf_fast.data.notes import say
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import Picked, facts_of
from rlhf_fast.errors import UserError

T = TypeVar("T")
U = TypeVar("U")
KEPT = 4096  # encoded rows that stay in memory; those of one step are read several times
LOOKED_AT = 512  # of more rows than KEPT, the first and the longest, this many of each, are encoded at the start


@dataclass(frozen=True)
class Outliner(Encoder):
    """Encodes rows but for their tokens, of which there are two in each example: what is left are the checks of a row
    and the numbers beside its text, in a fraction of the time."""

    def _fitted(self, exchange: Exchange, name: str) -> tuple[Exchange, list[Example]]:
        _ = exchange.tools  # checks them
        return exchange, [Example([0, 0], 1) for _ in exchange.completions or [None]]

    def _prompt(self, exchange: Exchange, columns: dict[str, Any]) -> Prompt:
        exchange, (example,) = self._fitted(exchange, "prompt")
        return Prompt(exchange.row.where, example.ids, "", columns)

    def _ids(self, where: str, text: str) -> list[int]:
        return [0]


class Encoded(Sequence[T], Generic[T]):
    """`encode` of rows, made when it is asked for; the last KEPT ones stay. encode: (encoder, row) -> T."""

    def __init__(self, encoder: Encoder, rows: Sequence[Row], encode: Callable[[Encoder, Row], T]) -> None:
        self.encoder, self.rows, self._encode = encoder, rows, encode
        self._made = lru_cache(maxsize=KEPT)(lambda place: encode(encoder, rows[place]))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self.rows))
        return [self._made(place) for place in places[index]] if isinstance(index, slice) else self._made(places[index])

    def outlines(self) -> Iterator[T]:
        """What every row becomes, but for its tokens."""
        settings = {field.name: getattr(self.encoder, field.name) for field in fields(self.encoder)}
        outliner = Outliner(**settings)
        return (self._encode(outliner, row) for row in self.rows)

    def map(self, change: Callable[[T], U]) -> "Encoded[U]":
        """With every encoded row changed."""
        encode = self._encode
        return Encoded(self.encoder, self.rows, lambda encoder, row: change(encode(encoder, row)))

    def of(self, rows: Sequence[Row]) -> "Encoded[T]":
        """The same of other rows."""
        return self if rows is self.rows else Encoded(self.encoder, rows, self._encode)

    @cached_property
    def key(self) -> str:
        """A hash of the rows and of the encoder's settings."""
        return hashlib.sha256(self.encoder.key.encode() + facts_of(self.rows, "says").tobytes()).hexdigest()


def encode_rows(encoder: Encoder, rows: Sequence[Row], encode: Callable[[Encoder, Row], T], what: str) -> Encoded[T]:
    """`encode` of every row, less those that too_long and bad_rows leave out.

    Rows are encoded here where they are few (KEPT), or where one of these rules leaves rows out. Of many, every one is
    checked but for its tokens, and the first and the longest are encoded; another that cannot be is told of when it is
    asked for. What was left out or changed is said, one line for each kind. UserError when no row is left.
    """
    told: set[str] | None = None

    def noted(encoder: Encoder, row: Row) -> T:
        """What is done to a row in a way that was not said at the start is said."""
        example = encode(encoder, row)
        if told is not None:
            for kind in encoder.notes.keys() - told:
                told.add(kind)
                say(f"{what}: a row is {kind} ({row.where})")
            encoder.notes.clear()
        return example

    encoded, kept = Encoded(encoder, rows, noted), []
    drops = "skip" in (encoder.too_long, encoder.bad_rows)
    some: Sequence[int] = range(len(rows))
    if len(rows) > KEPT and not drops:
        for _ in track(encoded.outlines(), escape(f"checking {what}"), len(rows), **_BAR):
            pass
        some = first_and_longest(rows, LOOKED_AT)
    for place in track(some, escape(f"reading {what}"), **_BAR):
        try:
            encoded[place]
        except UserError as error:
            rule = encoder.too_long if isinstance(error, TooLong) else encoder.bad_rows
            if rule == "error":
                raise
            reason = str(error)
            if isinstance(error, TooLong):
                encoder.note("too long, and left out", rows[place].where)
            else:
                encoder.note("left out", reason)
        else:
            kept.append(place)
    told = set(encoder.notes)
    for line in encoder.report(len(some)):
        say(f"{what}: {line}")
    if not kept:
        raise UserError(f"no row of {what} is left of {len(rows)}; the last one: {reason}")
    return encoded.of(Picked(rows, kept)) if len(kept) < len(some) else encoded


_BAR: dict[str, Any] = {"transient": True, "disable": not sys.stdout.isatty()}


def first_and_longest(rows: Sequence[Row], count: int) -> list[int]:
    """Places, in order, of the first `count` rows and of the `count` longest, by the characters of all columns."""
    longest = facts_of(rows, "length").argsort(kind="stable")[-count:].tolist()
    return sorted({*range(min(count, len(rows))), *longest})
