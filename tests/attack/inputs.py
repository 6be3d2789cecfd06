"""Hostile input: configs, flags, data, adapters, models and run folders, as tests/fuzz makes them."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from random import Random

from tests.attack.rows import Cases, row
from tests.fuzz.harness import tried, valid_things, warm_up
from tests.fuzz.inputs import KINDS

_OPEN = ExitStack()


@cache
def _valid() -> Path:
    warm_up()
    return _OPEN.enter_context(valid_things())


def fed(kind: str, number: int, place: Path) -> str | None:
    return tried(kind, Random(f"0 {kind} {number}"), place, _valid()).finding


@row("hostile input", "it runs, or is refused in a few lines, without a traceback, within 20 s and 1 GiB")
def inputs() -> Cases:
    for number in range(20_000):
        kind = list(KINDS)[number % len(KINDS)]
        yield f"{kind} {number}", partial(fed, kind, number)
