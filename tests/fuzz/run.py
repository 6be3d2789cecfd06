"""`make fuzz`: python -m tests.fuzz.run --minutes 10 --jobs 2 --out out/fuzz.json [--seed 0] [--kind data]

To see a finding again: --seed 0 --only data:7"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.harness import GROWTH, SECONDS, tried, valid_things, warm_up
from tests.fuzz.inputs import KINDS, ORDER

WRITTEN = 60  # seconds between two times that the result is written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--inputs", type=int, default=1 << 40, help="at most so many")
    parser.add_argument("--jobs", type=int, default=1, help="inputs at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON; runs with other seeds that are in it stay")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--only", help="KIND:NUMBER of a finding, to see it again; its input stays")
    options = parser.parse_args()
    warm_up()
    with valid_things() as source:
        if options.only:
            kind, number = options.only.split(":")
            place = Path(tempfile.mkdtemp())
            outcome = tried(kind, Random(f"{options.seed} {kind} {number}"), place, source)
            words = [word[:200] for word in outcome.arguments]
            print(place, words, outcome.status, outcome.stderr, outcome.finding, sep="\n")
            return 0
        start, written = time.monotonic(), 0.0
        run = new_run(options.seed)
        for told in outcomes(options, source, start):
            count(run, told)
            run["seconds"] = round(time.monotonic() - start)
            if options.out and time.monotonic() - written > WRITTEN:
                write(options.out, run)
                written = time.monotonic()
    if options.out:
        write(options.out, run)
    print(json.dumps({key: value for key, value in run.items() if key != "findings"}))
    return int(bool(run["findings"]))


def outcomes(options: argparse.Namespace, source: Path, start: float) -> Iterator[dict[str, Any]]:
    """Inputs of all kinds in turn, until the time is over, each of the jobs every so-manieth."""
    reader, writer = os.pipe()
    children = []
    for job in range(options.jobs):
        children.append(os.fork())
        if children[-1] == 0:
            work(job, writer, options, source, start)
    os.close(writer)
    with open(reader) as lines:
        yield from map(json.loads, lines)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise RuntimeError("a job of the fuzzer failed")


def work(job: int, writer: int, options: argparse.Namespace, source: Path, start: float) -> None:
    """What a job does, in a process of its own; it never returns."""
    kinds = options.kind or ORDER
    status = 1
    try:
        for number in range(job, options.inputs, options.jobs):
            if time.monotonic() - start > 60 * options.minutes:
                break
            told = one(kinds[number % len(kinds)], number, options.seed, source)
            os.write(writer, (json.dumps(told) + "\n").encode())  # whole, below PIPE_BUF
        status = 0
    except BaseException:  # noqa: BLE001 - of what is made here, not of what is tried
        traceback.print_exc()
    finally:
        os._exit(status)


def one(kind: str, number: int, seed: int, source: Path) -> dict[str, Any]:
    """What became of an input, in few words."""
    for _ in range(2):  # a machine that is busy elsewhere is slow once: what hangs, hangs again
        place = Path(tempfile.mkdtemp(dir=source.parent))
        outcome = tried(kind, Random(f"{seed} {kind} {number}"), place, source)
        shutil.rmtree(place, ignore_errors=True)
        if outcome.finding != "hang":
            break
    where = [line for line in outcome.stderr.splitlines() if line.startswith("  File ")][-1:]
    return {
        "kind": kind, "number": number, "accepted": outcome.status == 0, "seconds": outcome.seconds,
        "growth": outcome.growth,
        "finding": outcome.finding and f"{outcome.finding[:200]} {''.join(where).strip()[:300]}",
    }  # fmt: skip


def commit() -> str | None:
    found = subprocess.run(["git", "describe", "--always", "--abbrev=9", "--dirty=+"], capture_output=True, text=True)
    return found.stdout.strip() or None


def new_run(seed: int) -> dict[str, Any]:
    return {
        "commit": commit(), "seed": seed, "inputs": 0, "seconds": 0, "longest_seconds": 0.0, "largest_growth_mib": 0,
        "kinds": {}, "findings": [],
    }  # fmt: skip


def count(run: dict[str, Any], told: dict[str, Any]) -> None:
    run["inputs"] += 1
    run["longest_seconds"] = max(run["longest_seconds"], round(told["seconds"], 1))
    run["largest_growth_mib"] = max(run["largest_growth_mib"], told["growth"] >> 20)
    verdict = "found" if told["finding"] else "accepted" if told["accepted"] else "refused"
    of_kind = run["kinds"].setdefault(told["kind"], {"refused": 0, "accepted": 0, "found": 0})
    of_kind[verdict] += 1
    if told["finding"]:
        known = next((found for found in run["findings"] if found["what"] == told["finding"]), None)
        if known is None:
            known = {"what": told["finding"], "count": 0, "first": f"{told['kind']}:{told['number']}"}
            run["findings"].append(known)
            print(known["first"], known["what"], file=sys.stderr, flush=True)
        known["count"] += 1


def write(out: Path, run: dict[str, Any]) -> None:
    """Put the run among those that `out` has, in the place of one of the same commit and seed, and add them up."""
    runs = json.loads(out.read_text())["runs"] if out.exists() else []
    runs = [other for other in runs if (other["commit"], other["seed"]) != (run["commit"], run["seed"])] + [run]
    kinds: dict[str, Counter[str]] = {}
    for one_run in runs:
        for kind, counts in one_run["kinds"].items():
            kinds.setdefault(kind, Counter()).update(counts)
    result = {
        "commit": ", ".join(dict.fromkeys(str(one_run["commit"]) for one_run in runs)),
        "inputs": sum(one_run["inputs"] for one_run in runs),
        "findings": sum(found["count"] for one_run in runs for found in one_run["findings"]),
        "longest_seconds": max(one_run["longest_seconds"] for one_run in runs),
        "largest_growth_mib": max(one_run["largest_growth_mib"] for one_run in runs),
        "limits": {"processor_seconds": SECONDS, "seconds": 3 * SECONDS, "growth_mib": GROWTH >> 20},
        "kinds": kinds, "runs": runs,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    spare = out.with_name(f"{out.name}.new")
    spare.write_text(json.dumps(result, indent=1) + "\n")
    spare.replace(out)


if __name__ == "__main__":
    sys.exit(main())
