"""python -m benchmarks.catalogue: writes the tables and plots of the pages from the op table and committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import costs, fits, memory, methods, plots, processes, reliability, roofline, scale, tables
from benchmarks.results_file import best_of, floor_ms, source
from benchmarks.steps import parity
from benchmarks.steps import report as steps
from rlhf_fast.ops import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK, END = "<!-- python -m benchmarks.catalogue writes {} -->\n", "<!-- end -->\n"
BACKENDS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA"}
NOT_YET, DOES_NOT_FIT = "not yet measured", "does not fit"
NOTHING = f"{NOT_YET.capitalize()}.\n"
PLOTS = ROOT / "docs" / "benchmarks"
PICTURES = {  # of docs/benchmarks.md: results -> plot -> file
    "cpu.json": {"speed": "cpu_speed", "memory": "cpu_memory", "roofline": "cpu_roofline"},
    "scaling_cpu.json": {name: name for name in ("scaling_context", "scaling_vocabulary")},
}
GPU_RUNS = ("gpu_first.json", "gpu_second.json", "gpu_third.json")
STEPS = ("steps_ppo.json", "steps_grpo.json", "steps_dpo.json")


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def of(name: str, write: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """What `write` makes of a run, where there is one."""

    def text() -> str:
        results = read(name)
        return NOTHING if results is None else write(results)

    return text


def share(results: dict[str, Any], case: dict[str, Any]) -> str:
    """The machine's least time for the case over our best median."""
    floor, name = floor_ms(results, case), best_of(case, ours=True)
    return f"{floor / case['contenders'][name]['median_ms']:.0%}" if floor and name else ""


def shares(results: dict[str, Any], op: str) -> str:
    parts = []
    for case in results["cases"]:
        first, *rest = case["case"].replace(",", "").split()
        part = share(results, case)
        if first == op and part and case["group"] in ("bars", "ops"):
            label = " ".join(rest) + (" bf16" if "bfloat16" in case["shape"] else "")
            parts.append(f"{part} {label}".strip())
    return "<br>".join(parts) or NOT_YET


def ops_table() -> str:
    runs = {device: read(name) for device, name in (("CPU", "cpu.json"), ("GPU", "gpu.json"))}
    measured = {device: results for device, results in runs.items() if results is not None}
    columns = ["op", "computes", "FLOPs", "bytes", "backends", *(f"share of the limit, {x}" for x in measured)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for op, impls in sorted(table().items()):
        backends = ", ".join(BACKENDS[name] for name in impls)
        cells = [f"`{op}`", costs.COSTS[op].formula, costs.described(op, 0), costs.described(op, 1), backends]
        lines.append(f"| {' | '.join([*cells, *(shares(results, op) for results in measured.values())])} |")
    return "\n".join(lines) + "\n"


def headline(results: dict[str, Any]) -> str:
    """The first case with a bar of every op beside the fastest other library, and how often somebody else is faster."""
    lines = ["| case | ours, ms | eager | fastest other library | share of the limit |", "|---|---:|---:|---|---:|"]
    ops = set()
    for case in results["cases"]:
        if case["group"] != "bars" or case["op"] in ops:
            continue
        ops.add(case["op"])
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
    faster, cases = len(tables.faster_elsewhere(results)), len(results["cases"])
    verdict = f"In {faster} of the {cases} cases of this run another implementation is faster, beyond the spread."
    return "\n".join([*lines, "", tables.origin(results), "", verdict]) + "\n"


def run(name: str) -> Callable[[], str]:
    """Machine, versions and command of a run, and its plots."""

    def text(results: dict[str, Any]) -> str:
        shown = [path.name for path, (made_of, _) in pictures().items() if made_of == source(RESULTS / name)]
        images = [f"![{Path(file).stem}]({PLOTS.name}/{file})" for file in shown]
        return "\n\n".join([tables.provenance(results), *images]) + "\n"

    return of(name, text)


def tables_of(title: str, name: str, machine: str = "") -> dict[str, Callable[[], str]]:
    """What the page says of a run: of that of a `machine`, also what others do better."""
    parts = {f"the {title} run": run(name)}
    if machine:
        better = of(name, lambda results: "\n".join(tables.better_elsewhere(results)) + "\n")
        parts[f"what others do better on the {machine}"] = better
    return parts | {f"the {title} tables": of(name, lambda results: "\n".join(tables.sections(results, "###")) + "\n")}


def gpu_runs() -> str:
    runs = [results for results in map(read, GPU_RUNS) if results is not None]
    return roofline.table(runs) if runs else NOTHING


def step_results() -> list[dict[str, Any]]:
    return [result for result in map(read, STEPS) if result is not None]


def whole_steps() -> str:
    results = step_results()
    if not results:
        return NOTHING
    curves = f"![loss and reward of every step]({PLOTS.name}/steps.png)\n"
    return "\n".join([steps.summary(results), steps.LEGEND, *map(steps.section, results), curves])


def pictures() -> dict[Path, tuple[str, Callable[[], Any]]]:
    """Path -> (what it is made of, function that makes the figure), for the results that are there."""
    drawn: dict[Path, tuple[str, Callable[[], Any]]] = {}
    for name, chosen in PICTURES.items():
        results = read(name)
        if results is not None:
            figures = plots.pictures(results)
            there = {short: figures[plot] for plot, short in chosen.items() if plot in figures}
            drawn |= {PLOTS / f"{short}.png": (source(RESULTS / name), figure) for short, figure in there.items()}
    if step_results():
        made_of = source(*(RESULTS / name for name in STEPS if (RESULTS / name).exists()))
        drawn[PLOTS / "steps.png"] = made_of, lambda: steps.curves(step_results())
    return drawn


def draw() -> None:
    """Draws the plots of docs/benchmarks.md, and removes those of results that are gone."""
    PLOTS.mkdir(exist_ok=True)
    for path in PLOTS.glob("*.png"):
        path.unlink()
    for path, (made_of, figure) in pictures().items():
        plots.save(figure(), path, made_of)


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "kernels" / "README.md": {"the ops": ops_table},
    ROOT / "README.md": {"the headline": of("cpu.json", headline)},
    ROOT / "docs" / "benchmarks.md": {
        **tables_of("CPU", "cpu.json", machine="CPU"),
        **tables_of("torchtune", "cpu_torchtune.json"),
        **tables_of("growing", "scaling_cpu.json"),
        "the whole steps": whole_steps,
        "the memory of an update": of("memory.json", memory.section),
        "the runs on a GPU": gpu_runs,
        **tables_of("GPU", "gpu.json", machine="GPU"),
    },
    ROOT / "docs" / "scale.md": {
        "what passes carry": scale.per_pass,
        "what a step carries": scale.per_step,
        "rollouts": scale.rollouts,
        "the head": scale.head,
        "what fits a GPU": of("fits.json", fits.table),
        "the processes": of("processes.json", processes.table),
    },
    ROOT / "docs" / "reliability.md": {"the attacks": of("reliability.json", reliability.table)},
    ROOT / "docs" / "methods.md": {
        "the methods": of("methods.json", methods.table),
        "parity": of("parity.json", parity.table),
    },
}


def with_tables(page: Path) -> str:
    """The text of the page with its tables made anew."""
    text = page.read_text(encoding="utf-8")
    for name, table_of in PAGES[page].items():
        head, rest = text.split(MARK.format(name))
        text = head + MARK.format(name) + "\n" + table_of() + "\n" + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    draw()
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
