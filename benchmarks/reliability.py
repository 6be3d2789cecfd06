"""The table of docs/reliability.md: what `make attack` tried, and how much of it survived."""

from __future__ import annotations

from typing import Any


def table(results: dict[str, Any]) -> str:
    """A row for each kind of attack, and what did not survive."""
    lines = ["| attack | survived | tried | cases there are | what survival is |", "|---|---:|---:|---:|---|"]
    for name, row in results["rows"].items():
        cells = (name, row["survived"], row["tried"], row["cases"], row["survived_means"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    failed = [
        f"- {name}: {case}: {why}" for name, row in results["rows"].items() for case, why in row["failed"].items()
    ]
    commits = ", ".join(sorted({commit[:7] for row in results["rows"].values() for commit in row["commits"]}))
    machine = results["machine"]
    origin = f"{machine['cpu']}; torch {machine['torch']}; commit {commits}; `make attack`, cases drawn by a seed."
    return "\n".join([*lines, "", origin, *(["", "What did not:", "", *failed] if failed else [])]) + "\n"
