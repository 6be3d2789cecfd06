"""`make fuzz`: python -m tests.fuzz.run --minutes 10 --out out/fuzz.json [--seed 0] [--kind data] [--only data:7]"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.harness import GROWTH, SECONDS, tried, valid_things, warm_up
from tests.fuzz.inputs import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--only", help="KIND:NUMBER of a finding, to see it again; its input stays")
    options = parser.parse_args()
    warm_up()
    with valid_things() as source:
        if options.only:
            kind, number = options.only.split(":")
            place = Path(tempfile.mkdtemp())
            outcome = tried(kind, Random(f"{options.seed} {kind} {number}"), place, source)
            print(
                place,
                [word[:200] for word in outcome.arguments],
                outcome.status,
                outcome.stderr,
                outcome.finding,
                sep="\n",
            )
            return 0
        result = fuzz(options.minutes, options.seed, options.kind or list(KINDS), source)
    print(json.dumps({key: value for key, value in result.items() if key != "findings"}))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["findings"]))


def commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or None


def fuzz(minutes: float, seed: int, kinds: list[str], source: Path) -> dict[str, Any]:
    """Inputs of all kinds in turn, until the time is over."""
    counts = {kind: Counter() for kind in kinds}
    findings: dict[str, dict[str, Any]] = {}
    start, number, longest, largest = time.monotonic(), 0, 0.0, 0
    while time.monotonic() - start < 60 * minutes:
        kind = kinds[number % len(kinds)]
        place = Path(tempfile.mkdtemp(dir=source.parent))
        outcome = tried(kind, Random(f"{seed} {kind} {number}"), place, source)
        shutil.rmtree(place, ignore_errors=True)
        longest, largest = max(longest, outcome.seconds), max(largest, outcome.growth)
        verdict = "found" if outcome.finding else "accepted" if outcome.status == 0 else "refused"
        counts[kind][verdict] += 1
        if outcome.finding:
            place_of = [line for line in outcome.stderr.splitlines() if line.startswith("  File ")][-1:]
            known = findings.setdefault(
                f"{outcome.finding[:60]} {''.join(place_of)}", {"count": 0, "first": f"{kind}:{number}"}
            )
            known["count"] += 1
            if known["count"] == 1:
                print(f"{kind}:{number} {outcome.finding} {''.join(place_of).strip()}", file=sys.stderr, flush=True)
        number += 1
    return {
        "commit": commit(), "inputs": number, "seconds": round(time.monotonic() - start), "seed": seed,
        "longest_seconds": round(longest, 1), "largest_growth_mib": largest >> 20,
        "limits": {"seconds": SECONDS, "growth_mib": GROWTH >> 20},
        "kinds": {kind: dict(count) for kind, count in counts.items()},
        "findings": [{"what": what, **known} for what, known in findings.items()],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
