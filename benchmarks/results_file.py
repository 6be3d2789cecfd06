"""Results as they are written: read, judged against the machine's limits, and against an older run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from benchmarks.costs import Work, floor_seconds

OURS = ("cpu", "triton", "cuda")
MACHINE = ("cpu", "threads", "gpu")  # what makes two runs comparable


class ResultsError(Exception):
    """A mistake of the one who asked, told in one line."""


def load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ResultsError(f"{path}: no such file")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    if not isinstance(results, dict) or not {"machine", "limits", "cases"} <= set(results):
        raise ResultsError(f"{path}: not results of python -m benchmarks")
    for case in results["cases"]:
        if any("p10_ms" not in row for row in case["contenders"].values()) or "passes" not in case:
            raise ResultsError(f"{path}: written before the spread was kept ({case['case']}): measure it again")
    return results


def source(*paths: Path) -> str:
    """What plots of these files carry: names, and digests of what was drawn."""
    return ", ".join(f"{path.name} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths)


def floor_ms(results: dict[str, Any], case: dict[str, Any]) -> float:
    """The machine's least time for the case's bytes and FLOPs; 0 where nothing is counted."""
    return 1e3 * floor_seconds(Work(case["flops"], case["bytes"]), results["limits"])


def best_of(case: dict[str, Any], ours: bool) -> str | None:
    """The contender with the least median, among our implementations or among the others (without bare floors)."""
    rows = case["contenders"]
    names = [name for name, row in rows.items() if (name in OURS) == ours and row["max_error"] is not None]
    return min(names, key=lambda name: rows[name]["median_ms"], default=None)


def regressions(new: dict[str, Any], old: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a contender of ours is slower than in `old`, and a line for everyone whose time changed.

    Changed: the ranges from the tenth to the ninetieth percentile have nothing in common. Raises ResultsError for runs
    of different machines, whose times say nothing about the code, or without a case in common.
    """
    machines = [{key: run["machine"].get(key) for key in MACHINE} for run in (old, new)]
    if machines[0] != machines[1]:
        raise ResultsError(f"other machines cannot be compared: {machines[0]} and {machines[1]}")
    before = {(case["case"], case["shape"]): case["contenders"] for case in old["cases"]}
    pairs = [
        (case, name, before[case["case"], case["shape"]][name], row)
        for case in new["cases"]
        for name, row in case["contenders"].items()
        if name in before.get((case["case"], case["shape"]), {})
    ]
    if not pairs:
        raise ResultsError("the two runs have no case in common")
    slower, lines = False, []
    for case, name, was, now in pairs:
        worse, better = now["p10_ms"] > was["p90_ms"], now["p90_ms"] < was["p10_ms"]
        if worse or better:
            ratio = now["median_ms"] / was["median_ms"]
            slower |= worse and name in OURS
            word = "SLOWER" if worse else "faster"
            lines.append(
                f"{word}: {case['case']}, {case['shape']}, {name}: {ratio:.2f} x the time, "
                f"{was['median_ms']:.4g} -> {now['median_ms']:.4g} ms"
            )
    commits = [str(run["machine"]["commit"])[:7] for run in (old, new)]
    lines.append(f"{len(lines)} of {len(pairs)} times changed beyond their spread, {commits[0]} -> {commits[1]}")
    return slower, lines
