"""What a run tells about its data that is no error: each line once."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

_said: set[str] = set()
_quiet = False


@dataclass
class Tally:
    """Counts of rows that come in parts, each behind the row `first`, which is not counted there.

    counts: of each text, and of its first, second ... telling in a part: found, rows, and how the first one is shown.
    """

    first: str
    counts: dict[tuple[str, int], tuple[int, int, str]] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)

    def begin(self) -> None:
        """The next part comes."""
        self.told.clear()

    def add(self, text: str, found: Sequence[tuple["_Placed", str]], rows: Sequence["_Placed"]) -> None:
        key = text, self.told[text]
        self.told[text] += 1
        found = found[1:] if found and found[0][0].where == self.first else found
        number, total, shown = self.counts.get(key, (0, 0, ""))
        total += len(rows) - bool(rows and rows[0].where == self.first)
        self.counts[key] = number + len(found), total, shown or (found[0][1] if found else "")


_tally: Tally | None = None


class _Placed(Protocol):
    @property
    def where(self) -> str: ...


def say(line: str) -> None:
    """Print `line` on standard output, unless this launch has said it before: stages read the same data twice."""
    if line not in _said and not _quiet:
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
    """What is told of rows that come in parts is said at the end, of all together."""
    global _tally
    _tally = tally = Tally(first)
    try:
        yield tally
    finally:
        _tally = None
    for (text, _), counts in tally.counts.items():
        _say_count(text, *counts)


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is said: these rows were read before."""
    global _quiet
    _quiet = True
    try:
        yield
    finally:
        _quiet = False
