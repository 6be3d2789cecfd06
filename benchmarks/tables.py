"""Markdown of a run: every contender of every case with its time, spread, share of the limit, memory and error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import described
from benchmarks.results_file import OURS, best_of, floor_ms

GROUPS = {
    "bars": "Cases with bars",
    "ops": "Every op",
    "ragged": "Ragged batches",
    "scaling": "Growing contexts and vocabularies",
}
ROUNDING = 1e-6  # errors below it are of the last bits of float32
HEAD = (
    "| case | contender | median ms | p10 to p90 | x eager | share of the limit | MiB beside results | error |\n"
    "|---|---|---:|---|---:|---:|---:|---:|"
)


def page(results: dict[str, Any], pictures: list[Path]) -> str:
    lines = ["# Benchmarks", "", provenance(results), ""]
    lines += [f"![{path.stem}]({path.name})" for path in pictures] + [""]
    lines += ["## What another implementation does better", "", *better_elsewhere(results), ""]
    for group, title in GROUPS.items():
        cases = [case for case in results["cases"] if case["group"] == group]
        if cases:
            lines += [f"## {title}", "", HEAD, *(row for case in cases for row in rows(results, case)), ""]
            lines += [f"- {case['case']}: {described(bar)}" for case in cases for bar in case["bars"]]
    return "\n".join(lines).rstrip() + "\n"


def provenance(results: dict[str, Any]) -> str:
    """Machine, versions, commit, command, limits, and who is not there."""
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    peers = "".join(f", {name} {version}" for name, version in results["peers"].items())
    dirty = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    rates = ", ".join(
        f"{rate / 1e9:.3g} G {name.replace('_per_second', '/s').replace('_', ' ')}"
        for name, rate in results["limits"].items()
    )
    absent = ", ".join(f"{name} ({reason})" for name, reason in results["absent"].items())
    return (
        f"{where}; torch {machine['torch']}{peers}; commit {str(machine['commit'])[:7]}{dirty}; `{machine['command']}`."
        f" Measured in the same run: {rates}." + (f" Not there: {absent}." if absent else "")
    )


def rows(results: dict[str, Any], case: dict[str, Any]) -> list[str]:
    floor, eager = floor_ms(results, case), case["contenders"].get("eager")
    made = []
    for name, row in case["contenders"].items():
        cells = [
            f"{case['case']}, {case['shape']}",
            f"**{name}**" if name in OURS else name,
            f"{row['median_ms']:.4g}",
            f"{row['p10_ms']:.4g} to {row['p90_ms']:.4g}",
            f"{eager['median_ms'] / row['median_ms']:.2f}" if eager else "does not fit",
            f"{floor / row['median_ms']:.0%}" if floor else "",
            f"{row['scratch_bytes'] / 2**20:.1f}",
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
        ]
        made.append(f"| {' | '.join(cells)} |")
    for name, reason in case["failed"].items():
        made.append(f"| {case['case']}, {case['shape']} | {name} | {reason} | | | | | |")
    return made


def better_elsewhere(results: dict[str, Any]) -> list[str]:
    """A line for every case in which another contender is faster (beyond the spread), smaller or more exact."""
    lines = []
    for case in results["cases"]:
        name = best_of(case, ours=True)
        if name is None:
            continue
        ours = case["contenders"][name]
        for other, row in case["contenders"].items():
            if other in OURS or row["max_error"] is None:
                continue
            found = []
            if row["p90_ms"] < ours["p10_ms"]:
                found.append(f"{ours['median_ms'] / row['median_ms']:.2f} x as fast")
            if ours["scratch_bytes"] - row["scratch_bytes"] > 2**20:
                found.append(
                    f"{(ours['scratch_bytes'] - row['scratch_bytes']) / 2**20:.0f} MiB less beside its results"
                )
            if 2 * row["max_error"] < ours["max_error"] and ours["max_error"] > ROUNDING:
                found.append(f"error {row['max_error']:.1e} against {ours['max_error']:.1e}")
            if found:
                lines.append(f"- {other}, {case['case']}, {case['shape']}: {'; '.join(found)}")
    return lines or ["Nothing in this run."]
