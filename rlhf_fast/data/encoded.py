"""Rows as token ids, each made when it is asked for: a run over many rows starts at once, and holds few of them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rlhf_fast.data.cache import Entry, packed, unpacked
from rlhf_fast.data.conversations import Exchange
from rlhf_fast.data.encoding import Encoder, Example, Prompt, TooLong
from rlhf_fast.data.notes import say
from rlhf_fast.data.processes import Ahead, in_order
from rlhf_fast.data.reading import Row
from rlhf_fast.data.rows import FORKED, Picked, chunks, facts_of, shown, take
from rlhf_fast.errors import UserError

T = TypeVar("T")
U = TypeVar("U")
KEPT = 4096  # encoded rows that stay in memory; those of one step are read several times
_PART = 128  # rows that are encoded by one process at a time
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


class Told:
    """What of the rows `what` was said already; kinds: None: nothing yet, because the start says all at once."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.kinds: set[str] | None = None

    def tell(self, notes: dict[str, list[str]], where: str) -> None:
        """What is done to a row in a way that was not said at the start is said."""
        for kind in notes.keys() - (self.kinds or set()):
            say(f"{self.what}: a row is {kind} ({where})")
        self.kinds = (self.kinds or set()) | notes.keys()


class Encoded(Sequence[T], Generic[T]):
    """`encode` of rows, made when it is asked for; the last KEPT ones stay. encode: (encoder, row) -> T."""

    def __init__(self, encoder: Encoder, rows: Sequence[Row], encode: Callable[[Encoder, Row], T], told: Told) -> None:
        self.encoder, self.rows, self._encode, self._told = encoder, rows, encode, told
        self._kept: dict[int, T] = {}
        self._ahead: Ahead[int, tuple[T, dict[str, list[str]]]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self.rows))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)

    def _at(self, place: int) -> T:
        if place in self._kept:
            self._kept[place] = example = self._kept.pop(place)  # the one that was asked for last is the last one
            return example
        example, notes = self._made(place) if self._ahead is None else self._ahead.get(place)
        if notes:
            self._told.tell(notes, self.rows[place].where)
        self._kept[place] = example
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return example

    def _made(self, place: int) -> tuple[T, dict[str, list[str]]]:
        """The row as tokens, and once the start is over what is to be said of it."""
        example, notes = self._encode(self.encoder, self.rows[place]), {}
        if self._told.kinds is not None:
            notes = {**self.encoder.notes}
            self.encoder.notes.clear()
        return example, notes

    def ahead(self, places: Sequence[int]) -> None:
        """Another process begins with the rows at these places, which will be asked for next."""
        new = [place for place in places if place not in self._kept]
        if len(self) > KEPT >= 2 * len(new) > 0 and len(os.sched_getaffinity(0)) > 1:
            self._ahead = self._ahead or Ahead(self._made)
            self._ahead.ask(new)

    @cached_property
    def _outliner(self) -> Outliner:
        return Outliner(**{field.name: getattr(self.encoder, field.name) for field in fields(self.encoder)})

    def outlines(self, places: Sequence[int] | None = None) -> Iterator[T]:
        """What every row, or each of those at the places, becomes but for its tokens."""
        rows = self.rows if places is None else take(self.rows, places)
        return (self._encode(self._outliner, row) for row in rows)

    def numbers(self, name: str, of: Callable[[T], Any]) -> NDArray[np.float64]:
        """`of` of what every row becomes but for its tokens: a number or several, NaN for None.

        name: tells `of` from others of the same rows.
        """

        def part(places: range) -> NDArray[np.float64]:
            return np.array([of(outline) for outline in self.outlines(places)], dtype=np.float64)

        def read() -> Entry:
            parts = chunks(self.rows)
            found = in_order(part, parts, alone=len(self) < FORKED)
            return {"numbers": np.concatenate([*shown(found, f"reading {name}", len(parts))])}

        if len(self) <= KEPT:
            return part(range(len(self)))
        return self.encoder.known.entry((self.key, name), read)["numbers"]

    def map(self, change: Callable[[T], U]) -> "Encoded[U]":
        """With every encoded row changed."""
        encode = self._encode
        return Encoded(self.encoder, self.rows, lambda encoder, row: change(encode(encoder, row)), self._told)

    def of(self, rows: Sequence[Row]) -> "Encoded[T]":
        """The same of other rows."""
        return self if rows is self.rows else Encoded(self.encoder, rows, self._encode, self._told)

    @cached_property
    def key(self) -> str:
        """A hash of the rows and of the encoder's settings."""
        return hashlib.sha256(self.encoder.key.encode() + facts_of(self.rows, "says").tobytes()).hexdigest()


