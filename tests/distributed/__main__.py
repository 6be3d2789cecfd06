"""python -m tests.distributed: how far runs in several processes are from those of one.

python -m tests.distributed --out out/processes.json                       all cases: a quarter of an hour
python -m tests.distributed --out out.json --only ppo --only "a judge"     some of them
python -m tests.distributed --out out.json --kind 4                        in one kind of launch
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from rlhf_fast.algorithms import ALGORITHMS
from tests.distributed.cases import CASES, values_of_case
from tests.distributed.processes import Processes
from tests.distributed.runs import BAR, difference, run, run_killed

# Name -> processes, and the changes of a run.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {"2": (2, {}), "4": (4, {}), "2, shards": (2, {"shards": 2})}
# In 4 processes that are lost in the second step, and from there in 2.
RESUMED = "4, then 2"
# The work of one process, or all of whose weights train, or whose judge is the model: nothing to split.
WHOLE = {"label", "constitutional", "sft of all weights", "a judge"}


def differences(name: str, kinds: list[str], groups: dict[int, Processes]) -> dict[str, list[float]]:
    """Of the case in each of the kinds of launch, from one process."""
    values, found = values_of_case(name), {}
    with tempfile.TemporaryDirectory() as place:
        one = Path(place) / "one"
        run({**values, "output_dir": str(one)})
        for kind, (count, changes) in KINDS.items():
            if kind in kinds and ("shards" not in changes or name not in WHOLE):
                groups[count].run(run, {**values, **changes, "output_dir": str(Path(place) / kind)})
                found[kind] = list(difference(Path(place) / kind, one))
        if RESUMED in kinds:
            lost = {**values, "save_every": 1, "output_dir": str(Path(place) / RESUMED)}
            groups[4].run(run_killed, lost)
            groups[2].run(run, lost, "auto")
            found[RESUMED] = list(difference(Path(place) / RESUMED, one))
    return found


def main() -> int:
    """1 where a case is further from one process than BAR, or failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed")
    parser.add_argument("--only", action="append", choices=list(CASES), metavar="CASE", help="default: all")
    parser.add_argument("--kind", action="append", choices=[*KINDS, RESUMED], help="of launch; default: all")
    parser.add_argument("--out", type=Path, help="JSON, whose other cases and kinds stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine("cpu"), "cases": {}}
    results["machine"]["command"] = "python -m tests.distributed"
    if options.out is not None and options.out.exists():
        results["cases"] = json.loads(options.out.read_text())["cases"]
    groups, failed = {count: Processes(count) for count, _ in KINDS.values()}, 0
    for name in options.only or CASES:
        try:
            found = differences(name, options.kind or [*KINDS, RESUMED], groups)
        except Exception as error:  # noqa: BLE001 - the other cases go on; the exit status tells
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        worst = max((max(pair) for pair in found.values()), default=0.0)
        failed += worst > BAR
        print(f"{name}: {worst:.1e}{f' {found}' if worst > BAR else ''}", flush=True)
        module = ALGORITHMS[CASES[name][0]].module
        row = results["cases"].setdefault(name, {"module": module, "commits": {}, "differences": {}})
        row["commits"] |= dict.fromkeys(found, results["machine"]["commit"])
        row["differences"] |= found
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    for processes in groups.values():
        processes.close()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
