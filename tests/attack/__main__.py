"""python -m tests.attack: attacks small runs, and writes how many survived.

python -m tests.attack --out benchmarks/results/reliability.json             all cases of all rows: hours
python -m tests.attack --count 20 --row "crash points, sft" --seed 3              a sample of some
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from tests.attack import inputs  # noqa: F401
from tests.attack.rows import ROWS, Row


def attack(chosen: Row, count: int | None, seed: int) -> dict[str, Any]:
    """The numbers of a row: its cases, how many were tried, how many survived, and why the others did not."""
    cases, failed, start = list(chosen.cases()), {}, time.time()
    tried = cases if count is None else random.Random(seed).sample(cases, min(count, len(cases)))
    for number, (name, case) in enumerate(tried, start=1):
        with tempfile.TemporaryDirectory() as place:
            reason = case(Path(place))
        if reason is not None:
            failed[name] = reason
            print(f"{chosen.name}: {name}: {reason}", file=sys.stderr, flush=True)
        if number % 10 == 0 or number == len(tried):
            print(f"{chosen.name}: {number - len(failed)} of {number} survived", flush=True)
    return {"survived_means": chosen.survived, "cases": len(cases), "tried": len(tried),
            "survived": len(tried) - len(failed), "failed": failed, "seconds": round(time.time() - start)}  # fmt: skip


def main() -> int:
    """1 where something did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack")
    parser.add_argument("--count", type=int, help="cases of each row, drawn by --seed; default: all")
    parser.add_argument("--row", action="append", choices=[one.name for one in ROWS], help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON, whose other rows stay")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine("cpu"), "rows": {}}
    if options.out is not None and options.out.exists():
        results["rows"] = json.loads(options.out.read_text())["rows"]
    failures = 0
    for one in ROWS:
        if options.row is None or one.name in options.row:
            numbers = attack(one, options.count, options.seed)
            results["rows"][one.name] = {**numbers, "seed": options.seed, "commit": results["machine"]["commit"]}
            failures += len(numbers["failed"])
            if options.out is not None:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
