"""Sequences of rows that are read where they lie: files larger than memory, and some rows of others.

A row is found by its number as in a list, so that the order of a run and its resume are those of small files.
"""

import os
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import track

from rlhf_fast.data import notes
from rlhf_fast.data.cache import NONE, Cache, Entry, digest_of, packed, unpacked
from rlhf_fast.data.layouts import prompt_key
from rlhf_fast.data.processes import in_order
from rlhf_fast.data.reading import Row, line_row, parquet_file, table_rows
from rlhf_fast.errors import UserError, first_line

CHUNK = 4096  # rows that are read at a time where all are, at most
READ = 1 << 24  # bytes of their files, about
FORKED = 4 * CHUNK  # rows that more than one process reads
_BLOCK = 1 << 24
_LINE_FEED, _SPACE = ord("\n"), list(b" \t\n\r\v\f")


T = TypeVar("T")


class View(Sequence[Row]):
    """A sequence of rows that is asked for several at once."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Bytes of the files that the rows are read from."""
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
        for places in chunks(self):
            yield from self.take(places)


def chunks(rows: Sequence[Row]) -> list[range]:
    """All places, in parts whose rows may be in memory together: of long rows fewer."""
    size = len(rows)
    step = CHUNK if not isinstance(rows, View) else max(1, min(CHUNK, READ * size // max(1, rows.size)))
    return [range(start, min(size, start + step)) for start in range(0, size, step)]


def take(rows: Sequence[Row], places: Sequence[int]) -> list[Row]:
    """The rows at the places, of a view at once."""
    return rows.take(places) if isinstance(rows, View) else [rows[place] for place in places]


class Picked(View):
    """The rows `places` of `rows`."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int] | NDArray[np.int64]) -> None:
        self.rows, self.places = rows, np.asarray(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def size(self) -> int:
        return _bytes(self.rows)

    def take(self, places: Sequence[int]) -> list[Row]:
        return take(self.rows, self.places[np.asarray(places, dtype=np.int64)].tolist())


class Joined(View):
    """The rows of several sequences, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def size(self) -> int:
        return sum(map(_bytes, self.parts))

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
        self._starts, self._ends, self._numbers = self._index()

    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Where each line with a row begins and ends, and its number."""
        found, heads, position, opens = [], [], 0, True
        while block := self._file.read(_BLOCK):
            codes = np.frombuffer(block, np.uint8)
            begins = np.flatnonzero(codes == _LINE_FEED) + 1
            begins = np.concatenate([[0], begins]) if opens else begins
            opens = len(begins) > 0 and begins[-1] == len(block)  # the next line begins with the next block
            begins = begins[:-1] if opens else begins
            heads.append(codes[begins])
            found.append(begins + position)
            position += len(block)
        starts = np.concatenate(found) if found else np.zeros(0, np.int64)
        ends = np.append(starts[1:], position)
        suspects: Any = np.flatnonzero(np.isin(np.concatenate(heads), _SPACE)) if heads else []
        blank = [i for i in suspects if not self._read(int(starts[i]), int(ends[i])).strip()]
        kept = np.delete(np.arange(len(starts)), blank)
        return starts[kept], ends[kept], kept + 1

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def size(self) -> int:
        return self._stat[0]

    def take(self, places: Sequence[int]) -> list[Row]:
        if self._state() != self._stat:
            raise UserError(f"{self.path} has changed since the run began to read it")
        return [self._row(place) for place in places]

    def _row(self, place: int) -> Row:
        line = self._read(int(self._starts[place]), int(self._ends[place]))
        return line_row(self.path.name, int(self._numbers[place]), line)

    def _read(self, start: int, end: int) -> bytes:
        return os.pread(self._file.fileno(), end - start, start)

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

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def take(self, places: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < len(places):
            place = places[len(rows)]
            number = bisect_right(self._ends, place)
            run = 1  # rows that follow each other in one batch are made together
            while len(rows) + run < len(places) and places[len(rows) + run] == place + run < self._ends[number]:
                run += 1
            batch = self._reader.get_batch(number)
            of_batch = place - self._ends[number] + batch.num_rows
            rows += table_rows(batch.slice(of_batch, run), self.path.name, first=place + 1)
        return rows


class Prepared(View):
    """What `change` makes of rows that are not in memory, each by itself.

    It is given the first row before any others, so that it takes all for what it takes that one for. A row may become
    several, or none. facts: FACTS of each row that it makes. content: a hash of all rows that it makes. Memory: 45
    bytes a row.
    """

    def __init__(
        self, rows: View, change: Callable[[list[Row]], list[Row]], name: str, known: Cache = NONE, how: Any = None
    ) -> None:
        """how: what `change` depends on besides the settings of `known`, told apart by its repr."""
        self.rows, self._change, self._first = rows, change, rows[:1]
        with notes.silent():
            self._before = len(change(self._first))
        entry = known.entry((content_of(rows), name, how), lambda: self._looked_through(name))
        notes.Tally.of(unpacked(entry["told"])).say()
        self._places, self._parts = entry["places"], entry["parts"]
        self.facts = {fact: entry[fact] for fact in FACTS}

    def _looked_through(self, name: str) -> Entry:
        def part(places: range) -> tuple[Entry, notes.Tally]:
            with notes.tallied(self._first[0].where) as tally:
                made = list(self._made(places))
            of_rows = [[of(row, text) for of in FACTS.values()] for _, _, row in made for text in [str(row.values)]]
            facts = np.array(of_rows, np.uint64).reshape(-1, len(FACTS))
            found = {fact: facts[:, number] for number, fact in enumerate(FACTS)}
            found["places"] = np.array([place for place, _, _ in made], np.int64)
            found["parts"] = np.array([number for _, number, _ in made], np.int32)
            return found, tally

        parts, told = chunks(self.rows), notes.Tally(self._first[0].where)
        found, alone = [], len(self.rows) < FORKED
        for arrays, tally in shown(in_order(part, parts, alone=alone), f"reading {name}", len(parts)):
            told.merge(tally)
            found.append(arrays)
        return {"told": packed(told.values)} | {key: np.concatenate([one[key] for one in found]) for key in found[0]}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size(self) -> int:
        return self.rows.size

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


def _bytes(rows: Sequence[Row]) -> int:
    return rows.size if isinstance(rows, View) else 0


def shown(parts: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The parts, with a bar on a terminal."""
    return iter(track(parts, escape(what), total, transient=True, disable=not sys.stdout.isatty()))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


# What is known of each row without reading it again: what it asks, all that it says and the names of its columns, as
# hashes, and how long it is.
FACTS: dict[str, Callable[[Row, str], int]] = {  # of a row, and its values as text
    "asks": lambda row, text: _hash(prompt_key(row)),
    "says": lambda row, text: _hash(f"{row.where} {text}"),
    "length": lambda row, text: len(text),
    "columns": lambda row, text: _hash(" ".join(map(repr, row.values))),
}


def facts_of(rows: Sequence[Row], fact: str) -> NDArray[np.uint64]:
    """One of FACTS of every row."""
    if isinstance(rows, Prepared):
        return rows.facts[fact]
    if isinstance(rows, Joined) and rows.parts:
        return np.concatenate([facts_of(part, fact) for part in rows.parts])
    if isinstance(rows, Picked):
        return facts_of(rows.rows, fact)[rows.places]
    return np.array([FACTS[fact](row, str(row.values)) for row in rows], dtype=np.uint64)


def content_of(rows: Sequence[Row]) -> str:
    """A hash of what all rows say, or of what they are read from."""
    if isinstance(rows, Lines | Table):
        return f"{rows.path.name} {digest_of(rows.path)}"
    if isinstance(rows, Joined):
        return blake2b(" ".join(map(content_of, rows.parts)).encode()).hexdigest()
    return blake2b(facts_of(rows, "says").tobytes()).hexdigest()


def unlike(rows: Sequence[Row]) -> list[int]:
    """The place of the first row of each set of columns that rows have."""
    return sorted(np.unique(facts_of(rows, "columns"), return_index=True)[1].tolist())
