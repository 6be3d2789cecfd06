"""Markdown of a run: every contender of every case with its time, spread, share of the limit, memory and error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import described, described_scratch
from benchmarks.results_file import OURS, best_of, floor_ms

GROUPS = {
    "bars": "Cases with bars",
    "ops": "Every op",
    "ragged": "Ragged batches",
    "products": "Products of few rows",
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
    lines += sections(results, "##")
    return "\n".join(lines).rstrip() + "\n"


def sections(results: dict[str, Any], heading: str) -> list[str]:
    """A table and its bars for every group of cases that the run has."""
    lines = []
    for group, title in GROUPS.items():
        cases = [case for case in results["cases"] if case["group"] == group]
        if cases:
            lines += [f"{heading} {title}", "", HEAD, *(row for case in cases for row in rows(results, case)), ""]
            bars = [f"- {case['case']}: {text}" for case in cases for text in bars_of(case)]
            lines += [*bars, ""] if bars else []
    return lines


def bars_of(case: dict[str, Any]) -> list[str]:
    """What was asked of the case and what was measured, a line for each bar."""
    return [*map(described, case["bars"]), *described_scratch(case, OURS)]


def origin(results: dict[str, Any], versions: str = "") -> str:
    """Machine, versions, commit and command."""
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    dirty = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    commit = f"commit {str(machine['commit'])[:7]}{dirty}"
    return f"{where}; torch {machine['torch']}{versions}; {commit}; `{machine['command']}`."


def provenance(results: dict[str, Any]) -> str:
    """Its origin with the versions of other libraries, limits, and who is not there."""
    peers = "".join(f", {name} {version}" for name, version in results["peers"].items())
    rates = ", ".join(
        f"{rate / 1e9:.3g} G {name.replace('_per_second', '/s').replace('_', ' ')}"
        for name, rate in results["limits"].items()
    )
    absent = ", ".join(f"{name} ({reason})" for name, reason in results["absent"].items())
    not_there = f" Not there: {absent}." if absent else ""
    return f"{origin(results, peers)} Measured in the same run: {rates}.{not_there}"


def rows(results: dict[str, Any], case: dict[str, Any]) -> list[str]:
    floor, eager = floor_ms(results, case), case["contenders"].get("eager")
    lines = []
    for name, row in case["contenders"].items():
        cells = [
            title(case),
            (f"**{name}**" if name in OURS else name) + sampled(row),
            f"{row['median_ms']:.4g}",
            f"{row['p10_ms']:.4g} to {row['p90_ms']:.4g}",
            f"{eager['median_ms'] / row['median_ms']:.2f}" if eager else "does not fit",
            f"{floor / row['median_ms']:.0%}" if floor else "",
            f"{row['scratch_bytes'] / 2**20:.1f}",
            "" if row["max_error"] is None else f"{row['max_error']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name, reason in case["failed"].items():
        lines.append(f"| {title(case)} | {name} | {reason} | | | | | |")
    return lines


def sampled(row: dict[str, Any]) -> str:
    """What is said of a contender of which a part was timed, and of one that kept the GPU waiting."""
    said = [f"{row['timed_share']:.2%} of it timed"] if row.get("timed_share", 1) < 1 else []
    said += ["with the host's time"] if row.get("host_bound") else []
    return f" ({', '.join(said)})" if said else ""


def title(case: dict[str, Any]) -> str:
    return f"{case['case']}, {case['shape']}"


def others(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of other implementations; bare floors are none."""
    return {who: x for who, x in case["contenders"].items() if who not in OURS and x["max_error"] is not None}


def faster_elsewhere(results: dict[str, Any]) -> list[str]:
    """A line for every case in which another implementation is faster, beyond the spread."""
    lines = []
    for case in results["cases"]:
        name = best_of(case, ours=True)
        ours = case["contenders"][name] if name else {"p10_ms": 0}
        faster = {who: row for who, row in others(case).items() if row["p90_ms"] < ours["p10_ms"]}
        if faster:
            ratios = [f"{who} {ours['median_ms'] / row['median_ms']:.2f} x as fast" for who, row in faster.items()]
            lines.append(f"- {title(case)}: {', '.join(ratios)}")
    return lines


def better_elsewhere(results: dict[str, Any]) -> list[str]:
    """A line for every case and other implementation that is faster, smaller or more exact."""
    lines = []
    for case in results["cases"]:
        name = best_of(case, ours=True)
        if name is None:
            continue
        ours = case["contenders"][name]
        for other, row in others(case).items():
            advantages = []
            if row["median_ms"] < ours["median_ms"]:
                within = "" if row["p90_ms"] < ours["p10_ms"] else " (within the spread)"
                advantages.append(f"{ours['median_ms'] / row['median_ms']:.2f} x as fast{within}")
            if ours["scratch_bytes"] - row["scratch_bytes"] > 2**20:
                less = (ours["scratch_bytes"] - row["scratch_bytes"]) / 2**20
                advantages.append(f"{less:.0f} MiB less beside its results")
            if 2 * row["max_error"] < ours["max_error"] and ours["max_error"] > ROUNDING:
                advantages.append(f"error {row['max_error']:.1e} against {ours['max_error']:.1e}")
            if advantages:
                lines.append(f"- {other}, {title(case)}: {'; '.join(advantages)}")
    return lines or ["Nothing in this run."]
