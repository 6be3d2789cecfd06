"""python -m benchmarks.catalogue: writes the tables and plots of the pages from the op table and committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import costs, plots, tables
from benchmarks.results_file import OURS, best_of, floor_ms, source
from benchmarks.steps import report as steps
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK, END = "<!-- python -m benchmarks.catalogue writes {} -->\n", "<!-- end -->\n"
BACKENDS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA"}
NOT_YET, DOES_NOT_FIT = "not yet measured", "does not fit"
PLOTS = ROOT / "docs" / "benchmarks"
PICTURES = {  # of docs/benchmarks.md: results -> plot -> file
    "cpu.json": {"speed": "cpu_speed", "memory": "cpu_memory", "roofline": "cpu_roofline"},
    "scaling_cpu.json": {name: name for name in ("scaling_context", "scaling_vocabulary")},
}
STEPS = ("steps_ppo.json", "steps_grpo.json", "steps_dpo.json")


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def share(results: dict[str, Any], case: dict[str, Any]) -> str:
    """The machine's least time for the case over our best median."""
    floor, name = floor_ms(results, case), best_of(case, ours=True)
    return f"{floor / case['contenders'][name]['median_ms']:.0%}" if floor and name else ""


def shares(name: str, op: str) -> str:
    results = read(name)
    if results is None:
        return NOT_YET
    found = []
    for case in results["cases"]:
        first, *rest = case["case"].replace(",", "").split()
        part = share(results, case)
        if first == op and part and case["group"] in ("bars", "ops"):
            label = " ".join(rest) + (" bf16" if "bfloat16" in case["shape"] else "")
            found.append(f"{part} {label}".strip())
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
    """Every case with a bar: the medians of everyone, and what was asked of it."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    lines = [tables.provenance(results), "", "| case | ours | eager | others | bars |", "|---|---:|---:|---|---|"]
    for case in filter(in_bars, results["cases"]):
        medians = {who: f"{row['median_ms']:.4g}" for who, row in case["contenders"].items()}
        others = ", ".join(f"{who} {ms}" for who, ms in medians.items() if who not in (*OURS, "eager"))
        bars = "<br>".join(line.removeprefix("bar ") for line in tables.bars_of(case))
        ours = medians[best_of(case, ours=True)]
        lines.append(f"| {tables.title(case)} | {ours} | {medians.get('eager', DOES_NOT_FIT)} | {others} | {bars} |")
    return "\n".join(lines) + "\n"


def summary(name: str) -> str:
    """The cases with bars beside the fastest other library, and every case in which somebody else is faster."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    lines = [
        tables.provenance(results), "",
        "| case | ours, ms | eager | fastest other library | share of the limit |", "|---|---:|---:|---|---:|",
    ]  # fmt: skip
    for case in filter(in_bars, results["cases"]):
        medians = {who: row["median_ms"] for who, row in tables.others(case).items()}
        eager = medians.pop("eager", None)
        libraries = {who: ms for who, ms in medians.items() if who != "torch.compile"}
        best = min(libraries, key=libraries.__getitem__, default=None)
        cells = [
            tables.title(case),
            f"{case['contenders'][best_of(case, ours=True)]['median_ms']:.4g}",
            DOES_NOT_FIT if eager is None else f"{eager:.4g}",
            "" if best is None else f"{best} {libraries[best]:.4g}",
            share(results, case),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    faster = tables.faster_elsewhere(results)
    verdict = "Where another implementation is faster, beyond the spread:" if faster else "No other one is faster."
    return "\n".join([*lines, "", verdict, "", *faster]).rstrip() + "\n"


def in_bars(case: dict[str, Any]) -> bool:
    return case["group"] == "bars"


def run(name: str) -> str:
    """Machine, versions and command of a run, and its plots."""
    results = read(name)
    if results is None:
        return f"{NOT_YET.capitalize()}.\n"
    shown = [path.name for path, (made_of, _) in pictures().items() if made_of == source(RESULTS / name)]
    images = [f"![{Path(file).stem}]({PLOTS.name}/{file})" for file in shown]
    return "\n\n".join([tables.provenance(results), *images]) + "\n"


def results_tables(name: str) -> str:
    results = read(name)
    return f"{NOT_YET.capitalize()}.\n" if results is None else "\n".join(tables.sections(results, "###")) + "\n"


def better_elsewhere(name: str) -> str:
    results = read(name)
    return f"{NOT_YET.capitalize()}.\n" if results is None else "\n".join(tables.better_elsewhere(results)) + "\n"


def steps_summary() -> str:
    found = step_results()
    return steps.summary(found) if found else f"{NOT_YET.capitalize()}.\n"


def step_results() -> list[dict[str, Any]]:
    return [result for result in map(read, STEPS) if result is not None]


def whole_steps() -> str:
    found = step_results()
    if not found:
        return f"{NOT_YET.capitalize()}.\n"
    sections = [steps.section(result).replace("## ", "### ", 1) for result in found]
    return "\n".join([steps.LEGEND, *sections, f"![loss and reward of every step]({PLOTS.name}/steps.png)\n"])


def pictures() -> dict[Path, tuple[str, Callable[[], Any]]]:
    """Path -> (what it is made of, function that makes the figure), for the results that are there."""
    found: dict[Path, tuple[str, Callable[[], Any]]] = {}
    for name, chosen in PICTURES.items():
        results = read(name)
        if results is not None:
            figures = plots.pictures(results)
            there = {short: figures[plot] for plot, short in chosen.items() if plot in figures}
            found |= {PLOTS / f"{short}.png": (source(RESULTS / name), figure) for short, figure in there.items()}
    if step_results():
        made_of = source(*(RESULTS / name for name in STEPS if (RESULTS / name).exists()))
        found[PLOTS / "steps.png"] = made_of, lambda: steps.curves(step_results())
    return found


def draw() -> None:
    """Draws the plots of docs/benchmarks.md, and removes those of results that are gone."""
    PLOTS.mkdir(exist_ok=True)
    for path in PLOTS.glob("*.png"):
        path.unlink()
    for path, (made_of, figure) in pictures().items():
        plots.save(figure(), path, made_of)


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "kernels" / "README.md": {
        "the ops": ops_table,
        "the CPU timings": lambda: timings("cpu.json"),
        "the GPU timings": lambda: timings("gpu.json"),
    },
    ROOT / "README.md": {"the CPU summary": lambda: summary("cpu.json"), "the steps' summary": steps_summary},
    ROOT / "docs" / "benchmarks.md": {
        "the CPU run": lambda: run("cpu.json"),
        "what others do better on the CPU": lambda: better_elsewhere("cpu.json"),
        "the CPU tables": lambda: results_tables("cpu.json"),
        "the torchtune run": lambda: run("cpu_torchtune.json"),
        "the torchtune tables": lambda: results_tables("cpu_torchtune.json"),
        "the growing run": lambda: run("scaling_cpu.json"),
        "the growing tables": lambda: results_tables("scaling_cpu.json"),
        "the whole steps": whole_steps,
        "the GPU run": lambda: run("gpu.json"),
        "what others do better on the GPU": lambda: better_elsewhere("gpu.json"),
        "the GPU tables": lambda: results_tables("gpu.json"),
    },
}


def with_tables(page: Path) -> str:
    """The text of the page with its tables made anew."""
    text = page.read_text(encoding="utf-8")
    for name, made in PAGES[page].items():
        head, rest = text.split(MARK.format(name))
        text = head + MARK.format(name) + "\n" + made() + "\n" + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    draw()
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
