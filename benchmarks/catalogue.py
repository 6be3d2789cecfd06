"""python -m benchmarks.catalogue: writes the tables of both READMEs from the op table and committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import costs
from benchmarks.harness import described, described_scratch
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK, END = "<!-- python -m benchmarks.catalogue writes {} -->\n", "<!-- end -->\n"
BACKENDS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA"}
OURS = {"cpu.json": ("cpu",), "gpu.json": ("triton", "cuda")}
NOT_YET = "not yet measured"


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def share(results: dict[str, Any], case: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """The machine's least time for the case over our best."""
    floor = costs.floor_seconds(costs.Work(case["flops"], case["bytes"]), results["limits"])
    ours = [row["min_ms"] for name, row in case["contenders"].items() if name in names]
    return 1e3 * floor / min(ours) if floor and ours else None


def shares(name: str, op: str) -> str:
    results = read(name)
    if results is None:
        return NOT_YET
    found = []
    for case in results["cases"]:
        first, *rest = case["case"].replace(",", "").split()
        part = share(results, case, OURS[name])
        if first == op and part is not None and case.get("group", "bars") in ("bars", "ops"):
            label = " ".join(rest) + (" bf16" if "bfloat16" in case["shape"] else "")
            found.append(f"{part:.0%} {label}".strip())
    return "<br>".join(found) or NOT_YET


def ops_table() -> str:
    lines = [
        "| op | computes | FLOPs | bytes | backends | share of the limit, CPU | GPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, impls in sorted(table().items()):
        backends = ", ".join(BACKENDS[name] for name in impls)
        cells = [f"`{op}`", costs.COSTS[op].formula, costs.described(op, 0), costs.described(op, 1), backends]
        lines.append(f"| {' | '.join([*cells, shares('cpu.json', op), shares('gpu.json', op)])} |")
    return "\n".join(lines) + "\n"


def provenance(results: dict[str, Any]) -> str:
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    peers = "".join(f", {peer} {version}" for peer, version in results["peers"].items())
    return f"{where}; torch {machine['torch']}{peers}; commit {machine['commit'][:7]}; `{machine['command']}`."


def timings(name: str) -> str:
    """Every case with a bar: the best of the interleaved repeats of everyone, and what was asked of it."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    lines = [
        provenance(results), "",
        "| case | ours | eager | others | bars |", "|---|---:|---:|---|---|",
    ]  # fmt: skip
    for case in filter(in_bars, results["cases"]):
        best = {who: row["min_ms"] for who, row in case["contenders"].items()}
        ours = min(best.pop(who) for who in OURS[name] if who in best)
        eager = best.pop("eager")
        others = ", ".join(f"{who} {ms:.4g}" for who, ms in best.items() if who not in OURS[name])
        lines_of_bars = [*map(described, case["bars"]), *described_scratch(case, OURS[name])]
        bars = "<br>".join(line.removeprefix("bar ") for line in lines_of_bars)
        lines.append(f"| {case['case']}, {case['shape']} | {ours:.4g} | {eager:.4g} | {others} | {bars} |")
    return "\n".join(lines) + "\n"


def summary(name: str) -> str:
    """The cases with bars beside the fastest other library, and every case in which somebody else is faster."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    lines = [
        provenance(results), "",
        "| case | ours, ms | eager | fastest other library | share of the limit |", "|---|---:|---:|---|---:|",
    ]  # fmt: skip
    faster = []
    for case in results["cases"]:
        ours = min(row["min_ms"] for who, row in case["contenders"].items() if who in OURS[name])
        others = {
            row["min_ms"]: who
            for who, row in case["contenders"].items()
            if who not in OURS[name] and row["max_error"] is not None
        }
        eager = case["contenders"]["eager"]["min_ms"]
        title = f"{case['case']}, {case['shape']}"
        faster += [f"{title}: {who} takes {ms:.4g} ms, ours {ours:.4g}" for ms, who in others.items() if ms < ours]
        best = min((ms for ms, who in others.items() if who not in ("eager", "torch.compile")), default=None)
        other = "" if best is None else f"{others[best]} {best:.4g}"
        part = share(results, case, OURS[name])
        if in_bars(case):
            cell = "" if part is None else f"{part:.0%}"
            lines.append(f"| {title} | {ours:.4g} | {eager:.4g} | {other} | {cell} |")
    lines += [
        "",
        "Where another implementation is faster:" if faster else "No other implementation is faster in these.",
    ]
    lines += ["", *(f"- {line}" for line in faster)] if faster else []
    return "\n".join(lines) + "\n"


def in_bars(case: dict[str, Any]) -> bool:
    return case.get("group", "bars") == "bars"


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "kernels" / "README.md": {
        "the ops": ops_table,
        "the CPU timings": lambda: timings("cpu.json"),
        "the GPU timings": lambda: timings("gpu.json"),
    },
    ROOT / "README.md": {"the CPU summary": lambda: summary("cpu.json")},
}


def with_tables(page: Path) -> str:
    """The text of the page with its tables made anew."""
    text = page.read_text(encoding="utf-8")
    for name, made in PAGES[page].items():
        head, rest = text.split(MARK.format(name))
        text = head + MARK.format(name) + "\n" + made() + "\n" + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
