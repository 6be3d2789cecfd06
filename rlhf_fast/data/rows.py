"""Sequences of rows that are read where they lie: files larger than memory, and some rows of others.

A row is found by its number as in a list, so that the order of a run and its resume are those of small files.
"""

import os
import sys
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import track

from rlhf_fast.data import notes
from rlhf_fast.data.layouts import prompt_key
from rlhf_fast.data.reading import Row, line_row, parquet_file, table_rows
from rlhf_fast.errors import UserError, first_line

CHUNK = 4096  # rows that are read at a time where all are


class View(Sequence[Row]):
    """A sequence of rows that is asked for several at once."""

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, places: Sequence[int]) -> list[Row]:
        """The rows at the places, which are at least 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(len(self))[index]
        return self.take(places) if isinstance(places, range) else self.take([places])[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), CHUNK):
            yield from self.take(range(start, min(len(self), start + CHUNK)))


def take(rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
    """The rows at the places, of a view at once."""
    return rows.take(places) if isinstance(rows, View) else [rows[place] for place in places]


class Picked(View):
    """The rows `places` of `rows`."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int] | NDArray[np.int64]) -> None:
        self.rows, self.places = rows, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def take(self, places: Sequence[int]) -> list[Row]:
        return take(self.rows, self.places[np.asarray(places, dtype=np.int64)].tolist())


class Joined(View):
    """The rows of several sequences, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def take(self, places: Sequence[int]) -> list[Row]:
        found: dict[int, Row] = {}
        owners = [bisect_right(self.ends, place) for place in places]
        for number in set(owners):
            start = self.ends[number] - len(self.parts[number])
            of_part = [place for place, owner in zip(places, owners, strict=True) if owner == number]
            rows = take(self.parts[number], [place - start for place in of_part])
            found.update(zip(of_part, rows, strict=True))
        return [found[place] for place in places]


def joined(parts: Sequence[Sequence[Row]]) -> Sequence[Row]:
    """The rows of all parts: a list where all of them are lists."""
    if any(isinstance(part, View) for part in parts):
        return parts[0] if len(parts) == 1 else Joined(parts)
    return [row for part in parts for row in part]


def picked(rows: Sequence[Row], places: Sequence[int] | NDArray[np.int64]) -> Sequence[Row]:
    """The rows at the places: a list where `rows` is one."""
    return Picked(rows, places) if isinstance(rows, View) else [rows[place] for place in places]


class Lines(View):
    """The rows of a file of JSON lines in UTF-8, by an index of where each line begins (16 bytes a row)."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, path.open("rb")
        self._stat = self._state()
        starts, numbers, position = array("Q"), array("Q"), 0
        for number, line in enumerate(self._file, start=1):
            if line.strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)
        starts.append(position)
        self._starts, self._numbers = np.array(starts, np.uint64), np.array(numbers, np.uint64)

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, places: Sequence[int]) -> list[Row]:
        if self._state() != self._stat:
            raise UserError(f"{self.path} has changed since the run began to read it")
        return [self._row(place) for place in places]

    def _row(self, place: int) -> Row:
        start, end = int(self._starts[place]), int(self._starts[place + 1])
        return line_row(self.path.name, int(self._numbers[place]), os.pread(self._file.fileno(), end - start, start))

    def _state(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns


class Table(View):
    """The rows of a parquet file, from an Arrow file that is mapped into memory: written here, without a name, so that
    it is gone with the process."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
            try:
                source = parquet_file(path)
                with pyarrow.ipc.new_file(file.name, source.schema_arrow) as writer:
                    for batch in source.iter_batches(1024):
                        writer.write_batch(batch)
                self._reader = pyarrow.ipc.open_file(pyarrow.memory_map(file.name))
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                where = tempfile.gettempdir()
                raise UserError(f"{path} cannot be unpacked into {where}: {first_line(error)}") from None
        sizes = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def take(self, places: Sequence[int]) -> list[Row]:
        return [self._row(place) for place in places]

    def _row(self, place: int) -> Row:
        number = bisect_right(self._ends, place)
        batch = self._reader.get_batch(number)
        of_batch = place - self._ends[number] + batch.num_rows
        (row,) = table_rows(batch.slice(of_batch, 1), self.path.name, first=place + 1)
        return row


class Prepared(View):
    """What `change` makes of rows that are not in memory, each by itself.

    It is given the first row before any others, so that it takes all for what it takes that one for. A row may become
    several, or none. facts: FACTS of each row that it makes. Memory: 29 bytes a row.
    """

    def __init__(self, rows: View, change: Callable[[list[Row]], list[Row]], name: str) -> None:
        self.rows, self._change, self._first = rows, change, rows[:1]
        places, parts, facts = array("Q"), array("B"), {name: array("Q") for name in FACTS}
        with notes.silent():
            self._before = len(change(self._first))
        with notes.tallied(self._first[0].where) as tally:
            starts = range(0, len(rows), CHUNK)
            for start in track(starts, escape(f"reading {name}"), transient=True, disable=not sys.stdout.isatty()):
                tally.begin()
                for place, part, row in self._made(range(start, min(len(rows), start + CHUNK))):
                    places.append(place)
                    parts.append(part)
                    for fact, value in facts.items():
                        value.append(FACTS[fact](row))
        self._places, self._parts = np.array(places, np.int64), np.array(parts, np.int64)
        self.facts = {fact: np.array(values, np.uint64) for fact, values in facts.items()}

    def __len__(self) -> int:
        return len(self._places)

    def take(self, places: Sequence[int]) -> list[Row]:
        wanted = [(int(self._places[place]), int(self._parts[place])) for place in places]
        with notes.silent():
            made = {(place, part): row for place, part, row in self._made(sorted({place for place, _ in wanted}))}
        return [made[which] for which in wanted]

    def _made(self, places: Sequence[int]) -> Iterator[tuple[int, int, Row]]:
        """(place, number among what is made of that place's row, row)."""
        given = self.rows.take(places)
        at, part = 0, 0
        for row in self._change([*self._first, *given])[self._before :]:
            while not f"{row.where} ".startswith(f"{given[at].where} "):
                at, part = at + 1, 0
            yield places[at], part, row
            part += 1


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


# What is known of each row without reading it again: what it asks and all that it says, as hashes, and how long it is.
FACTS: dict[str, Callable[[Row], int]] = {
    "asks": lambda row: _hash(prompt_key(row)),
    "says": lambda row: _hash(f"{row.where} {row.values}"),
    "length": lambda row: len(str(row.values)),
}


def facts_of(rows: Sequence[Row], fact: str) -> NDArray[np.uint64]:
    """One of FACTS of every row."""
    if isinstance(rows, Prepared):
        return rows.facts[fact]
    if isinstance(rows, Joined) and rows.parts:
        return np.concatenate([facts_of(part, fact) for part in rows.parts])
    if isinstance(rows, Picked):
        return facts_of(rows.rows, fact)[rows.places]
    return np.array([FACTS[fact](row) for row in rows], dtype=np.uint64)


def prepared(rows: Sequence[Row], change: Callable[[list[Row]], list[Row]], name: str) -> Sequence[Row]:
    """What `change` makes of all rows; of a view, of each when it is asked for."""
    return Prepared(rows, change, name) if isinstance(rows, View) else change(list(rows))
