"""The table of docs/scale.md: how far runs in several processes are from those of one, as `make processes` finds it."""

from __future__ import annotations

from typing import Any


def table(results: dict[str, Any]) -> str:
    """A row for each algorithm's file: its cases, and the largest difference of them in each kind of launch."""
    cases = results["cases"].values()
    kinds = list(dict.fromkeys(kind for case in cases for kind in case["differences"]))
    lines = [f"| | cases | {' | '.join(kinds)} |", f"|---|---:|{'---:|' * len(kinds)}"]
    for module in dict.fromkeys(case["module"] for case in cases):
        own = [case["differences"] for case in cases if case["module"] == module]
        worst = [max((max(found[kind]) for found in own if kind in found), default=None) for kind in kinds]
        none = ["not split" if "shards" in kind else "not run" for kind in kinds]
        cells = (gap if value is None else f"{value:.1e}" for value, gap in zip(worst, none, strict=True))
        lines.append(f"| `{module}` | {len(own)} | {' | '.join(cells)} |")
    commits = ", ".join(sorted({commit[:7] for case in cases for commit in case["commits"].values()}))
    machine = results["machine"]
    origin = f"{machine['cpu']}; torch {machine['torch']}; commit {commits}; `make processes`."
    return "\n".join([*lines, "", origin]) + "\n"
