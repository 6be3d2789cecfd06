"""The table of docs/reliability.md: what `make attack` tried, and how much of it survived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FUZZED = Path(__file__).parents[1] / "tests" / "fuzz" / "results.json"


def table(results: dict[str, Any]) -> str:
    """A row for each kind of attack, and what did not survive."""
    fuzzed = json.loads(FUZZED.read_text(encoding="utf-8"))
    findings = [one for run in fuzzed["runs"] for one in run["findings"]]
    found = {one["what"]: f"{one['count']} of them, the first {one['first']}" for one in findings}
    bad = sum(one["count"] for one in findings)
    means = "it runs, or is refused in a few lines, without a traceback, within 20 s and 1 GiB"
    # `make fuzz` tries inputs for as long as one likes: there is no number of cases.
    fed = {"survived_means": means, "cases": "no end", "tried": fuzzed["inputs"], "survived": fuzzed["inputs"] - bad,
           "failed": found, "commits": [run["commit"] for run in fuzzed["runs"]]}  # fmt: skip
    results = {**results, "rows": {**results["rows"], "hostile input (`make fuzz`)": fed}}
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