def encode_rows(encoder: Encoder, rows: Sequence[Row], encode: Callable[[Encoder, Row], T], what: str) -> Encoded[T]:
    """`encode` of every row, less those that too_long and bad_rows leave out.

    Rows are encoded here where they are few (KEPT), or where one of these rules leaves rows out. Of many, every one is
    checked but for its tokens, and the first and the longest are encoded; another that cannot be is told of when it is
    asked for. What was found of many rows is kept for the next start. What was left out or changed is said, one line
    for each kind. UserError when no row is left.
    """
    told = Told(what)
    encoded = Encoded(encoder, rows, encode, told)

    def tried() -> Entry:
        found = _tried(encoded, what)
        return {"kept": np.array(found.kept, np.int64), "said": packed([found.tried, found.notes, found.reason])}

    entry = tried() if len(rows) <= KEPT else encoder.known.entry((encoded.key, what, LOOKED_AT), tried)
    kept, (number, noticed, reason) = entry["kept"], unpacked(entry["said"])
    encoder.notes.update(noticed)
    told.kinds = {*noticed}
    for line in encoder.report(number):
        say(f"{what}: {line}")
    if not len(kept):
        raise UserError(f"no row of {what} is left of {len(rows)}; the last one: {reason}")
    return encoded.of(Picked(rows, kept)) if len(kept) < number else encoded


@dataclass
class _Found:
    """Of so many rows that were tried: the places of those that are kept, notes, and why the last other one is not."""

    tried: int = 0
    kept: list[int] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ""

    def add(self, part: "_Found") -> None:
        self.tried += part.tried
        self.kept += part.kept
        for what, rows in part.notes.items():
            self.notes.setdefault(what, []).extend(rows)
        self.reason = part.reason or self.reason


def _tried(encoded: Encoded[Any], what: str) -> _Found:
    encoder, rows, found = encoded.encoder, encoded.rows, _Found()

    def outlined(places: Sequence[int]) -> _Found:
        for _ in encoded.outlines(places):
            pass
        return made(_Found())

    def encodes(places: Sequence[int]) -> _Found:
        part = _Found(tried=len(places))
        for place in places:
            try:
                encoded[place]
            except UserError as error:
                rule = encoder.too_long if isinstance(error, TooLong) else encoder.bad_rows
                if rule == "error":
                    raise
                part.reason = str(error)
                if isinstance(error, TooLong):
                    encoder.note("too long, and left out", rows[place].where)
                else:
                    encoder.note("left out", part.reason)
            else:
                part.kept.append(place)
        return made(part)

    def made(part: _Found) -> _Found:
        part.notes.update(encoder.notes)
        encoder.notes.clear()
        return part

    some: Sequence[int] = range(len(rows))
    alone = len(rows) < FORKED
    if len(rows) > KEPT and "skip" not in (encoder.too_long, encoder.bad_rows):
        parts: list[Sequence[int]] = [*chunks(rows)]
        for part in shown(in_order(outlined, parts, alone=alone), f"checking {what}", len(parts)):
            found.add(part)
        some = first_and_longest(rows, LOOKED_AT)
    parts = [some[start : start + _PART] for start in range(0, len(some), _PART)]
    for part in shown(in_order(encodes, parts, alone=alone), f"reading {what}", len(parts)):
        found.add(part)
    return found


def first_and_longest(rows: Sequence[Row], count: int) -> list[int]:
    """Places, in order, of the first `count` rows and of the `count` longest, by the characters of all columns."""
    longest = facts_of(rows, "length").argsort(kind="stable")[-count:].tolist()
    return sorted({*range(min(count, len(rows))), *longest})
