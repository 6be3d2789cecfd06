"""python -m benchmarks.catalogue: writes the tables of kernels/README.md from the op table and committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import costs
from benchmarks.harness import described, described_scratch
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[1]
README = ROOT / "kernels" / "README.md"
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
        if first == op and part is not None:
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


def timings(name: str) -> str:
    """Every case: the best of the interleaved repeats of everyone, and what was asked of it."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    peers = "".join(f", {peer} {version}" for peer, version in results["peers"].items())
    lines = [
        f"{where}; torch {machine['torch']}{peers}; commit {machine['commit'][:7]}; `{machine['command']}`.", "",
        "| case | ours | eager | others | bars |", "|---|---:|---:|---|---|",
    ]  # fmt: skip
    for case in results["cases"]:
        best = {who: row["min_ms"] for who, row in case["contenders"].items()}
        ours = min(best.pop(who) for who in OURS[name] if who in best)
        eager = best.pop("eager")
        others = ", ".join(f"{who} {ms:.4g}" for who, ms in best.items() if who not in OURS[name])
        lines_of_bars = [*map(described, case["bars"]), *described_scratch(case, OURS[name])]
        bars = "<br>".join(line.removeprefix("bar ") for line in lines_of_bars)
        lines.append(f"| {case['case']}, {case['shape']} | {ours:.4g} | {eager:.4g} | {others} | {bars} |")
    return "\n".join(lines) + "\n"


SECTIONS = {
    "the ops": ops_table,
    "the CPU timings": lambda: timings("cpu.json"),
    "the GPU timings": lambda: timings("gpu.json"),
}


def with_tables(text: str) -> str:
    for name, made in SECTIONS.items():
        head, rest = text.split(MARK.format(name))
        text = head + MARK.format(name) + "\n" + made() + "\n" + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
