"""What a run tells about its data that is no error: each line once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

_said: set[str] = set()
_quiet = False


@dataclass
class Tally:
    """What is to be said of rows that come in parts, each behind the row `first`, which is not counted there.

    lines: those that say no number. counts: of each text, and of its first, second ... telling in a part: found, rows,
    and how the first one is shown.
    """

    first: str
    lines: list[str] = field(default_factory=list)
    counts: dict[tuple[str, int], tuple[int, int, str]] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, found: Sequence[tuple["_Placed", str]], rows: Sequence["_Placed"]) -> None:
        """Of one part."""
        key = text, self.told[text]
        self.told[text] += 1
        found = found[1:] if found and found[0][0].where == self.first else found
        total = len(rows) - bool(rows and rows[0].where == self.first)
        self._count(key, len(found), total, found[0][1] if found else "")

    def merge(self, part: "Tally") -> None:
        """With what is to be said of the next part."""
        self.lines += [line for line in part.lines if line not in self.lines]
        for key, (found, total, shown) in part.counts.items():
            self._count(key, found, total, shown)

    def _count(self, key: tuple[str, int], found: int, total: int, shown: str) -> None:
        before, rows, earlier = self.counts.get(key, (0, 0, ""))
        self.counts[key] = before + found, rows + total, earlier or shown

    def say(self) -> None:
        for line in self.lines:
            say(line)
        for (text, _), counts in self.counts.items():
            _say_count(text, *counts)

    @property
    def values(self) -> list[Any]:
        """All of it, as JSON has it."""
        return [self.first, self.lines, [[*key, *counts] for key, counts in self.counts.items()]]

    @classmethod
    def of(cls, values: list[Any]) -> "Tally":
        first, lines, counts = values
        return cls(first, lines, {(text, n): (found, rows, shown) for text, n, found, rows, shown in counts})


_tally: Tally | None = None


class _Placed(Protocol):
    @property
    def where(self) -> str: ...


def say(line: str) -> None:
    """Print `line` on standard output, unless this launch has said it before: stages read the same data twice."""
    if _tally is not None and not _quiet:
        _tally.lines.append(line)
    elif line not in _said and not _quiet:
        _said.add(line)
        print(line, flush=True)


def forget() -> None:
    """A new launch starts: what was said before may be said again."""
    _said.clear()


def tell(text: str, found: Sequence[tuple[_Placed, str]], rows: Sequence[_Placed]) -> None:
    """Say how many of the rows were found to be so, where any were: `text` with {found}, {rows} and {first}.

    found: each row with how it is shown as the first one.
    """
    if _quiet:
        return
    if _tally is None:
        _say_count(text, len(found), len(rows), found[0][1] if found else "")
    else:
        _tally.add(text, found, rows)


def _say_count(text: str, found: int, rows: int, first: str) -> None:
    if found:
        say(text.replace("{found}", str(found)).replace("{rows}", str(rows)).replace("{first}", first))


@contextmanager
def tallied(first: str) -> Iterator[Tally]:
    """Nothing is said of rows that are one part: it is in the Tally."""
    global _tally
    _tally = tally = Tally(first)
    try:
        yield tally
    finally:
        _tally = None


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is said: these rows were read before."""
    global _quiet
    _quiet = True
    try:
        yield
    finally:
        _quiet = False
