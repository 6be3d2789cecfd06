"""python -m tests.attack: attacks small runs, and writes how many survived.

python -m tests.attack --jobs 2 --out benchmarks/results/reliability.json             all cases of all rows: hours
python -m tests.attack --count 20 --row "crash points, sft" --seed 3                         a sample of some

What became of each case is written to --log as it is known. A start with the same log goes on: it tries what was not
tried before, and what did not survive.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from tests.attack import processes  # noqa: F401
from tests.attack.rows import ROWS, Attack, Row

IN_MEMORY = Path("/dev/shm")  # where no kill waits for a disk
_cases: Sequence[tuple[str, Attack]] = ()  # of the row that is tried, for the processes that try them


class Log:
    """What became of each case: lines of row, case, why it did not survive, seconds and commit; the last one counts."""

    def __init__(self, path: Path | None, *, again: Sequence[str] = ()) -> None:
        """again: the rows whose cases are forgotten."""
        self.path, self.of = path, {}
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        for line in map(json.loads, lines):
            if line["row"] not in again:
                self.of[line["row"], line["case"]] = line

    def add(self, **line: Any) -> None:
        self.of[line["row"], line["case"]] = line
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def survived(self, row: str, case: str) -> bool:
        line = self.of.get((row, case))
        return line is not None and line["reason"] is None

    def numbers(self, chosen: Row, names: Sequence[str]) -> dict[str, Any]:
        """Of the cases `names` of a row: how many there are, were tried and survived, and why the others did not."""
        tried = [self.of[chosen.name, name] for name in names if (chosen.name, name) in self.of]
        failed = {line["case"]: line["reason"] for line in tried if line["reason"] is not None}
        return {"survived_means": chosen.survived, "cases": len(names), "tried": len(tried),
                "survived": len(tried) - len(failed), "failed": failed,
                "seconds": round(sum(line["seconds"] for line in tried)),
                "commits": sorted({line["commit"] for line in tried})}  # fmt: skip


def attack(chosen: Row, log: Log, *, count: int | None = None, seed: int = 0, jobs: int = 1, minutes: float = 1e6,
           commit: str = "") -> dict[str, Any]:  # fmt: skip
    """The numbers of a row, with the cases that the log has from before."""
    global _cases
    end = time.monotonic() + 60 * minutes
    _cases = list(chosen.cases())
    names = [name for name, _ in _cases]
    order = random.Random(seed).sample(range(len(names)), len(names))  # so that what is tried by any time is a sample
    left = [number for number in order[:count] if not log.survived(chosen.name, names[number])]
    for done, (number, reason, seconds) in enumerate(_tried(left, jobs, end), start=1):
        log.add(row=chosen.name, case=names[number], reason=reason, seconds=round(seconds, 2), commit=commit)
        if reason is not None:
            print(f"{chosen.name}: {names[number]}: {reason}", file=sys.stderr, flush=True)
        if done % 20 == 0 or done == len(left):
            print(f"{time.strftime('%H:%M:%S')} {chosen.name}: {done} of {len(left)}", flush=True)
    return log.numbers(chosen, names)


def _tried(numbers: Sequence[int], jobs: int, end: float) -> Iterator[tuple[int, str | None, float]]:
    tasks = [(number, end) for number in numbers]
    if jobs == 1:
        yield from filter(None, map(_try, tasks))
    else:
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            yield from filter(None, pool.imap_unordered(_try, tasks))


def _try(task: tuple[int, float]) -> tuple[int, str | None, float] | None:
    """The number of a case, why it did not survive, and seconds; None where the time for its row is over."""
    number, end = task
    start = time.monotonic()
    if start > end:
        return None
    with tempfile.TemporaryDirectory() as place:
        reason = _cases[number][1](Path(place))
    return number, reason, time.monotonic() - start


def main() -> int:
    """1 where something did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack")
    parser.add_argument("--count", type=int, help="cases of each row, drawn by --seed; default: all")
    parser.add_argument("--minutes", type=float, default=1e6, help="for each row")
    parser.add_argument("--row", action="append", choices=[one.name for one in ROWS], help="default: all")
    parser.add_argument("--again", action="store_true", help="forget what the log has of these rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("out/attack.jsonl"))
    parser.add_argument("--out", type=Path, help="JSON, whose other rows stay")
    options = parser.parse_args()
    torch.set_num_threads(1)  # those of a parent are none of a forked child, which would wait for them
    if IN_MEMORY.is_dir():
        tempfile.tempdir = str(IN_MEMORY)
    results: dict[str, Any] = {"machine": machine("cpu"), "rows": {}}
    if options.out is not None and options.out.exists():
        results["rows"] = json.loads(options.out.read_text())["rows"]
    chosen = [one for one in ROWS if options.row is None or one.name in options.row]
    log = Log(options.log, again=[one.name for one in chosen] if options.again else [])
    failures = 0
    for one in chosen:
        gc.collect()
        gc.freeze()  # children that collect would copy all that there is
        numbers = attack(one, log, count=options.count, seed=options.seed, jobs=options.jobs, minutes=options.minutes,
                         commit=results["machine"]["commit"][:9])  # fmt: skip
        results["rows"][one.name] = numbers
        failures += len(numbers["failed"])
        if options.out is not None:
            rows = {row.name: results["rows"][row.name] for row in ROWS if row.name in results["rows"]}
            options.out.write_text(json.dumps({**results, "rows": rows}, indent=1) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
